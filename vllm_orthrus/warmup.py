"""Launching every form of our kernels that a step may launch, before requests wait for one to be compiled.

Triton compiles a kernel anew for each set of its constants, and how many hypotheses a request has, or how a launch is
cut up, depends on the number of requests. vLLM's own warm-up sees a few of these numbers. Passes here have as many rows
as real ones and nobody's: they read no cache, sample nothing and leave no trace.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from vllm_orthrus.attention import BlockAttention, Blocks
from vllm_orthrus.kernel_attention import KernelAttention
from vllm_orthrus.kernels.dual_view_attention import Verification

if TYPE_CHECKING:
    from vllm_orthrus.onepass import OnePass


def attend_to_nothing(attention: BlockAttention, blocks: Blocks, verified: Verification | None = None) -> None:
    """One launch for each kind of cache that the target has."""
    if not isinstance(attention, KernelAttention):
        return
    kinds = {
        (layer.group, layer.block_size, layer.attn.kv_cache_dtype): at for at, layer in enumerate(attention.layers)
    }
    for index in kinds.values():
        attn = attention.layers[index].attn
        heads, kv_heads = attn.num_heads * attn.head_size, attn.num_kv_heads * attn.head_size
        like = {"dtype": attn.dtype, "device": blocks.positions.device}
        q, k, v = (torch.zeros(blocks.positions.numel(), width, **like) for width in (heads, kv_heads, kv_heads))
        attention.begin(blocks)
        attention(index, q, k, v, verified)


def hypotheses_of_nobody(one_pass: "OnePass") -> Iterator[int]:
    """For each number of requests that can have hypotheses: their rows attended to, and the number."""
    assert one_pass.attention is not None
    for num_reqs in range(1, one_pass.shape.most_carried + 1):
        one_pass.attention.clear()
        blocks = one_pass.views(num_reqs).blocks
        blocks.prefix_lengths.fill_(-1)
        attend_to_nothing(one_pass.attention.blocks, blocks, one_pass.attention.nothing(num_reqs))
        yield num_reqs
