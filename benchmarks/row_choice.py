"""Ways to spend rows on hypotheses: of one width, of widths by rank, or filled block by block by gain per row.

With n(w) drafts in a block of width w and G_a(n) the drafts that the first n of them are expected to yield after the
outcome "a accepted", a block that is used from row o on is worth

    V(o) * G_a(n(w) - o) / G_a(n(B) - o)        V and B as in kernels/chances.py: at full width it is worth V(o)

Filling takes, again and again, what gains most per row: a new block of any width, or more rows for one that is there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_orthrus.kernels.chances import Drafts, block_values
from vllm_orthrus.kernels.hypotheses import NONE, choose_hypotheses


class Outlook(NamedTuple):
    """What is known before a verification."""

    outcome: Tensor  # [R, K+1] P(a)
    bonus: Tensor  # [R, K+1, C] P(c | a)
    drafts: Drafts
    anchors: Tensor  # [R]
    width: Tensor  # [R] of the block at hand
    yields: Tensor  # [R, K+1, B] G_a(n), n = 0..B-1


class Choice(NamedTuple):
    accepted: Tensor  # [R, H], as in Hypotheses
    token: Tensor  # [R, H]
    width: Tensor  # [R, H]


def drafting_rows(width: Tensor, block: int) -> Tensor:
    """The last row of a whole block was never taught."""
    return width.clamp(1, block - 1)


def worth(yields: Tensor, values: Tensor, offset: Tensor, width: Tensor) -> Tensor:
    """Of drafting from row `offset` of a block of `width` on; yields [..., B], the others as its leading sizes."""
    block = yields.shape[-1]
    left = (drafting_rows(width, block) - offset).clamp(min=0)
    whole = (block - 1 - offset).clamp(min=0)
    found, all_of_it = (yields.gather(-1, n[..., None]).squeeze(-1) for n in (left, whole))
    return values[offset.clamp(0, block)] * torch.where(left > 0, found / all_of_it.clamp(min=1e-6), 0)


def by_rank(outlook: Outlook, widths: Sequence[int], block: int) -> Choice:
    """The most useful block is as wide as the first of `widths`, and so on."""
    narrow = min(max(widths), block)  # of equal widths, as an engine that is set to blocks of that width has it
    values = block_values(narrow, min(narrow, block - 1), len(widths))
    chosen = choose_hypotheses(
        outlook.outcome,
        outlook.bonus,
        outlook.drafts.candidates,
        outlook.drafts.tokens,
        outlook.anchors,
        outlook.drafts.offset,
        values,
        len(widths),
    )
    return Choice(*chosen, torch.tensor(widths).expand_as(chosen.token))


def fill(outlook: Outlook, rows: int, widths: Sequence[int]) -> Choice:
    block, size = outlook.yields.shape[2], torch.tensor(widths)
    values = block_values(block, block - 1, 2)
    reqs, places, ranks = outlook.bonus.shape  # R, A, C
    a = torch.arange(places)

    def worths(offset: Tensor, width: Tensor) -> Tensor:
        """[R, A, *] of blocks with offset [R or 1, A, *] after outcome a."""
        shape = torch.broadcast_shapes(offset.shape, width.shape, (reqs, places, 1))
        return worth(
            outlook.yields[:, :, None].expand(*shape, block), values, offset.expand(shape), width.expand(shape)
        )

    exact = worths(torch.zeros(1, 1, 1, dtype=torch.long), size)  # [R, A, W]
    distance = a[:, None] - a + 1  # [A (a), J]: offset of the block at place j
    anchored = worths(distance.clamp(min=0).repeat_interleave(len(widths), 1)[None], size.repeat(places))
    anchored = torch.where(distance[..., None] > 0, anchored.view(reqs, places, places, -1), 0)
    anchored = anchored.permute(0, 2, 3, 1)  # [R, J, W, A]
    tail = worths((outlook.drafts.offset[:, None] + 1 + a)[..., None], outlook.width[:, None, None])[..., 0]  # [R, A]

    pairs = outlook.outcome[..., None] * outlook.bonus  # [R, A, C]
    rest = (outlook.outcome - pairs.sum(2)).clamp(min=0)  # [R, A]
    now = torch.zeros(reqs, places, ranks)  # worth of the exact blocks so far
    rows_exact = torch.zeros(reqs, places, ranks, dtype=torch.long)
    rows_anchored = torch.zeros(reqs, places, dtype=torch.long)
    left = torch.full((reqs,), rows)
    while True:
        base = torch.maximum(now, tail[..., None])  # [R, A, C]
        better = torch.maximum(anchored, tail[:, None, None])  # [R, J, W, A]
        gain = ((better - tail[:, None, None]) * rest[:, None, None]).sum(3)
        least = torch.maximum(better[..., None], now[:, None, None]) - base[:, None, None]  # [R, J, W, A, C]
        gain = gain + torch.einsum("rjwac,rac->rjw", least, pairs)
        exact_gain = pairs[..., None] * (exact[:, :, None] - base[..., None]).clamp(min=0)  # [R, A, C, W]
        more = torch.cat(
            ((size - rows_anchored[..., None]).flatten(1), (size - rows_exact[..., None]).flatten(1)), 1
        )  # [R, (J + A * C) * W]
        rate = torch.cat((gain.flatten(1), exact_gain.flatten(1)), 1) / more.clamp(min=1)
        rate = torch.where((more > 0) & (more <= left[:, None]), rate, 0)
        best, which = rate.max(1)
        going = best > 1e-9
        if not going.any():
            break
        reqs_going, which = going.nonzero()[:, 0], which[going]
        left[reqs_going] -= more[reqs_going, which]
        kind, width = which // len(widths), which % len(widths)
        tails = kind < places
        row, place = reqs_going[tails], kind[tails]
        rows_anchored[row, place] = size[width[tails]]
        tail[row] = torch.maximum(tail[row], anchored[row, place, width[tails]])
        row, pair = reqs_going[~tails], kind[~tails] - places
        rows_exact.flatten(1)[row, pair] = size[width[~tails]]
        now.flatten(1)[row, pair] = exact[row, pair // ranks, width[~tails]]

    width = torch.cat((rows_anchored, rows_exact.flatten(1)), 1)
    accepted = torch.cat((a - 1, a.repeat_interleave(ranks))).expand_as(width)
    tokens = torch.cat((outlook.anchors[:, None], outlook.drafts.tokens, outlook.drafts.candidates.flatten(1)), 1)
    chosen = width > 0
    return Choice(torch.where(chosen, accepted, NONE), torch.where(chosen, tokens, 0), width)
