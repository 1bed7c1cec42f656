# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Take up the outcome of a verification: match it, count it and learn from it, in one launch.

    match    the newest hypothesis that the outcome has made useful, and the row of its block that drafts next
    count    hits, misses by cause, tokens and rows
    learn    table = table * DECAY + events of all these requests; a request's own counts likewise

hypotheses.py says when a hypothesis is useful, chances.py what is learnt. One program does all requests, of which there
are few, one after the other: the tables stand in registers, and no request's outcome changes what another's is judged
by. It gathers by summing over a one-hot mask, and counts whole numbers, so runs repeat.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_orthrus.kernels import chances
from vllm_orthrus.kernels.buckets import bucket_of
from vllm_orthrus.kernels.forms import REGISTERS, runs_triton
from vllm_orthrus.kernels.hypotheses import NONE, Hypotheses, count_covered, match_outcome
from vllm_orthrus.kernels.packed import require_contiguous, require_packed
from vllm_orthrus.kernels.slots import Slots, require_contiguous_slots

COUNTERS = ("verifications", "hits", "accepted_count_missed", "bonus_missed", "tokens", "rows")


class Outcome(NamedTuple):
    """Of a verification. Rows of a graph that no request fills have slot -1 and have sampled nothing."""

    slot: Tensor  # [n]
    num_sampled: Tensor  # [n], accepted drafts plus the bonus
    num_rejected: Tensor  # [n]
    bonus: Tensor  # [n]


def take_up(
    outcome: Outcome,
    prefix_lengths: Tensor,  # [n, H] of the blocks that the verification carried; negative: none
    slots: Slots,  # brought up to date: offset, history, calibration
    counters: Tensor,  # [len(COUNTERS)] int64, added to
    block: int,  # rows of a block
) -> Tensor:
    """[n] int64, the hypothesis whose block comes to hand; -1: none, the one before stays."""
    form = launch if runs_triton(counters.device) else naive
    return form(outcome, prefix_lengths, slots, counters, block)


def naive(outcome: Outcome, prefix_lengths: Tensor, slots: Slots, counters: Tensor, block: int) -> Tensor:
    slot, num_sampled = outcome.slot, outcome.num_sampled
    num_hypotheses = prefix_lengths.shape[1]
    accepted = torch.where(prefix_lengths >= 0, slots.hypotheses.accepted[slot, :num_hypotheses], NONE)
    hypotheses = Hypotheses(accepted, slots.hypotheses.token[slot, :num_hypotheses])
    drafts = chances.Drafts(*(part[slot] for part in slots.drafts))
    # The scheduler may have dropped some, at the context limit or for a grammar: those were not judged.
    drafts = drafts._replace(real=torch.minimum(drafts.real, num_sampled + outcome.num_rejected - 1))
    match = match_outcome(hypotheses, drafts.tokens, num_sampled, outcome.bonus, slots.offset[slot])
    slots.offset[slot] = match.offset

    hit = (match.which >= 0) & (match.offset == 0)
    covered = count_covered(hypotheses, drafts.tokens, drafts.real, num_sampled - 1)
    rows = num_sampled + outcome.num_rejected + block * num_hypotheses
    counted = (torch.ones_like(hit), hit, ~hit & ~covered, ~hit & covered, num_sampled, rows)  # as in COUNTERS
    counters += (torch.stack([part.long() for part in counted]) * (num_sampled > 0)).sum(1)

    history = chances.History(*(part[slot] for part in slots.history))
    calibration, history = chances.update_calibration(
        slots.calibration, history, drafts, slots.sampled[slot], num_sampled, outcome.bonus
    )
    for part, new in zip(slots.calibration, calibration, strict=True):
        part.copy_(new)
    for part, new in zip(slots.history, history, strict=True):
        part[slot] = new
    return match.which


