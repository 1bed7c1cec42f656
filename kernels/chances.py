"""How likely each outcome of a verification is, learnt while serving.

A draft carries its own probability, its confidence. A head is surer, or less sure, than it is right, and more so on
rows that didn't know the bonus. What counts is how often drafts of such a confidence were accepted so far:

    accept chance = (accepted + m * confidence) / (tried + m)    per kind of place and bucket of confidence
    bonus chance  = (came + m * share) / (tried + m)             per rank of the candidate and bucket of its share

Greedy and sampled requests are counted apart. A request whose drafts are rejected more, or less, often than that has
its chances of rejection multiplied by (seen rejections + n) / (expected rejections + n). From these follow P(exactly a
accepted) and P(bonus c | a), which is what the choice of hypotheses goes by.

These are the formulas, as functions of small tensors of fixed shape. choose.py and take_up.py have them in kernels.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_orthrus.kernels.most_probable import Probable

# Upper ends of the buckets for confidences and shares; the last bucket is open. Finer near 1, where one bucket's width
# decides whether twenty drafts in a row are likely.
EDGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.997)
KINDS = 4  # first draft and later ones, of blocks that knew the bonus and of tails
CANDIDATES = 8
LOOKED_AT = CANDIDATES + 1  # likeliest tokens of a row: one more, as the draft is no candidate
PRIOR = 8.0  # observations that a draft's own probability is worth
REQUEST_PRIOR = 3.0  # rejections that the shared table is worth
DECAY = 0.999  # of the shared counts, per step
REQUEST_DECAY = 0.9  # of a request's own counts, per step
SUREST, LEAST = 0.995, 0.01  # no draft is certain, and none is hopeless


class Drafts(NamedTuple):
    """What is known of each request's drafts before they are verified."""

    tokens: Tensor  # [R, K]
    real: Tensor  # [R] how many there are; fillers follow
    offset: Tensor  # [R] row of its block that gave the first draft: 0 if the block knew the bonus, else a tail
    confidence: Tensor  # [R, K] q(draft)
    candidates: Tensor  # [R, K+1, C] the most probable tokens at each place, without the draft itself
    share: Tensor  # [R, K+1, C] their probability, given that it isn't the draft


class Calibration(NamedTuple):
    """Decayed counts, shared by all requests. First axis: greedy, sampled."""

    tried: Tensor  # [2, KINDS, E] drafts that were judged
    accepted: Tensor  # [2, KINDS, E]
    offered: Tensor  # [2, C, E] candidates at places where a bonus came
    came: Tensor  # [2, C, E] candidates that were the bonus


class History(NamedTuple):
    """Each request's own decayed counts. A new request starts with zeros."""

    seen: Tensor  # [R] rejections
    expected: Tensor  # [R] rejections by the shared table


def new_calibration(device: torch.device | str = "cpu", candidates: int = CANDIDATES) -> Calibration:
    places, ranks = (2, KINDS, len(EDGES) + 1), (2, candidates, len(EDGES) + 1)
    tried, accepted, offered, came = (torch.zeros(size, device=device) for size in (places, places, ranks, ranks))
    return Calibration(tried, accepted, offered, came)


def new_history(num_reqs: int, device: torch.device | str = "cpu") -> History:
    return History(torch.zeros(num_reqs, device=device), torch.zeros(num_reqs, device=device))


def draft_count(offset: Tensor, num_drafts: int, drafting_rows: int) -> Tensor:
    """[R] drafts that a block still gives from row `offset` on."""
    return (drafting_rows - offset).clamp(0, num_drafts)


def block_values(block: int, drafting_rows: int, num_hypotheses: int, device: torch.device | str = "cpu") -> Tensor:
    """[block + 1] relative worth of drafting from row `offset` of a block on: V(0) = 1, falling geometrically.

    Not measured online: blocks are used at large offsets where text is easy, which makes them look good. A tail costs a
    step of weak drafts, unless nothing but tails can be had: with a single hypothesis, farsighted ones win.
    """
    offsets = torch.arange(block + 1, device=device)
    bonus_unknown = 1.0 if num_hypotheses == 1 else 0.9
    values = torch.where(offsets == 0, 1.0, bonus_unknown * 0.9**offsets)
    return torch.where(offsets < drafting_rows, values, 0)


def describe_drafts(said: Probable, tokens: Tensor, num_drafts: Tensor, offset: Tensor, block: int) -> Drafts:
    """From what the drafts' rows and the row behind them say, at the request's temperature.

    The draft itself cannot be the bonus at its place: where it is rejected, the residual max(p - q, 0) is zero on it.
    """
    places = torch.arange(said.tokens.shape[1], device=tokens.device)
    real = places[:-1] < num_drafts[:, None]
    # A row that says nothing, for its logits are no numbers, must not become a chance or a count.
    confidence = torch.where(said.confidence > 0, said.confidence, 0)
    drafted = torch.cat((torch.where(real, tokens, -1), torch.full_like(tokens[:, :1], -1)), dim=1)  # [R, K+1]
    share = torch.where(said.tokens == drafted[..., None], -1, said.probability)
    share, order = share.topk(share.shape[2] - 1, dim=-1)  # [R, K+1, C]
    found = said.tokens.gather(2, order)
    left = torch.cat((1 - torch.where(real, confidence, 0), torch.ones_like(said.probability[:, :1, 0])), dim=1)
    share = (share / left.clamp(min=1e-6)[..., None]).clamp(max=1)
    inside = (offset[:, None] + places < block) & (places <= num_drafts[:, None])  # the place has a row
    share = torch.where(inside[..., None] & (share > 0), share, 0)
    return Drafts(tokens, num_drafts, offset, confidence, found, share)


