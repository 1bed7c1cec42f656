"""Which draft blocks a verification carries, and which of them its outcome makes useful.

A request's known anchor stands at position p, its drafts d1..dn behind it. A **hypothesis** (a, c) says "position p+a+1
holds token c" and stands for the block [c, MASK, ...] at p+a+1 with the prefix p+a+1:

    (-1, anchor)       the exact block of the known anchor
    (a, d_{a+1})       the block of a draft: useful once more than a drafts were accepted
    (a, c)             the exact block after the outcome "a drafts accepted, then bonus c"

After the outcome "a* accepted, bonus b" every hypothesis that names a token which really stands there is usable; its
rows from offset = a* - a on predict what follows b. Offset 0 is a **hit**: the very rows of a separate draft pass.
Blocks with a larger offset didn't know the bonus; what is left of them is a **tail**. The newest usable block is taken,
and if there is none, the block that the drafts came from stays at hand. With P(a) the chance that exactly a drafts are
accepted, P(c | a) that of the bonus and V(offset) the worth of drafting from such a row on, a set of blocks is worth

    sum_a P(a) * (covered_a * V(0) + (1 - covered_a) * V(smallest usable offset after a)),   covered_a = sum of P(c | a)

A choice takes one hypothesis of greatest gain after another, and a match finds the newest usable one. Here both are
plain functions; choose.py and take_up.py have them in kernels, with all that surrounds them in a step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NONE = -2  # in Hypotheses.accepted: no block


class Hypotheses(NamedTuple):
    """Blocks in the order of choice: [token, MASK, ...] at p + accepted + 1, behind everything before it."""

    accepted: Tensor  # [R, H] int64; -1: the known anchor's block; NONE: no block
    token: Tensor  # [R, H] int64


def count_covered(hypotheses: Hypotheses, drafts: Tensor, real: Tensor, accepted: Tensor) -> Tensor:
    """[R] bool: some hypothesis was an exact block after `accepted` [R] of the `real` [R] drafts [R, K].

    Tells the two kinds of miss apart: no exact block after so many drafts, or only such for another bonus. The block of
    the very draft that was rejected is not an exact block.
    """
    at = accepted.clamp(0, drafts.shape[1] - 1)[:, None]
    other = (hypotheses.token != drafts.gather(1, at)) | (accepted >= real)[:, None]
    return ((hypotheses.accepted == accepted[:, None]) & other).any(1)


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
    """The usable one of largest a, and of those the first. Where nothing was sampled, the offset stays.

    usable    a = -1, or a < a* and c = d_{a+1}, or a = a* and c = b      after the outcome "a* accepted, bonus b"
    offset    a* - a; where none is usable, a* + 1 rows further on in the block at hand
    """
    accepted = num_sampled[:, None] - 1  # [R, 1] a*
    true_token = drafts.gather(1, hypotheses.accepted.clamp(0, drafts.shape[1] - 1))  # [R, H] where a < a*
    true_token = torch.where(hypotheses.accepted == accepted, last_sampled[:, None], true_token)
    named = (hypotheses.accepted >= 0) & (hypotheses.accepted <= accepted) & (true_token == hypotheses.token)
    usable = (named | (hypotheses.accepted == -1)) & (accepted >= 0)
    newest, which = torch.where(usable, hypotheses.accepted, NONE).max(1)
    found = newest > NONE
    behind = torch.where(found, num_sampled - 1 - newest, offset + num_sampled)
    return Match(torch.where(found, which, -1), behind)


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
    """So many hypotheses for each request. Requests whose chances are NaN or zero get no blocks.

    gain of a block that knows the bonus    P(a) * P(c | a) * (V(0) - tail_a)
    gain of a block at place j              sum_a uncovered_a * max(V(a - j + 1) - tail_a, 0)

    tail_a is V at the smallest usable offset after outcome a, so far, and uncovered_a is P(a) without the bonuses that
    have their exact block. The greatest gain is taken, both are brought up to date, and so on.
    """
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