def launch(outcome: Outcome, prefix_lengths: Tensor, slots: Slots, counters: Tensor, block: int) -> Tensor:
    num_reqs, num_hypotheses = prefix_lengths.shape
    which = torch.empty(num_reqs, dtype=torch.int64, device=counters.device)
    require_packed(num_sampled=outcome.num_sampled, num_rejected=outcome.num_rejected)
    require_contiguous(prefix_lengths=prefix_lengths, counters=counters)
    require_contiguous_slots(slots)
    drafts, ranks = slots.drafts.tokens.shape[1], slots.drafts.share.shape[2]
    place_cells, rank_cells = (tables.numel() for tables in (slots.calibration.tried, slots.calibration.came))
    _take_up_kernel[(1,)](
        num_reqs,
        outcome,
        outcome.slot.stride(0),
        outcome.bonus.stride(0),
        prefix_lengths,
        slots.offset,
        slots.sampled,
        slots.hypotheses,
        slots.drafts,
        slots.history,
        slots.calibration,
        chances.edges_on(counters.device),
        counters,
        which,
        BLOCK=block,
        NUM_HYPOTHESES=num_hypotheses,
        REMEMBERED=slots.hypotheses.accepted.shape[1],
        HYPOTHESES_TILE=triton.next_power_of_2(num_hypotheses),
        DRAFTS=drafts,
        DRAFTS_TILE=triton.next_power_of_2(drafts),
        RANKS=ranks,
        RANKS_TILE=triton.next_power_of_2(ranks),
        EDGES=len(chances.EDGES),
        KINDS=chances.KINDS,
        PLACE_CELLS=place_cells,
        PLACE_CELLS_TILE=triton.next_power_of_2(place_cells),
        RANK_CELLS=rank_cells,
        RANK_CELLS_TILE=triton.next_power_of_2(rank_cells),
        PRIOR=chances.PRIOR,
        DECAY=chances.DECAY,
        REQUEST_DECAY=chances.REQUEST_DECAY,
        NONE=NONE,
        num_warps=4,
        **REGISTERS,
    )
    return which


