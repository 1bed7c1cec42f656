# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Keep the block that has come to hand, and pick the rows of it that draft next, in one launch.

    kept[place]    = hidden[req, which]                        where a hypothesis came true; else it stays
    picked[req, i] = kept[place, min(offset + i, block - 1)]    i = 0..K: the rows of K drafts, and the one behind them

Picked rows come in the order in which their logits are wanted: all that draft, request by request, and behind those the
last of each request, which only says what the bonus might be. So the logits that draft are rows side by side.
Rows are hidden states, or logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_orthrus.kernels.forms import runs_triton
from vllm_orthrus.kernels.packed import require_contiguous, require_packed


def take_rows(
    hidden: Tensor,  # [n, H, block, hidden] of the blocks that a forward has carried
    which: Tensor,  # [n] the one that comes to hand; -1: none
    slot: Tensor,  # [n]; -1: nobody's
    place: Tensor,  # [slots] where each slot's block is kept
    offset: Tensor,  # [slots] its row that drafts next
    kept: Tensor,  # [places, block, hidden], brought up to date
    num_drafts: int,
) -> Tensor:
    """[n * K + n, hidden]"""
    form = launch if runs_triton(hidden.device) else naive
    return form(hidden, which, slot, place, offset, kept, num_drafts)


def naive(
    hidden: Tensor, which: Tensor, slot: Tensor, place: Tensor, offset: Tensor, kept: Tensor, num_drafts: int
) -> Tensor:
    chosen = hidden[torch.arange(len(which), device=which.device), which.clamp(min=0)]  # [n, block, hidden]
    at = place[slot]
    kept[at] = torch.where((which >= 0)[:, None, None], chosen, kept[at])
    places = torch.arange(num_drafts + 1, device=which.device)
    rows = (offset[slot][:, None] + places).clamp(max=kept.shape[1] - 1)  # [n, K + 1]
    picked = kept[at[:, None], rows]
    return torch.cat((picked[:, :-1].flatten(0, 1), picked[:, -1]))


def launch(
    hidden: Tensor, which: Tensor, slot: Tensor, place: Tensor, offset: Tensor, kept: Tensor, num_drafts: int
) -> Tensor:
    num_reqs, num_hypotheses, block, size = hidden.shape
    picked = torch.empty(num_reqs * (num_drafts + 1), size, dtype=hidden.dtype, device=hidden.device)
    require_packed(which=which, place=place, offset=offset)
    require_contiguous(hidden=hidden, kept=kept)
    if num_reqs == 0:
        return picked
    tile = min(2048, triton.next_power_of_2(size))
    _take_rows_kernel[(num_reqs, max(block, num_drafts + 1), triton.cdiv(size, tile))](
        hidden,
        which,
        slot,
        slot.stride(0),
        place,
        offset,
        kept,
        picked,
        num_reqs,
        len(place) - 1,
        NUM_HYPOTHESES=num_hypotheses,
        BLOCK=block,
        DRAFTS=num_drafts,
        SIZE=size,
        TILE=tile,
        num_warps=4,
    )
    return picked


# Compiled once for all numbers of requests with as many hypotheses.
@triton.jit(do_not_specialize=["num_reqs"])
def _take_rows_kernel(
    hidden,
    which,
    slots,
    slots_stride,
    places,
    offsets,
    kept,
    picked,
    num_reqs,
    nobody,
    NUM_HYPOTHESES: tl.constexpr,
    BLOCK: tl.constexpr,
    DRAFTS: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (r, i, t) keeps a tile of row i of request r's block, and picks that of the i-th row that drafts."""
    r = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1)
    chosen = tl.load(which + r).to(tl.int64)
    slot = tl.load(slots + r * slots_stride).to(tl.int64)
    slot = tl.where(slot < 0, nobody, slot)
    fresh = hidden + (r * NUM_HYPOTHESES + tl.maximum(chosen, 0)) * BLOCK * SIZE
    old = kept + tl.load(places + slot).to(tl.int64) * BLOCK * SIZE
    found = chosen >= 0
    fresh_size, old_size = tl.where(found, SIZE, 0), tl.where(found, 0, SIZE)
    kept_size, picked_size = tl.where(found & (i < BLOCK), SIZE, 0), tl.where(i <= DRAFTS, SIZE, 0)
    row = tl.minimum(tl.load(offsets + slot).to(tl.int64) + i, BLOCK - 1)
    to = tl.where(i < DRAFTS, r * DRAFTS + i, num_reqs * DRAFTS + r).to(tl.int64)
    at = tl.program_id(2) * TILE + tl.arange(0, TILE)  # [TILE]
    # What is read of the kept block is of requests for which it stays: nobody writes it meanwhile.
    x = tl.load(fresh + i * SIZE + at, mask=at < kept_size, other=0.0)
    tl.store(old + i * SIZE + at, x, mask=at < kept_size)
    x = tl.load(fresh + row * SIZE + at, mask=at < fresh_size, other=0.0)
    y = tl.load(old + row * SIZE + at, mask=at < old_size, other=0.0)
    tl.store(picked + to * SIZE + at, tl.where(found, x, y), mask=at < picked_size)
