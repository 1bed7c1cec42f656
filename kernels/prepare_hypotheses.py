# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Build the rows of the hypotheses that a verification carries, in one launch.

The verification of request r starts at its anchor's position p and holds n drafts; its slot remembers the hypotheses
(a, c) that were chosen for just this position. Each of them becomes

    block  = [c, MASK, ..., MASK] at p + a + 1, p + a + 2, ...     clamped to the context limit
    prefix = p + a + 1                                             -1 where there is no such block

What a slot remembers for another position gives no blocks, nor do hypotheses about more drafts than were scheduled.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_orthrus.kernels.forms import runs_triton
from vllm_orthrus.kernels.hypotheses import NONE
from vllm_orthrus.kernels.packed import require_contiguous, require_packed
from vllm_orthrus.kernels.slots import Remembered


class VerifyBatch(NamedTuple):
    """The requests that are about to be verified."""

    idx_mapping: Tensor  # [num_reqs], the slot of each request
    query_start_loc: Tensor  # [num_reqs + 1]
    positions: Tensor  # [num_tokens]


class HypothesisBlocks(NamedTuple):
    """The buffers that the forward reads. With room for fewer hypotheses than a slot remembers, its first."""

    input_ids: Tensor  # [capacity, num_hypotheses, width] int64
    positions: Tensor  # [capacity, num_hypotheses, width] int64
    prefix_lengths: Tensor  # [capacity, num_hypotheses] int32


def prepare_hypotheses(
    num_reqs: int,
    remembered: Remembered,
    batch: VerifyBatch,
    out: HypothesisBlocks,
    mask_token: int,
    max_model_len: int,
) -> None:
    """Fill all rows of `out`; requests beyond the first `num_reqs` have no blocks."""
    form = launch if runs_triton(out.input_ids.device) else naive
    form(num_reqs, remembered, batch, out, mask_token, max_model_len)


def naive(
    num_reqs: int,
    remembered: Remembered,
    batch: VerifyBatch,
    out: HypothesisBlocks,
    mask_token: int,
    max_model_len: int,
) -> None:
    capacity, num_hypotheses, width = out.input_ids.shape
    slot = batch.idx_mapping[:num_reqs]
    starts = batch.query_start_loc[: num_reqs + 1].long()
    anchor_position = batch.positions[starts[:-1]]  # [num_reqs]
    accepted = remembered.accepted[slot, :num_hypotheses]  # [num_reqs, H]
    current = remembered.anchor_position[slot] == anchor_position
    real = current[:, None] & (accepted != NONE) & (accepted <= (starts.diff() - 1)[:, None])
    prefix = torch.full((capacity, num_hypotheses), -1, device=accepted.device)
    prefix[:num_reqs] = torch.where(real, anchor_position[:, None] + accepted + 1, -1)
    places = prefix.clamp(min=0)[..., None] + torch.arange(width, device=prefix.device)
    out.prefix_lengths.copy_(prefix)
    out.positions.copy_(places.clamp(max=max_model_len - 1))
    out.input_ids.fill_(mask_token)
    out.input_ids[..., 0] = 0
    out.input_ids[:num_reqs, :, 0] = torch.where(real, remembered.token[slot, :num_hypotheses], 0)


def launch(
    num_reqs: int,
    remembered: Remembered,
    batch: VerifyBatch,
    out: HypothesisBlocks,
    mask_token: int,
    max_model_len: int,
) -> None:
    capacity, num_hypotheses, width = out.input_ids.shape
    require_packed(**batch._asdict())
    require_contiguous(**remembered._asdict(), **out._asdict())
    _prepare_hypotheses_kernel[(capacity,)](
        num_reqs,
        remembered.anchor_position,
        remembered.accepted,
        remembered.token,
        remembered.accepted.stride(0),
        *batch,
        *out,
        mask_token,
        max_model_len,
        NUM_HYPOTHESES=num_hypotheses,
        HYPOTHESES_TILE=triton.next_power_of_2(num_hypotheses),
        WIDTH=width,
        WIDTH_TILE=triton.next_power_of_2(width),
        NONE=NONE,
        num_warps=1,
    )


# Compiled once for all numbers of requests: they change from step to step.
@triton.jit(do_not_specialize=["num_reqs"])
def _prepare_hypotheses_kernel(
    num_reqs,
    anchor_position,
    accepted,
    token,
    slot_stride,
    idx_mapping,
    query_start_loc,
    positions,
    out_input_ids,
    out_positions,
    out_prefix_lengths,
    mask_token,
    max_model_len,
    NUM_HYPOTHESES: tl.constexpr,
    HYPOTHESES_TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    NONE: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    inside = r < num_reqs
    slot = tl.load(idx_mapping + r, mask=inside, other=0).to(tl.int64)
    start = tl.load(query_start_loc + r, mask=inside, other=0)
    num_drafts = tl.load(query_start_loc + r + 1, mask=inside, other=1) - start - 1
    p = tl.load(positions + start, mask=inside, other=0).to(tl.int64)
    remembered = tl.load(anchor_position + slot, mask=inside, other=-1)

    which = tl.arange(0, HYPOTHESES_TILE)
    held = which < tl.where(inside & (remembered == p), NUM_HYPOTHESES, 0)
    a = tl.load(accepted + slot * slot_stride + which, mask=held, other=NONE)  # [HYPOTHESES_TILE]
    real = (a != NONE) & (a <= num_drafts)
    c = tl.load(token + slot * slot_stride + which, mask=held & real, other=0)
    prefix = tl.where(real, p + a + 1, -1)
    tl.store(out_prefix_lengths + r * NUM_HYPOTHESES + which, prefix.to(tl.int32), mask=which < NUM_HYPOTHESES)

    column = tl.arange(0, WIDTH_TILE)[None, :]
    row = (r * NUM_HYPOTHESES + which[:, None]) * WIDTH + column  # [HYPOTHESES_TILE, WIDTH_TILE]
    stored = (which[:, None] < NUM_HYPOTHESES) & (column < WIDTH)
    place = tl.minimum(tl.maximum(prefix, 0)[:, None] + column, max_model_len - 1)
    tl.store(out_input_ids + row, tl.where(column == 0, c[:, None], mask_token), mask=stored)
    tl.store(out_positions + row, place, mask=stored)
