# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Choose the hypotheses that the next verification carries, and remember drafts and hypotheses, in one launch.

    describe   how many drafts there are, their confidences, and the candidates for a bonus at each place
    chances    P(exactly a accepted) and P(c | a), from the tables and from the request's own history
    choose     the hypothesis of greatest gain, again and again

chances.py and hypotheses.py say how. One program does one request with everything in registers. It gathers by summing
over a one-hot mask, and every sum is limited to the request's own shape: what stands in padding has no effect.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vllm_orthrus.kernels import chances
from vllm_orthrus.kernels.buckets import bucket_of
from vllm_orthrus.kernels.forms import runs_triton
from vllm_orthrus.kernels.hypotheses import NONE, choose_hypotheses
from vllm_orthrus.kernels.most_probable import Probable
from vllm_orthrus.kernels.packed import require_contiguous, require_packed
from vllm_orthrus.kernels.slots import Slots, require_contiguous_slots


class Drafted(NamedTuple):
    """Drafts that were just made, for R requests. Those of slot -1 are nobody's."""

    slot: Tensor  # [R]
    anchor_position: Tensor  # [R]
    anchor: Tensor  # [R]
    tokens: Tensor  # [R, K]
    temperature: Tensor  # [R]


def choose(
    drafted: Drafted,
    said: Probable,  # by the drafts' rows and the row behind them, C + 1 tokens each
    values: Tensor,  # [block + 1] V, never rising
    slots: Slots,  # brought up to date: hypotheses, drafts, sampled
    drafting_rows: int,
    block: int,
) -> None:
    """As many hypotheses as a slot remembers. Rows that say nothing call for no blocks."""
    form = launch if runs_triton(values.device) else naive
    form(drafted, said, values, slots, drafting_rows, block)


def naive(drafted: Drafted, said: Probable, values: Tensor, slots: Slots, drafting_rows: int, block: int) -> None:
    slot, tokens = drafted.slot, drafted.tokens
    offset, sampled = slots.offset[slot], drafted.temperature > 0
    real = chances.draft_count(offset, tokens.shape[1], drafting_rows)
    described = chances.describe_drafts(said, tokens, real, offset, block)
    history = chances.History(*(part[slot] for part in slots.history))
    chosen = choose_hypotheses(
        chances.outcome_chances(slots.calibration, history, described, sampled),
        chances.bonus_chances(slots.calibration, described, sampled),
        described.candidates,
        tokens,
        drafted.anchor,
        offset,
        values,
        slots.hypotheses.accepted.shape[1],
    )
    for part, new in zip(slots.drafts, described, strict=True):
        part[slot] = new
    for part, new in zip(slots.hypotheses, (drafted.anchor_position, *chosen), strict=True):
        part[slot] = new
    slots.sampled[slot] = sampled


def launch(drafted: Drafted, said: Probable, values: Tensor, slots: Slots, drafting_rows: int, block: int) -> None:
    reqs, drafts = drafted.tokens.shape
    looked_at, ranks = said.tokens.shape[2], slots.drafts.share.shape[2]
    if looked_at != ranks + 1:
        raise ValueError(
            f"{looked_at} likeliest tokens of each row for {ranks} candidates: give one more, for the draft."
        )
    if reqs == 0:
        return
    require_packed(tokens=drafted.tokens, temperature=drafted.temperature, values=values)
    require_contiguous(**said._asdict())
    require_contiguous_slots(slots)
    _choose_kernel[(reqs,)](
        drafted,
        drafted.slot.stride(0),
        drafted.anchor_position.stride(0),
        drafted.anchor.stride(0),
        drafted.tokens.stride(0),
        said,
        values,
        len(slots.offset) - 1,
        slots.offset,
        slots.sampled,
        slots.hypotheses,
        slots.drafts,
        slots.history,
        slots.calibration,
        chances.edges_on(values.device),
        DRAFTING_ROWS=drafting_rows,
        BLOCK=block,
        NUM_HYPOTHESES=slots.hypotheses.accepted.shape[1],
        VALUES=len(values),
        DRAFTS=drafts,
        RANKS=ranks,
        PLACES_TILE=triton.next_power_of_2(drafts + 1),
        RANKS_TILE=triton.next_power_of_2(ranks),
        LOOKED_AT_TILE=triton.next_power_of_2(looked_at),
        EDGES=len(chances.EDGES),
        KINDS=chances.KINDS,
        PRIOR=chances.PRIOR,
        REQUEST_PRIOR=chances.REQUEST_PRIOR,
        LEAST=chances.LEAST,
        SUREST=chances.SUREST,
        NONE=NONE,
        num_warps=1,
    )