def accept_chances(calibration: Calibration, drafts: Drafts, sampled: Tensor) -> Tensor:
    """[R, K] by the shared table. sampled [R] bool: temperature above 0."""
    cell = _place_cell(drafts, sampled)
    tried, accepted = calibration.tried.flatten()[cell], calibration.accepted.flatten()[cell]
    return (accepted + PRIOR * drafts.confidence) / (tried + PRIOR)


def outcome_chances(calibration: Calibration, history: History, drafts: Drafts, sampled: Tensor) -> Tensor:
    """[R, K+1] P(exactly a drafts accepted); 0 where a exceeds the real drafts."""
    factor = (history.seen + REQUEST_PRIOR) / (history.expected + REQUEST_PRIOR)  # [R]
    chance = (1 - (1 - accept_chances(calibration, drafts, sampled)) * factor[:, None]).clamp(LEAST, SUREST)
    real = torch.arange(chance.shape[1], device=chance.device) < drafts.real[:, None]
    chance = torch.where(real, chance, 0)  # [R, K]
    one = torch.ones_like(chance[:, :1])
    return torch.cat((one, chance.cumprod(1)), dim=1) * torch.cat((1 - chance, one), dim=1)


def bonus_chances(calibration: Calibration, drafts: Drafts, sampled: Tensor) -> Tensor:
    """[R, K+1, C] P(candidate is the bonus | exactly a accepted)."""
    cell = _rank_cell(drafts.share, sampled)
    offered, came = calibration.offered.flatten()[cell], calibration.came.flatten()[cell]
    return torch.where(drafts.share > 0, (came + PRIOR * drafts.share) / (offered + PRIOR), 0)


def update_calibration(
    calibration: Calibration,
    history: History,
    drafts: Drafts,
    sampled: Tensor,
    num_sampled: Tensor,
    last_sampled: Tensor,
) -> tuple[Calibration, History]:
    """Learn from an outcome: num_sampled [R] accepted drafts plus the bonus, last_sampled [R] the bonus.

    Requests that sampled nothing, or had no draft, are left as they were.
    """
    judged = (num_sampled > 0) & (drafts.real > 0)  # [R]
    accepted = (num_sampled - 1).clamp(min=0)
    place = torch.arange(drafts.tokens.shape[1], device=accepted.device)
    tried = judged[:, None] & (place < drafts.real[:, None]) & (place <= accepted[:, None])  # [R, K]
    rejected = tried & (place == accepted[:, None])
    expected = torch.where(tried, 1 - accept_chances(calibration, drafts, sampled), 0).sum(1)
    history = History(
        torch.where(judged, history.seen * REQUEST_DECAY + rejected.sum(1), history.seen),
        torch.where(judged, history.expected * REQUEST_DECAY + expected, history.expected),
    )
    cell = _place_cell(drafts, sampled)
    at = accepted.clamp(max=drafts.share.shape[1] - 1)[:, None, None].expand(-1, 1, drafts.share.shape[2])
    share = drafts.share.gather(1, at).squeeze(1)  # [R, C] at the place where the bonus came
    candidates = drafts.candidates.gather(1, at).squeeze(1)
    offered = judged[:, None] & (share > 0)
    rank_cell = _rank_cell(share[:, None], sampled).squeeze(1)
    return Calibration(
        _count(calibration.tried, cell, tried),
        _count(calibration.accepted, cell, tried & ~rejected),
        _count(calibration.offered, rank_cell, offered),
        _count(calibration.came, rank_cell, offered & (candidates == last_sampled[:, None])),
    ), history


def _count(table: Tensor, cell: Tensor, events: Tensor) -> Tensor:
    # Whole numbers are summed first: exact in whatever order a device adds them, so runs repeat.
    fresh = torch.zeros_like(table).flatten().scatter_add(0, cell.flatten(), events.flatten().to(table.dtype))
    return table * DECAY + fresh.view_as(table)


def _place_cell(drafts: Drafts, sampled: Tensor) -> Tensor:
    """[R, K] index into a flat [2, KINDS, E] table."""
    later = torch.arange(drafts.tokens.shape[1], device=sampled.device) > 0
    kind = 2 * (drafts.offset > 0)[:, None] + later.long()
    return (sampled.long()[:, None] * KINDS + kind) * (len(EDGES) + 1) + _bucket(drafts.confidence)


def _rank_cell(share: Tensor, sampled: Tensor) -> Tensor:
    """share [R, P, C] -> index into a flat [2, C, E] table."""
    rank = torch.arange(share.shape[2], device=share.device)
    return (sampled.long()[:, None, None] * share.shape[2] + rank) * (len(EDGES) + 1) + _bucket(share)


def _bucket(x: Tensor) -> Tensor:
    return torch.bucketize(x, edges_on(x.device))


@functools.cache  # copied to a device once, not at every step
def edges_on(device: torch.device) -> Tensor:
    return torch.tensor(EDGES, device=device)
