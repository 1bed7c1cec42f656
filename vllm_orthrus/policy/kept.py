"""How many drafts a verification keeps, learnt while serving: by request, by place of the draft, by how it was made.

    E[kept of K] = P(d1 kept) + P(d1, d2 kept) + ... + P(d1 .. dK kept)

Drafts that rode along with a verification did not always know the bonus, so fewer of them are kept than of those that
had a pass of their own. Each way counts for itself. What one has seen of a request stands for the other, too, by the
share that riding drafts keep of what the others would have kept.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

PRIOR = 3.0  # verifications that other places, and other requests, are worth beside a place's own
OTHERS = 0.01  # what a draft of another request says, beside one of its own
FORGET = 0.9  # of a request's own counts, per verification
FORGET_ALL = 0.99  # of the counts of all requests, per verification
HOPE = 0.8  # how likely a draft is kept of which nothing is known
SHARE = 0.85  # of the drafts of a pass of their own that riding ones keep, as far as is known before
SHARE_PRIOR = 20.0  # drafts that this is worth

Array = np.ndarray[Any, Any]


class Outcome(NamedTuple):
    """Of a request's verification."""

    request: Hashable
    drafts: int  # at least one
    accepted: int


class Kept:
    """Decayed counts of verifications, by place of the draft: of each request, and of all together."""

    def __init__(self, places: int) -> None:
        self.row: dict[Hashable, int] = {}
        self.free: list[int] = []
        self.places = np.arange(places)
        self.tried = np.zeros((1, places))  # row 0 is that of requests of which nothing is known
        self.kept = np.zeros((1, places))
        self.all_tried, self.all_kept = np.zeros(places), np.zeros(places)

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """A place was tried if it was verified and all before it were kept."""
        rows = [self._row_of(outcome.request) for outcome in outcomes]
        drafts, accepted = np.array([outcome[1:] for outcome in outcomes]).T[..., None]  # [requests, 1]
        tried = self.places < np.minimum(drafts, accepted + 1)
        kept = self.places < np.minimum(drafts, accepted)
        for counts, new in ((self.tried, tried), (self.kept, kept)):
            counts[rows] = np.where(tried, counts[rows] * FORGET + new, counts[rows])
        forget = FORGET_ALL ** tried.sum(0)
        self.all_tried = self.all_tried * forget + tried.sum(0)
        self.all_kept = self.all_kept * forget + kept.sum(0)

    def fade(self, outcomes: Sequence[Outcome]) -> None:
        """Verifications went by that say nothing here."""
        rows = [self.row[outcome.request] for outcome in outcomes if outcome.request in self.row]
        self.tried[rows] *= FORGET
        self.kept[rows] *= FORGET

    def _row_of(self, request: Hashable) -> int:
        if request not in self.row:
            if not self.free:
                size = len(self.tried)
                self.tried, self.kept = (
                    np.concatenate((part, np.zeros_like(part))) for part in (self.tried, self.kept)
                )
                self.free = list(range(2 * size - 1, size - 1, -1))
            self.row[request] = self.free.pop()
        return self.row[request]

    def drop(self, request: Hashable) -> None:
        if (row := self.row.pop(request, None)) is not None:
            self.tried[row] = self.kept[row] = 0
            self.free.append(row)

    def expected(self, requests: Sequence[Hashable]) -> tuple[Array, Array]:
        """[requests, K] drafts kept of so many, and [requests, 1] from how many drafts that is known."""
        rows = [self.row.get(request, 0) for request in requests]
        tried, kept = self.tried[rows], self.kept[rows]  # [requests, K]
        shared = (self.all_kept + HOPE) / (self.all_tried + 1)
        seen = tried.sum(1, keepdims=True)
        own = (kept.sum(1, keepdims=True) + PRIOR * shared) / (seen + PRIOR)
        chance = (kept + PRIOR * own) / (tried + PRIOR)
        return chance.cumprod(1).cumsum(1), seen + OTHERS * self.all_tried.sum()


class KeptBothWays:
    """Of drafts that had a pass of their own, and of those that rode along with a verification."""

    def __init__(self, places: int) -> None:
        self.alone, self.riding = Kept(places), Kept(places)
        self.promised = self.given = 0.0  # where drafts rode: kept, had they had a pass of their own; and really kept

    def __contains__(self, request: Hashable) -> bool:
        return request in self.alone.row or request in self.riding.row

    @property
    def share(self) -> float:
        return (self.given + SHARE_PRIOR * SHARE) / (self.promised + SHARE_PRIOR)

    def add(self, outcomes: Sequence[Outcome], rode: bool) -> None:
        if not outcomes:
            return
        mine, other = (self.riding, self.alone) if rode else (self.alone, self.riding)
        if rode:
            kept, seen = self.alone.expected([outcome.request for outcome in outcomes])
            drafts, accepted = np.array([outcome[1:] for outcome in outcomes]).T
            promised, sure = kept[np.arange(len(kept)), drafts - 1], seen[:, 0] / (seen[:, 0] + drafts)
            forget = FORGET_ALL ** len(outcomes)
            self.promised = forget * self.promised + float(sure @ promised)
            self.given = forget * self.given + float(sure @ accepted)
        mine.add(outcomes)
        other.fade(outcomes)

    def drop(self, request: Hashable) -> None:
        self.alone.drop(request)
        self.riding.drop(request)

    def tokens(self, requests: Sequence[Hashable], rode: bool) -> Array:
        """[K + 1], expected of one step with so many drafts, of all these requests together."""
        alone, seen_alone = self.alone.expected(requests)
        riding, seen_riding = self.riding.expected(requests)
        mine, other = (riding, alone * self.share) if rode else (alone, riding / self.share)
        seen_mine, seen_other = (seen_riding, seen_alone) if rode else (seen_alone, seen_riding)
        total = seen_mine + seen_other
        weight = np.divide(seen_mine, total, out=np.full_like(total, 0.0 if rode else 1.0), where=total > 0)
        places = np.arange(1, alone.shape[1] + 1)
        return _with_bonus(np.minimum(weight * mine + (1 - weight) * other, places))


def _with_bonus(drafts: Array) -> Array:
    """drafts [requests, K], kept of so many."""
    summed: Array = len(drafts) + np.concatenate(([0.0], drafts.sum(0)))
    return summed