# Compiled once for all numbers of requests with as many hypotheses.
@triton.jit(do_not_specialize=["num_reqs"])
def _take_up_kernel(
    num_reqs,
    outcome,
    slot_stride,
    bonus_stride,
    prefix_lengths,
    offsets,
    sampled_slots,
    hypotheses,
    drafts,
    history,
    calibration,
    edges,
    counters,
    out_which,
    BLOCK: tl.constexpr,
    NUM_HYPOTHESES: tl.constexpr,
    REMEMBERED: tl.constexpr,
    HYPOTHESES_TILE: tl.constexpr,
    DRAFTS: tl.constexpr,
    DRAFTS_TILE: tl.constexpr,
    RANKS: tl.constexpr,
    RANKS_TILE: tl.constexpr,
    EDGES: tl.constexpr,
    KINDS: tl.constexpr,
    PLACE_CELLS: tl.constexpr,
    PLACE_CELLS_TILE: tl.constexpr,
    RANK_CELLS: tl.constexpr,
    RANK_CELLS_TILE: tl.constexpr,
    PRIOR: tl.constexpr,
    DECAY: tl.constexpr,
    REQUEST_DECAY: tl.constexpr,
    NONE: tl.constexpr,
):
    h = tl.arange(0, HYPOTHESES_TILE)
    d = tl.arange(0, DRAFTS_TILE)
    rank = tl.arange(0, RANKS_TILE)
    place_cell = tl.arange(0, PLACE_CELLS_TILE)
    rank_cell = tl.arange(0, RANK_CELLS_TILE)
    tried = tl.load(calibration.tried + place_cell, mask=place_cell < PLACE_CELLS, other=0.0)
    accepted = tl.load(calibration.accepted + place_cell, mask=place_cell < PLACE_CELLS, other=0.0)
    new_tried = tl.zeros([PLACE_CELLS_TILE], tl.float32)
    new_accepted = tl.zeros([PLACE_CELLS_TILE], tl.float32)
    new_offered = tl.zeros([RANK_CELLS_TILE], tl.float32)
    new_came = tl.zeros([RANK_CELLS_TILE], tl.float32)
    verifications = tl.load(counters)
    hits = tl.load(counters + 1)
    count_missed = tl.load(counters + 2)
    bonus_missed = tl.load(counters + 3)
    tokens = tl.load(counters + 4)
    rows = tl.load(counters + 5)

    for r in range(num_reqs):
        slot = tl.load(outcome.slot + r * slot_stride).to(tl.int64)
        num_sampled = tl.load(outcome.num_sampled + r).to(tl.int64)
        verified = num_sampled + tl.load(outcome.num_rejected + r).to(tl.int64)
        bonus = tl.load(outcome.bonus + r * bonus_stride).to(tl.int64)
        live = (slot >= 0) & (num_sampled > 0)
        slot = tl.where(live, slot, 0)
        kept = num_sampled - 1
        real = tl.minimum(tl.load(drafts.real + slot), verified - 1)  # the scheduler may have dropped some

        # Match
        carried = h < tl.where(live, NUM_HYPOTHESES, 0)
        prefix = tl.load(prefix_lengths + r * NUM_HYPOTHESES + h, mask=carried, other=-1)
        exists = carried & (prefix >= 0)
        a = tl.load(hypotheses.accepted + slot * REMEMBERED + h, mask=exists, other=NONE)  # [H]
        c = tl.load(hypotheses.token + slot * REMEMBERED + h, mask=exists, other=0)
        inside = (a >= 0) & (a < DRAFTS)
        drafted = tl.load(drafts.tokens + slot * DRAFTS + a, mask=inside, other=-1)
        named = (a >= 0) & (a <= kept) & (tl.where(a == kept, bonus, drafted) == c)
        usable = exists & (named | (a == -1))
        newest = tl.max(tl.where(usable, a, NONE), 0)
        which = tl.min(tl.where(usable & (a == newest), h, HYPOTHESES_TILE), 0)
        found = newest > NONE
        offset = tl.where(found, kept - newest, tl.load(offsets + slot) + num_sampled)
        tl.store(offsets + slot, offset, mask=live)
        tl.store(out_which + r, tl.where(found, which, -1).to(tl.int64))

        # Count
        judged_last = tl.load(drafts.tokens + slot * DRAFTS + tl.minimum(tl.maximum(kept, 0), DRAFTS - 1))
        exact = exists & (a == kept) & (c != tl.where(kept < real, judged_last, -1))
        covered = tl.max(exact.to(tl.int32), 0) > 0
        hit = found & (offset == 0)
        verifications += live.to(tl.int64)
        hits += (live & hit).to(tl.int64)
        count_missed += (live & (hit == 0) & (covered == 0)).to(tl.int64)
        bonus_missed += (live & (hit == 0) & covered).to(tl.int64)
        tokens += tl.where(live, num_sampled, 0)
        rows += tl.where(live, verified + BLOCK * NUM_HYPOTHESES, 0)

        # Learn of the drafts
        learnt = live & (real > 0)
        warm = tl.load(sampled_slots + slot).to(tl.int32)
        tail = (tl.load(drafts.offset + slot) > 0).to(tl.int32)
        confidence = tl.load(drafts.confidence + slot * DRAFTS + d, mask=d < DRAFTS, other=0.0)
        kind = 2 * tail + (d > 0).to(tl.int32)
        cell = (warm * KINDS + kind) * (EDGES + 1) + bucket_of(confidence, edges, EDGES)  # [D]
        judged = d < tl.where(learnt, tl.minimum(real, num_sampled), 0)
        rejected = judged & (d == kept)
        own = cell[:, None] == place_cell[None, :]  # [D, CELLS]
        was_tried = tl.sum(tl.where(own, tried[None, :], 0.0), 1)
        was_accepted = tl.sum(tl.where(own, accepted[None, :], 0.0), 1)
        chance = (was_accepted + PRIOR * confidence) / (was_tried + PRIOR)
        expected = tl.sum(tl.where(judged, 1 - chance, 0.0), 0)
        seen = tl.sum(rejected.to(tl.float32), 0)
        tl.store(history.seen + slot, tl.load(history.seen + slot) * REQUEST_DECAY + seen, mask=learnt)
        tl.store(history.expected + slot, tl.load(history.expected + slot) * REQUEST_DECAY + expected, mask=learnt)
        new_tried += tl.sum((own & judged[:, None]).to(tl.float32), 0)
        new_accepted += tl.sum((own & (judged & (rejected == 0))[:, None]).to(tl.float32), 0)

        # Learn of the candidates for the bonus
        at = (slot * (DRAFTS + 1) + tl.minimum(tl.maximum(kept, 0), DRAFTS)) * RANKS + rank
        share = tl.load(drafts.share + at, mask=rank < RANKS, other=0.0)
        candidate = tl.load(drafts.candidates + at, mask=rank < RANKS, other=-1)
        ranked = (warm * RANKS + rank) * (EDGES + 1) + bucket_of(share, edges, EDGES)  # [C]
        offered = (rank < tl.where(learnt, RANKS, 0)) & (share > 0)
        own = ranked[:, None] == rank_cell[None, :]  # [C, CELLS]
        new_offered += tl.sum((own & offered[:, None]).to(tl.float32), 0)
        new_came += tl.sum((own & (offered & (candidate == bonus))[:, None]).to(tl.float32), 0)

    real_cell = place_cell < PLACE_CELLS
    tl.store(calibration.tried + place_cell, tried * DECAY + new_tried, mask=real_cell)
    tl.store(calibration.accepted + place_cell, accepted * DECAY + new_accepted, mask=real_cell)
    real_cell = rank_cell < RANK_CELLS
    offered = tl.load(calibration.offered + rank_cell, mask=real_cell, other=0.0)
    came = tl.load(calibration.came + rank_cell, mask=real_cell, other=0.0)
    tl.store(calibration.offered + rank_cell, offered * DECAY + new_offered, mask=real_cell)
    tl.store(calibration.came + rank_cell, came * DECAY + new_came, mask=real_cell)
    tl.store(counters, verifications)
    tl.store(counters + 1, hits)
    tl.store(counters + 2, count_missed)
    tl.store(counters + 3, bonus_missed)
    tl.store(counters + 4, tokens)
    tl.store(counters + 5, rows)
