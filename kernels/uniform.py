# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Draws on (0, 1) by seed, key and token: Philox 4x32-10, keyed by the seed and counting by the other two.

    counter = (token, key + 1, 0, 0)

vLLM's own acceptance draws count by (position, 0, 0, 0), and its noise is another hash: no draw here is one of those.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST = 4.6566127342e-10  # what a word of 1 becomes

_LOW = 0xFFFFFFFF
_least = tl.constexpr(LEAST)


def uniform(seeds: Tensor, keys: Tensor, tokens: Tensor) -> Tensor:
    """Of one shape, all int64. Products of two words wrap, which leaves their bits right."""
    seeds, keys, tokens = torch.broadcast_tensors(seeds.long(), keys.long(), tokens.long())
    k0, k1 = seeds & _LOW, (seeds >> 32) & _LOW
    c0, c1 = tokens & _LOW, (keys + 1) & _LOW
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = ((b >> 32) & _LOW) ^ c1 ^ k0, b & _LOW, ((a >> 32) & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    positive = torch.where(c0 >= 1 << 31, _LOW - c0, c0)
    return (positive.float() * LEAST).clamp(min=LEAST)


@triton.jit
def uniform_of(seed, key, token):
    count = ((key.to(tl.int64) + 1) << 32) | token.to(tl.int64)
    return tl.maximum(tl.rand(seed, count), _least)