@triton.jit
def _choose_kernel(
    drafted,
    slot_stride,
    position_stride,
    anchor_stride,
    tokens_stride,
    said,
    values,
    nobody,
    offsets,
    sampled_slots,
    hypotheses,
    drafts,
    history,
    calibration,
    edges,
    DRAFTING_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_HYPOTHESES: tl.constexpr,
    VALUES: tl.constexpr,
    DRAFTS: tl.constexpr,
    RANKS: tl.constexpr,
    PLACES_TILE: tl.constexpr,
    RANKS_TILE: tl.constexpr,
    LOOKED_AT_TILE: tl.constexpr,
    EDGES: tl.constexpr,
    KINDS: tl.constexpr,
    PRIOR: tl.constexpr,
    REQUEST_PRIOR: tl.constexpr,
    LEAST: tl.constexpr,
    SUREST: tl.constexpr,
    NONE: tl.constexpr,
):
    PLACES: tl.constexpr = DRAFTS + 1
    req = tl.program_id(0).to(tl.int64)
    slot = tl.load(drafted.slot + req * slot_stride).to(tl.int64)
    slot = tl.where(slot < 0, nobody, slot)
    warm = (tl.load(drafted.temperature + req) > 0).to(tl.int32)
    offset = tl.load(offsets + slot).to(tl.int32)
    anchor = tl.load(drafted.anchor + req * anchor_stride).to(tl.int64)
    a = tl.arange(0, PLACES_TILE)
    rank = tl.arange(0, RANKS_TILE)
    inside = a < PLACES
    ranked = inside[:, None] & (rank[None, :] < RANKS)  # [A, C]

    # Describe the drafts
    num_drafts = tl.minimum(tl.maximum(DRAFTING_ROWS - offset, 0), DRAFTS)
    real = a < num_drafts
    token = tl.load(drafted.tokens + req * tokens_stride + a, mask=a < DRAFTS, other=-1).to(tl.int64)
    confidence = _confidence(said.confidence + req * DRAFTS, a, DRAFTS)
    look = tl.arange(0, LOOKED_AT_TILE)
    row = (req * PLACES + a)[:, None] * (RANKS + 1)
    looked = tl.load(said.tokens + row + look[None, :], mask=inside[:, None] & (look[None, :] <= RANKS), other=-1)
    is_draft = (looked == token[:, None]) & real[:, None]
    at = tl.min(
        tl.where(is_draft, look[None, :], LOOKED_AT_TILE), 1
    )  # [A] the draft's own rank, which is no candidate's
    of = row + rank[None, :] + (rank[None, :] >= at[:, None]).to(tl.int32)
    candidate = tl.load(said.tokens + of, mask=ranked, other=0)
    share = tl.load(said.probability + of, mask=ranked, other=0.0)
    share = tl.where(share > 0, share, 0.0)  # drops NaN, too
    left = tl.where(real, 1 - confidence, 1.0)
    share = tl.minimum(share / tl.maximum(left, 1e-6)[:, None], 1.0)
    has_row = inside & (offset + a < BLOCK) & (a <= num_drafts)
    share = tl.where(has_row[:, None], share, 0.0)

    # The chances of outcomes
    factor = (tl.load(history.seen + slot) + REQUEST_PRIOR) / (tl.load(history.expected + slot) + REQUEST_PRIOR)
    table = (warm * KINDS + 2 * (offset > 0).to(tl.int32)) * (EDGES + 1)
    chance = _accepted(a, confidence, num_drafts, factor, table, calibration, edges, EDGES, PRIOR, LEAST, SUREST)
    before = _confidence(said.confidence + req * DRAFTS, a - 1, DRAFTS)
    before = _accepted(a - 1, before, num_drafts, factor, table, calibration, edges, EDGES, PRIOR, LEAST, SUREST)
    reached = tl.cumprod(tl.where(a > 0, before, 1.0), 0)
    uncovered = tl.where(inside, reached * (1 - chance), 0.0)  # [A] P(a)
    cell = (warm * RANKS + rank)[None, :] * (EDGES + 1) + bucket_of(share, edges, EDGES)  # [A, C]
    came = tl.load(calibration.came + cell, mask=ranked, other=0.0)
    offered = tl.load(calibration.offered + cell, mask=ranked, other=0.0)
    bonus = tl.where(share > 0, (came + PRIOR * share) / (offered + PRIOR), 0.0)

    # Remember
    tl.store(sampled_slots + slot, warm > 0)
    tl.store(hypotheses.anchor_position + slot, tl.load(drafted.anchor_position + req * position_stride).to(tl.int64))
    tl.store(drafts.real + slot, num_drafts.to(tl.int64))
    tl.store(drafts.offset + slot, offset.to(tl.int64))
    tl.store(drafts.tokens + slot * DRAFTS + a, token, mask=a < DRAFTS)
    tl.store(drafts.confidence + slot * DRAFTS + a, confidence, mask=a < DRAFTS)
    pair_at = a[:, None] * RANKS + rank[None, :]  # [A, C]
    tl.store(drafts.candidates + slot * PLACES * RANKS + pair_at, candidate, mask=ranked)
    tl.store(drafts.share + slot * PLACES * RANKS + pair_at, share, mask=ranked)

    # Choose
    pairs = tl.where(ranked, uncovered[:, None] * bonus, 0.0)  # [A, C] P(a, c), 0 once chosen
    # V of a block that stands at place j = 0..K (the anchor, d1, ..), after outcome a
    distance = a[None, :] - a[:, None] + 1  # [A (j), A (a)]
    anchored = tl.load(values + tl.minimum(tl.maximum(distance, 0), VALUES - 1))
    anchored = tl.where((distance > 0) & inside[:, None] & inside[None, :], anchored, 0.0)
    at_hand = offset + 1 + a
    tail = tl.load(values + tl.minimum(tl.maximum(at_hand, 0), VALUES - 1))  # [A] V of the newest usable block
    exact_value = tl.load(values)
    for number in range(NUM_HYPOTHESES):
        better = tl.maximum(anchored - tail[None, :], 0.0)
        tail_gain = tl.sum(_above_zero(uncovered[None, :] * better), 1)  # [A (j)]
        exact_gain = tl.reshape(_above_zero(pairs * (exact_value - tail)[:, None]), (PLACES_TILE * RANKS_TILE,))
        place = tl.argmax(tail_gain, 0)
        best_tail = tl.max(tail_gain, 0)
        flat = tl.argmax(exact_gain, 0)
        best_exact = tl.max(exact_gain, 0)
        after = flat // RANKS_TILE
        nth = flat % RANKS_TILE
        exact = best_exact > best_tail
        gains = tl.maximum(best_exact, best_tail) > 0

        taken = (a[:, None] == after) & (rank[None, :] == nth)  # [A, C]
        named = tl.sum(tl.sum(tl.where(taken, candidate, 0), 1), 0)
        standing = tl.where(place > 0, tl.sum(tl.where(a == place - 1, token, 0), 0), anchor)
        chosen = tl.where(exact, named, standing)
        accepted = tl.where(exact, after, place - 1).to(tl.int64)
        to = slot * NUM_HYPOTHESES + number
        tl.store(hypotheses.accepted + to, tl.where(gains, accepted, NONE))
        tl.store(hypotheses.token + to, tl.where(gains, chosen, 0))

        taken = (a[:, None] == tl.where(exact, after, -1)) & (rank[None, :] == nth)
        uncovered = tl.maximum(uncovered - tl.sum(tl.where(taken, pairs, 0.0), 1), 0.0)
        pairs = tl.where(taken, 0.0, pairs)
        chosen_row = tl.sum(tl.where(a[:, None] == place, anchored, 0.0), 0)  # [A (a)]
        tail = tl.where(exact, tail, tl.maximum(tail, chosen_row))


