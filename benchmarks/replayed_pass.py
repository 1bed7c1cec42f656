"""One pass, replayed from known blocks: what OnePass does, step by step, with widths of its own for each hypothesis."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.known_blocks import Blocks
from benchmarks.row_choice import Choice, Outlook, by_rank, drafting_rows, fill, worth
from vllm_orthrus.kernels.chances import (
    Drafts,
    History,
    accept_chances,
    block_values,
    bonus_chances,
    describe_drafts,
    new_calibration,
    new_history,
    outcome_chances,
    update_calibration,
)
from vllm_orthrus.kernels.hypotheses import NONE
from vllm_orthrus.kernels.most_probable import Probable
from vllm_orthrus.training.simulator import Step

CHANCE = 0.8  # of a draft whose predecessors were kept, before anything is known
SHARED_PRIOR, REQUEST_PRIOR = 8.0, 4.0  # drafts that it, and the shared chance, are worth
SHARED_DECAY, REQUEST_DECAY = 0.999, 0.95  # per step

# How long the text that follows an outcome is thought to be foreseen: by one chance for all places; by chances of each
# place, learnt of all requests; of each request; of each request and from what the block at hand says of those places.
# "told" knows how many drafts a whole block there will yield, which is more than can be known.
Foresight = Literal["fixed", "shared", "request", "foreseen", "told"]


class Way(NamedTuple):
    """To spend rows: on blocks of these widths, or, where there are none, on any, by gain."""

    name: str
    rows: int
    widths: tuple[int, ...] = ()
    foresight: Foresight = "fixed"

    @property
    def drafts(self) -> int:
        """Those of the widest block."""
        return min(15, max(self.widths, default=16))


class Yields:
    """G: chances of each place of blocks that knew the bonus, from the drafts that were judged there."""

    def __init__(self, reqs: int, block: int) -> None:
        self.tried, self.kept = (torch.zeros(reqs, block - 1) for _ in range(2))
        self.all_tried, self.all_kept = (torch.zeros(block - 1) for _ in range(2))

    def chances(self, rows: Tensor, own: bool) -> Tensor:
        """[R, B-1]"""
        shared = (self.all_kept + SHARED_PRIOR * CHANCE) / (self.all_tried + SHARED_PRIOR)
        if not own:
            return shared.expand(len(rows), -1)
        return (self.kept[rows] + REQUEST_PRIOR * shared) / (self.tried[rows] + REQUEST_PRIOR)

    def learn(self, rows: Tensor, drafts: Drafts, accepted: Tensor) -> None:
        place = torch.arange(drafts.tokens.shape[1])
        judged = (drafts.offset == 0)[:, None] & (place < drafts.real[:, None]) & (place <= accepted[:, None])
        kept = judged & (place < accepted[:, None])
        for mine, everyone, events in (
            (self.tried, self.all_tried, judged.float()),
            (self.kept, self.all_kept, kept.float()),
        ):
            padded = torch.zeros(len(rows), mine.shape[1])
            padded[:, : events.shape[1]] = events
            mine[rows] = mine[rows] * REQUEST_DECAY + padded
            everyone.mul_(SHARED_DECAY).add_(padded.sum(0))


def replay(blocks: Blocks, way: Way) -> list[list[Step]]:
    """Steps of each answer. All are decoded at a time, and what is learnt is shared, as in one batch of an engine."""
    reqs, block = len(blocks.answers), max(blocks.widths)
    places = torch.arange(way.drafts + 1)
    index_of = torch.zeros(block + 1, dtype=torch.long)
    index_of[list(blocks.widths)] = torch.arange(len(blocks.widths))
    whole = whole_blocks(blocks) if way.foresight == "told" else None
    first = max(way.widths, default=block)
    at, start = (torch.zeros(reqs, dtype=torch.long) for _ in range(2))  # the anchor's place; that of the block at hand
    width = torch.full((reqs,), first)
    calibration, (seen, expected), yields = new_calibration(), new_history(reqs), Yields(reqs, block)
    steps: list[list[Step]] = [[] for _ in range(reqs)]
    while True:
        rows = (at < blocks.ends).nonzero()[:, 0]
        if not len(rows):
            return steps
        offset, history = at[rows] - start[rows], History(seen[rows], expected[rows])
        drafts = draft(blocks, rows, index_of[width[rows]], start[rows], offset, width[rows], places, block)
        sampled = torch.zeros(len(rows), dtype=torch.bool)
        ahead = foresee(way.foresight, yields, rows, calibration, history, drafts, whole, at[rows], block)
        outlook = Outlook(
            outcome_chances(calibration, history, drafts, sampled),
            bonus_chances(calibration, drafts, sampled),
            drafts,
            blocks.answers[rows, at[rows]],
            width[rows],
            ahead,
        )
        chosen = by_rank(outlook, way.widths, block) if way.widths else fill(outlook, way.rows, blocks.widths)

        follows = blocks.answers[rows[:, None], at[rows, None] + 1 + places]  # [R, K+1]
        accepted = (drafts.tokens == follows[:, :-1]).long().cumprod(1).sum(1)
        bonus = follows.gather(1, accepted[:, None])[:, 0]
        behind, new_width, covered = match(chosen, follows, accepted, offset, width[rows], outlook.yields, drafts, way)
        calibration, history = update_calibration(calibration, history, drafts, sampled, accepted + 1, bonus)
        seen[rows], expected[rows] = history
        yields.learn(rows, drafts, accepted)
        at[rows] += accepted + 1
        start[rows], width[rows] = at[rows] - behind, new_width
        facts = (offset, drafts.real, accepted, behind == 0, covered)
        for row, step in zip(rows.tolist(), zip(*(fact.tolist() for fact in facts), strict=True), strict=True):
            steps[row].append(Step(*step))


def draft(
    blocks: Blocks,
    rows: Tensor,
    index: Tensor,
    start: Tensor,
    offset: Tensor,
    width: Tensor,
    places: Tensor,
    block: int,
) -> Drafts:
    at = torch.minimum(offset[:, None] + places, width[:, None] - 1)  # [R, K+1]
    tokens = blocks.tokens[index[:, None], rows[:, None], start[:, None], at].long()  # [R, K+1, C+1]
    probability = blocks.probability[index[:, None], rows[:, None], start[:, None], at]
    real = (drafting_rows(width, block) - offset).clamp(min=0, max=len(places) - 1)
    said = Probable(probability[:, :-1, 0], tokens, probability)
    drafts = describe_drafts(said, tokens[:, :-1, 0], real, offset, block)
    inside = offset[:, None] + places < width[:, None]  # a narrow block says nothing of what stands behind it
    return drafts._replace(share=torch.where(inside[..., None], drafts.share, 0))


def foresee(
    how: Foresight,
    yields: Yields,
    rows: Tensor,
    calibration: object,
    history: History,
    drafts: Drafts,
    whole: Tensor | None,
    at: Tensor,
    block: int,
) -> Tensor:
    """[R, K+1, B] G_a(n)"""
    outcomes = drafts.tokens.shape[1] + 1
    place = torch.arange(block - 1)
    if whole is not None:
        length = whole[rows[:, None], at[:, None] + 1 + torch.arange(outcomes)]  # [R, K+1]
        # One more row than is kept: what stands there names the bonus.
        chances = torch.where(place < length[..., None] + 1, 1.0, 0.02)
        gained = chances
    else:
        chances = (
            torch.full((len(rows), block - 1), CHANCE) if how == "fixed" else yields.chances(rows, how != "shared")
        )
        chances = chances[:, None].expand(-1, outcomes, -1)
        if how == "foreseen":
            factor = (history.seen + 3) / (history.expected + 3)
            sampled = torch.zeros(len(rows), dtype=torch.bool)
            said = 1 - (1 - accept_chances(calibration, drafts, sampled)) * factor[:, None]  # type: ignore[arg-type]
            where = torch.arange(outcomes)[:, None] + 1 + place  # [K+1, B-1]: the draft at hand for the same position
            known = where < drafts.real[:, None, None]
            said = said.clamp(0.01, 0.995)[:, where.clamp(max=outcomes - 2)]
            chances = torch.where(known, (chances + said) / 2, chances)
        gained = chances.cumprod(2)
    return torch.cat((torch.zeros_like(gained[..., :1]), gained.cumsum(2)), 2)


def match(
    chosen: Choice,
    follows: Tensor,
    accepted: Tensor,
    offset: Tensor,
    width: Tensor,
    yields: Tensor,
    drafts: Drafts,
    way: Way,
) -> tuple[Tensor, Tensor, Tensor]:
    """Offset and width of the block at hand behind the outcome, and if some block was exact after so many drafts.

    Of equal widths the newest usable block is the best one. Of others the one that is worth most is taken.
    """
    reqs, block = len(accepted), yields.shape[2]
    named = follows.gather(1, chosen.accepted.clamp(min=0, max=follows.shape[1] - 1)) == chosen.token
    usable = (chosen.accepted == -1) | ((chosen.accepted >= 0) & (chosen.accepted <= accepted[:, None]) & named)
    at_hand = (offset + accepted + 1)[:, None]
    offsets = torch.cat((accepted[:, None] - chosen.accepted, at_hand), 1)  # [R, H+1]
    widths = torch.cat((chosen.width, width[:, None]), 1)
    usable = torch.cat((usable, torch.ones(reqs, 1, dtype=torch.bool)), 1)
    newest = -offsets.float()
    if len(set(way.widths)) == 1:
        score = newest
    else:
        after = yields[torch.arange(reqs), accepted.clamp(max=yields.shape[1] - 1)]  # [R, B]
        each = after[:, None].expand(-1, offsets.shape[1], -1)
        score = worth(each, block_values(block, block - 1, 2), offsets.clamp(min=0), widths) + 1e-6 * newest
    best = torch.where(usable, score, float("-inf")).argmax(1, keepdim=True)
    place = accepted.clamp(max=drafts.tokens.shape[1] - 1)[:, None]
    other = (chosen.token != drafts.tokens.gather(1, place)) | (accepted >= drafts.real)[:, None]
    covered = ((chosen.accepted == accepted[:, None]) & (chosen.accepted != NONE) & other).any(1)
    return offsets.gather(1, best)[:, 0], widths.gather(1, best)[:, 0], covered


def whole_blocks(blocks: Blocks) -> Tensor:
    """[R, P+] drafts that a whole block at each place yields; 0 behind the last."""
    width = len(blocks.widths) - 1
    drafts = blocks.widths[width] - 1
    guessed = blocks.tokens[width, :, :, :drafts, 0].long()  # [R, P, B-1]
    reqs, places = guessed.shape[:2]
    follows = blocks.answers.unfold(1, drafts, 1)[:, 1:]  # [R, T-B+1, B-1]
    count = min(places, follows.shape[1])
    kept = (guessed[:, :count] == follows[:, :count]).long().cumprod(2).sum(2)
    return torch.cat((kept, torch.zeros(reqs, 2 * drafts + 4, dtype=torch.long)), 1)


def tokens_per_forward(steps: list[list[Step]]) -> float:
    """A draft pass behind each prompt included."""
    return sum(step.accepted + 1 for some in steps for step in some) / sum(len(some) + 1 for some in steps if some)
