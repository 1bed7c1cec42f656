# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""`choose` and `match` of hypotheses.py on the device: one program per request, everything in registers.

A gather is a sum over a one-hot mask here, and every sum takes only what lies inside the request's own shape, so what
stands in padding, NaN included, reaches nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vllm_orthrus.kernels.packed import require_packed


def launch_choose(
    outcome: Tensor,
    bonus: Tensor,
    candidates: Tensor,
    drafts: Tensor,
    anchors: Tensor,
    offset: Tensor,
    values: Tensor,
    out_accepted: Tensor,
    out_token: Tensor,
) -> None:
    reqs, places, ranks = bonus.shape
    if reqs == 0:
        return
    require_packed(drafts=drafts, offset=offset, values=values, accepted=out_accepted, token=out_token)
    _choose[(reqs,)](
        outcome.contiguous(),
        bonus.contiguous(),
        candidates.contiguous(),
        drafts,
        drafts.stride(0),
        anchors,
        anchors.stride(0),
        offset,
        values,
        out_accepted,
        out_accepted.stride(0),
        out_token,
        out_token.stride(0),
        COUNT=out_accepted.shape[1],
        VALUES=len(values),
        PLACES=places,
        RANKS=ranks,
        PLACES_TILE=triton.next_power_of_2(places),
        RANKS_TILE=triton.next_power_of_2(ranks),
        num_warps=1,
    )


def launch_match(
    accepted: Tensor,
    token: Tensor,
    drafts: Tensor,
    num_sampled: Tensor,
    last_sampled: Tensor,
    offset: Tensor,
    out_index: Tensor,
    out_offset: Tensor,
) -> None:
    reqs, count = accepted.shape
    if reqs == 0:
        return
    require_packed(accepted=accepted, token=token, drafts=drafts, num_sampled=num_sampled, offset=offset)
    require_packed(out_index=out_index, out_offset=out_offset)
    _match[(reqs,)](
        accepted,
        accepted.stride(0),
        token,
        token.stride(0),
        drafts,
        drafts.stride(0),
        num_sampled,
        last_sampled,
        last_sampled.stride(0),
        offset,
        out_index,
        out_offset,
        COUNT=count,
        DRAFTS=drafts.shape[1],
        TILE=triton.next_power_of_2(count),
        num_warps=1,
    )


@triton.jit
def _positive(x):
    return tl.where(x > 0, x, 0.0)  # drops NaN, too


@triton.jit
def _choose(
    outcome,
    bonus,
    candidates,
    drafts,
    drafts_stride,
    anchors,
    anchors_stride,
    offset,
    values,
    out_accepted,
    out_accepted_stride,
    out_token,
    out_token_stride,
    COUNT: tl.constexpr,
    VALUES: tl.constexpr,
    PLACES: tl.constexpr,
    RANKS: tl.constexpr,
    PLACES_TILE: tl.constexpr,
    RANKS_TILE: tl.constexpr,
):
    req = tl.program_id(0).to(tl.int64)
    a = tl.arange(0, PLACES_TILE)
    rank = tl.arange(0, RANKS_TILE)
    real = a < PLACES
    pair_at = a[:, None] * RANKS + rank[None, :]  # [A, C]
    real_pair = real[:, None] & (rank[None, :] < RANKS)

    uncovered = tl.load(outcome + req * PLACES + a, mask=real, other=0.0)  # [A] P(a)
    pairs = tl.load(bonus + req * PLACES * RANKS + pair_at, mask=real_pair, other=0.0)
    pairs = tl.where(real_pair, uncovered[:, None] * pairs, 0.0)  # [A, C] P(a, c), 0 once chosen
    # V of a block that stands at place j = 0..K (the anchor, d1, ..), after outcome a
    distance = a[None, :] - a[:, None] + 1  # [A (j), A (a)]
    anchored = tl.load(values + tl.minimum(tl.maximum(distance, 0), VALUES - 1))
    anchored = tl.where((distance > 0) & real[:, None] & real[None, :], anchored, 0.0)
    at_hand = tl.load(offset + req).to(tl.int32) + 1 + a
    tail = tl.load(values + tl.minimum(tl.maximum(at_hand, 0), VALUES - 1))  # [A] V of the newest usable block
    exact_value = tl.load(values)
    anchor = tl.load(anchors + req * anchors_stride)

    for slot in range(COUNT):
        better = tl.maximum(anchored - tail[None, :], 0.0)
        tail_gain = tl.sum(_positive(uncovered[None, :] * better), 1)  # [A (j)]
        exact_gain = tl.reshape(_positive(pairs * (exact_value - tail)[:, None]), (PLACES_TILE * RANKS_TILE,))
        place = tl.argmax(tail_gain, 0)
        best_tail = tl.max(tail_gain, 0)
        flat = tl.argmax(exact_gain, 0)
        best_exact = tl.max(exact_gain, 0)
        after = flat // RANKS_TILE
        ranked = flat % RANKS_TILE
        exact = best_exact > best_tail
        some = tl.maximum(best_exact, best_tail) > 0

        told = tl.load(candidates + req * PLACES * RANKS + after * RANKS + ranked)
        drafted = tl.load(drafts + req * drafts_stride + place - 1, mask=place > 0, other=0)
        token = tl.where(exact, told, tl.where(place > 0, drafted, anchor))
        where = tl.where(exact, after, place - 1)
        tl.store(out_accepted + req * out_accepted_stride + slot, tl.where(some, where, -2))
        tl.store(out_token + req * out_token_stride + slot, tl.where(some, token, 0))

        taken = (a[:, None] == tl.where(exact, after, -1)) & (rank[None, :] == ranked)  # [A, C]
        uncovered = tl.maximum(uncovered - tl.sum(tl.where(taken, pairs, 0.0), 1), 0.0)
        pairs = tl.where(taken, 0.0, pairs)
        chosen_row = tl.sum(tl.where(a[:, None] == place, anchored, 0.0), 0)  # [A (a)]
        tail = tl.where(exact, tail, tl.maximum(tail, chosen_row))


@triton.jit
def _match(
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
    out_index,
    out_offset,
    COUNT: tl.constexpr,
    DRAFTS: tl.constexpr,
    TILE: tl.constexpr,
):
    req = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, TILE)
    real = h < COUNT
    where = tl.load(accepted + req * accepted_stride + h, mask=real, other=-2)  # [H] a
    guessed = tl.load(token + req * token_stride + h, mask=real, other=0)
    sampled = tl.load(num_sampled + req).to(tl.int64)
    bonus = tl.load(last_sampled + req * last_sampled_stride).to(tl.int64)
    inside = real & (where >= 0) & (where < DRAFTS)
    drafted = tl.load(drafts + req * drafts_stride + where, mask=inside, other=-1).to(tl.int64)
    true_token = tl.where(where == sampled - 1, bonus, drafted)
    told = (where >= 0) & (where < sampled) & (true_token == guessed)
    usable = real & (told | (where == -1)) & (sampled > 0)
    newest = tl.max(tl.where(usable, where, -2), 0)
    index = tl.min(tl.where(usable & (where == newest), h, TILE), 0)
    found = newest > -2
    old = tl.load(offset + req).to(tl.int64)
    tl.store(out_index + req, tl.where(found, index, -1))
    tl.store(out_offset + req, tl.where(found, sampled - 1 - newest, old + sampled))
