# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Find the newest hypothesis that an outcome has made useful, in one launch. hypotheses.py says when it is.

usable    a = -1, or a < a* and c = d_{a+1}, or a = a* and c = b      after the outcome "a* accepted, bonus b"
which     the usable one of largest a, and of those the first
offset    a* - a; where none is usable, a* + 1 rows further on in the block at hand
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_orthrus.kernels.forms import runs_triton
from vllm_orthrus.kernels.hypotheses import NONE, Hypotheses
from vllm_orthrus.kernels.packed import require_packed


class Match(NamedTuple):
    which: Tensor  # [R] int64, the newest usable hypothesis; -1: none, the block at hand stays
    offset: Tensor  # [R] int64, the row of the block that predicts what follows the bonus; 0: hit


def match_outcome(
    hypotheses: Hypotheses,
    drafts: Tensor,  # [R, K] as verified
    num_sampled: Tensor,  # [R] accepted drafts plus the bonus
    last_sampled: Tensor,  # [R] the bonus
    offset: Tensor,  # [R] of those drafts in the block at hand
) -> Match:
    """Where nothing was sampled, nothing is usable and the offset stays."""
    form = launch if runs_triton(drafts.device) else naive
    return form(hypotheses, drafts, num_sampled, last_sampled, offset)


def naive(hypotheses: Hypotheses, drafts: Tensor, num_sampled: Tensor, last_sampled: Tensor, offset: Tensor) -> Match:
    accepted = num_sampled[:, None] - 1  # [R, 1] a*
    true_token = drafts.gather(1, hypotheses.accepted.clamp(0, drafts.shape[1] - 1))  # [R, H] where a < a*
    true_token = torch.where(hypotheses.accepted == accepted, last_sampled[:, None], true_token)
    named = (hypotheses.accepted >= 0) & (hypotheses.accepted <= accepted) & (true_token == hypotheses.token)
    usable = (named | (hypotheses.accepted == -1)) & (accepted >= 0)
    newest, which = torch.where(usable, hypotheses.accepted, NONE).max(1)
    found = newest > NONE
    behind = torch.where(found, num_sampled - 1 - newest, offset + num_sampled)
    return Match(torch.where(found, which, -1), behind)


def launch(hypotheses: Hypotheses, drafts: Tensor, num_sampled: Tensor, last_sampled: Tensor, offset: Tensor) -> Match:
    reqs, num_hypotheses = hypotheses.accepted.shape
    out = Match(*(torch.empty(reqs, dtype=torch.int64, device=drafts.device) for _ in range(2)))
    if reqs == 0:
        return out
    require_packed(**hypotheses._asdict(), drafts=drafts, num_sampled=num_sampled, offset=offset)
    _match_kernel[(reqs,)](
        hypotheses.accepted,
        hypotheses.accepted.stride(0),
        hypotheses.token,
        hypotheses.token.stride(0),
        drafts,
        drafts.stride(0),
        num_sampled,
        last_sampled,
        last_sampled.stride(0),
        offset,
        *out,
        NUM_HYPOTHESES=num_hypotheses,
        DRAFTS=drafts.shape[1],
        TILE=triton.next_power_of_2(num_hypotheses),
        NONE=NONE,
        num_warps=1,
    )
    return out


@triton.jit
def _match_kernel(
    accepted,
    accepted_stride,
    token,
    token_stride,
    drafts,
    drafts_stride,
    num_sampled,
    last_sampled,
    last_sampled_stride,
    offset,
    out_which,
    out_offset,
    NUM_HYPOTHESES: tl.constexpr,
    DRAFTS: tl.constexpr,
    TILE: tl.constexpr,
    NONE: tl.constexpr,
):
    """One program for each request."""
    req = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, TILE)
    real = h < NUM_HYPOTHESES
    a = tl.load(accepted + req * accepted_stride + h, mask=real, other=NONE)  # [H]
    c = tl.load(token + req * token_stride + h, mask=real, other=0)
    sampled = tl.load(num_sampled + req).to(tl.int64)
    bonus = tl.load(last_sampled + req * last_sampled_stride).to(tl.int64)
    inside = real & (a >= 0) & (a < DRAFTS)
    drafted = tl.load(drafts + req * drafts_stride + a, mask=inside, other=-1).to(tl.int64)
    true_token = tl.where(a == sampled - 1, bonus, drafted)
    named = (a >= 0) & (a < sampled) & (true_token == c)
    usable = real & (named | (a == -1)) & (sampled > 0)
    newest = tl.max(tl.where(usable, a, NONE), 0)
    which = tl.min(tl.where(usable & (a == newest), h, TILE), 0)
    found = newest > NONE
    old = tl.load(offset + req).to(tl.int64)
    tl.store(out_which + req, tl.where(found, which, -1))
    tl.store(out_offset + req, tl.where(found, sampled - 1 - newest, old + sampled))