@triton.jit
def _confidence(said, place, DRAFTS: tl.constexpr):
    """Of the drafts at these places [A]; 0 where there is none, or where its row says nothing."""
    confidence = tl.load(said + place, mask=(place >= 0) & (place < DRAFTS), other=0.0)
    return tl.where(confidence > 0, confidence, 0.0)


@triton.jit
def _accepted(
    place,
    confidence,
    num_drafts,
    factor,
    table,
    calibration,
    edges,
    EDGES: tl.constexpr,
    PRIOR: tl.constexpr,
    LEAST: tl.constexpr,
    SUREST: tl.constexpr,
):
    """[A] the chance that the draft at each place is accepted; 0 where there is none."""
    cell = table + (place > 0).to(tl.int32) * (EDGES + 1) + bucket_of(confidence, edges, EDGES)
    accepted = tl.load(calibration.accepted + cell)
    tried = tl.load(calibration.tried + cell)
    chance = (accepted + PRIOR * confidence) / (tried + PRIOR)
    chance = tl.minimum(tl.maximum(1 - (1 - chance) * factor, LEAST), SUREST)
    return tl.where((place >= 0) & (place < num_drafts), chance, 0.0)


@triton.jit
def _above_zero(x):
    return tl.where(x > 0, x, 0.0)  # drops NaN, too
