# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Choose the hypotheses that a verification carries, in one launch. hypotheses.py says what a set of them is worth.

    gain of a block that knows the bonus    P(a) * P(c | a) * (V(0) - tail_a)
    gain of a block at place j              sum_a uncovered_a * max(V(a - j + 1) - tail_a, 0)

tail_a is V at the smallest usable offset after outcome a, so far, and uncovered_a is P(a) without the bonuses that have
their exact block. The greatest gain is taken, both are brought up to date, and so on. One program does one request with
everything in registers. It gathers by summing over a one-hot mask, and every sum is limited to the request's own shape:
what stands in padding has no effect, even if it is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_orthrus.kernels.forms import runs_triton
from vllm_orthrus.kernels.hypotheses import NONE, Hypotheses
from vllm_orthrus.kernels.packed import require_packed


def choose_hypotheses(
    outcome: Tensor,  # [R, K+1] P(exactly a drafts accepted), 0 beyond a request's own drafts
    bonus: Tensor,  # [R, K+1, C] P(c | a) of the candidates
    candidates: Tensor,  # [R, K+1, C], never the draft itself
    drafts: Tensor,  # [R, K]
    anchors: Tensor,  # [R]
    offset: Tensor,  # [R] row of the block at hand that gave the first draft
    values: Tensor,  # [O] V, never rising
    num_hypotheses: int,
) -> Hypotheses:
    """So many hypotheses for each request. Requests whose chances are NaN or zero get no blocks."""
    form = launch if runs_triton(drafts.device) else naive
    return form(outcome, bonus, candidates, drafts, anchors, offset, values, num_hypotheses)


def naive(
    outcome: Tensor,
    bonus: Tensor,
    candidates: Tensor,
    drafts: Tensor,
    anchors: Tensor,
    offset: Tensor,
    values: Tensor,
    num_hypotheses: int,
) -> Hypotheses:
    reqs, places = outcome.shape  # R, K+1
    ranks = bonus.shape[2]
    a = torch.arange(places, device=outcome.device)
    # Place j = 0..K is the anchor, d1, .., dK. The block standing there is hypothesis (j - 1, .), usable where a >= j.
    distance = a - a[:, None] + 1  # [K+1 (j), K+1 (a)] its offset after outcome a
    anchored = torch.where(distance > 0, _value(values, distance), 0)
    tokens = torch.cat((anchors[:, None], drafts), dim=1)  # [R, K+1]
    uncovered = outcome  # [R, K+1]
    pairs = outcome[..., None] * bonus  # [R, K+1, C] P(a, c), 0 once chosen
    tail = _value(values, offset[:, None] + 1 + a)  # [R, K+1] at first that of the block at hand

    accepted, token = [], []
    for _ in range(num_hypotheses):
        tail_gain = _positive(uncovered[:, None] * (anchored - tail[:, None]).clamp(min=0)).sum(2)  # [R, K+1 (j)]
        exact_gain = _positive(pairs * (values[0] - tail)[..., None]).flatten(1)  # [R, (K+1) * C]
        place, pair = tail_gain.argmax(1, keepdim=True), exact_gain.argmax(1, keepdim=True)  # [R, 1]
        best_tail, best_exact = tail_gain.gather(1, place), exact_gain.gather(1, pair)
        exact = best_exact > best_tail
        gains = torch.maximum(best_exact, best_tail) > 0
        accepted.append(torch.where(gains, torch.where(exact, pair // ranks, place - 1), NONE))
        chosen = torch.where(exact, candidates.flatten(1).gather(1, pair), tokens.gather(1, place))
        token.append(torch.where(gains, chosen, 0))

        taken = exact & (torch.arange(places * ranks, device=a.device) == pair)  # [R, (K+1) * C]
        taken = taken.view(reqs, places, ranks)
        uncovered = (uncovered - torch.where(taken, pairs, 0).sum(2)).clamp(min=0)
        pairs = torch.where(taken, 0, pairs)
        tail = torch.where(exact, tail, torch.maximum(tail, anchored[place[:, 0]]))
    return Hypotheses(torch.cat(accepted, 1), torch.cat(token, 1))


def _value(values: Tensor, offset: Tensor) -> Tensor:
    return values[offset.clamp(0, len(values) - 1)]


def _positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0)  # drops NaN, too


def launch(
    outcome: Tensor,
    bonus: Tensor,
    candidates: Tensor,
    drafts: Tensor,
    anchors: Tensor,
    offset: Tensor,
    values: Tensor,
    num_hypotheses: int,
) -> Hypotheses:
    reqs, places, ranks = bonus.shape
    out = Hypotheses(*(torch.empty(reqs, num_hypotheses, dtype=torch.int64, device=drafts.device) for _ in range(2)))
    if reqs == 0:
        return out
    require_packed(drafts=drafts, offset=offset, values=values)
    _choose_kernel[(reqs,)](
        outcome.contiguous(),
        bonus.contiguous(),
        candidates.contiguous(),
        drafts,
        drafts.stride(0),
        anchors,
        anchors.stride(0),
        offset,
        values,
        *out,
        NUM_HYPOTHESES=num_hypotheses,
        VALUES=len(values),
        PLACES=places,
        RANKS=ranks,
        PLACES_TILE=triton.next_power_of_2(places),
        RANKS_TILE=triton.next_power_of_2(ranks),
        NONE=NONE,
        num_warps=1,
    )
    return out


@triton.jit
def _choose_kernel(
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
    out_token,
    NUM_HYPOTHESES: tl.constexpr,
    VALUES: tl.constexpr,
    PLACES: tl.constexpr,
    RANKS: tl.constexpr,
    PLACES_TILE: tl.constexpr,
    RANKS_TILE: tl.constexpr,
    NONE: tl.constexpr,
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

    for slot in range(NUM_HYPOTHESES):
        better = tl.maximum(anchored - tail[None, :], 0.0)
        tail_gain = tl.sum(_above_zero(uncovered[None, :] * better), 1)  # [A (j)]
        exact_gain = tl.reshape(_above_zero(pairs * (exact_value - tail)[:, None]), (PLACES_TILE * RANKS_TILE,))
        place = tl.argmax(tail_gain, 0)
        best_tail = tl.max(tail_gain, 0)
        flat = tl.argmax(exact_gain, 0)
        best_exact = tl.max(exact_gain, 0)
        after = flat // RANKS_TILE
        ranked = flat % RANKS_TILE
        exact = best_exact > best_tail
        gains = tl.maximum(best_exact, best_tail) > 0

        candidate = tl.load(candidates + req * PLACES * RANKS + after * RANKS + ranked)
        drafted = tl.load(drafts + req * drafts_stride + place - 1, mask=place > 0, other=0)
        token = tl.where(exact, candidate, tl.where(place > 0, drafted, anchor))
        accepted = tl.where(exact, after, place - 1)
        tl.store(out_accepted + req * NUM_HYPOTHESES + slot, tl.where(gains, accepted, NONE))
        tl.store(out_token + req * NUM_HYPOTHESES + slot, tl.where(gains, token, 0))

        taken = (a[:, None] == tl.where(exact, after, -1)) & (rank[None, :] == ranked)  # [A, C]
        uncovered = tl.maximum(uncovered - tl.sum(tl.where(taken, pairs, 0.0), 1), 0.0)
        pairs = tl.where(taken, 0.0, pairs)
        chosen_row = tl.sum(tl.where(a[:, None] == place, anchored, 0.0), 0)  # [A (a)]
        tail = tl.where(exact, tail, tl.maximum(tail, chosen_row))


@triton.jit
def _above_zero(x):
    return tl.where(x > 0, x, 0.0)  # drops NaN, too
