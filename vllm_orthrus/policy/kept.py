"""How many drafts a verification keeps, learnt while serving: by request, by place of the draft, by how it was made.

    E[kept of K] = P(d1 kept) + P(d1, d2 kept) + ... + P(d1 .. dK kept)

The chance of each place is learnt from all requests. A request's chances of rejection are multiplied by how often its
drafts were rejected, against how often that was to be expected: one that is harder or easier than others is soon known.

That takes the places where drafts begin for the same in all modes, and they aren't: short blocks begin anew within easy
text and so see more of it, long ones begin behind what was hard. So of each number of drafts it is also learnt what was
kept of what had been foretold, and its next word is corrected by that. Of batches only, where requests' own luck evens
out: that of a single one says nothing of the next.

Drafts that rode along with a verification did not always know the bonus, so fewer of them are kept than of those that
had a pass of their own. Each way counts for itself. What one has seen of a request stands for the other, too, by the
share that riding drafts keep of what the others would have kept.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

PRIOR = 5.0  # rejections that other requests are worth beside a request's own
OTHERS = 0.01  # what a draft of another request says, beside one of its own
FORGET = 0.95  # of a request's own counts, per verification
FORGET_ALL = 0.99  # of the counts of all requests, per verification
HOPE = 0.8  # how likely a draft is kept of which nothing is known
FORETOLD_PRIOR = 100.0  # drafts that it is worth to have foretold rightly, as far as is known before
FORGET_FORETOLD = 0.998  # of what was foretold and kept, per verification
SUREST, LEAST = 0.995, 0.01  # no draft is certain, and none is hopeless
SHARE = 0.85  # of the drafts of a pass of their own that riding ones keep, as far as is known before
SHARE_PRIOR = 20.0  # drafts that this is worth

Array = np.ndarray[Any, Any]


class Outcome(NamedTuple):
    """Of a request's verification."""

    request: Hashable
    drafts: int  # at least one
    accepted: int


class Kept:
    """Decayed counts: by place of all requests, and of each request's rejections beside those to be expected."""

    def __init__(self, places: int) -> None:
        self.row: dict[Hashable, int] = {}
        self.free: list[int] = []
        self.places = np.arange(places)
        self.tried, self.kept = np.zeros(places), np.zeros(places)
        self.foretold, self.given = np.zeros(places), np.zeros(places)  # drafts kept, by how many were verified
        # By request: places tried, drafts rejected, and rejections to be expected. Row 0: nothing is known.
        self.own = np.zeros((3, 1))

    def chance(self) -> Array:
        """[K] of a draft, given that all before it were kept. Places that were not tried are like those before them."""
        so_far = (self.kept.cumsum() + HOPE) / (self.tried.cumsum() + 1)
        return np.asarray((self.kept + so_far) / (self.tried + 1))

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """A place was tried if it was verified and all before it were kept."""
        rows = [self._row_of(outcome.request) for outcome in outcomes]
        drafts, accepted = np.array([outcome[1:] for outcome in outcomes]).T[..., None]  # [requests, 1]
        self._compare(rows, drafts[:, 0], accepted[:, 0])
        tried = self.places < np.minimum(drafts, accepted + 1)
        kept = self.places < np.minimum(drafts, accepted)
        expected = np.where(tried, 1 - self.chance(), 0).sum(1)
        fresh = np.stack((tried.sum(1), (tried & ~kept).sum(1), expected))
        self.own[:, rows] = self.own[:, rows] * FORGET + fresh
        forget = FORGET_ALL ** tried.sum(0)
        self.tried = self.tried * forget + tried.sum(0)
        self.kept = self.kept * forget + kept.sum(0)

    def _compare(self, rows: list[int], drafts: Array, accepted: Array) -> None:
        """As far as something was known of the requests, and as far as they are several."""
        if len(rows) == 1:  # whose weight is none, as below
            return
        foretold, sure = _of_each(self._foretell(rows, PRIOR), self._seen(rows), drafts)
        sure = sure * (1 - 1 / len(rows))
        forget = FORGET_FORETOLD ** self._by_number(drafts, sure)
        self.foretold = forget * self.foretold + self._by_number(drafts, sure * foretold)
        self.given = forget * self.given + self._by_number(drafts, sure * accepted)

    def _by_number(self, drafts: Array, of: Array) -> Array:
        return np.bincount(drafts - 1, of, len(self.places))

    def fade(self, outcomes: Sequence[Outcome]) -> None:
        """Verifications went by that say nothing here."""
        self.own[:, [self.row[outcome.request] for outcome in outcomes if outcome.request in self.row]] *= FORGET

    def _row_of(self, request: Hashable) -> int:
        if request not in self.row:
            if not self.free:
                size = self.own.shape[1]
                self.own = np.concatenate((self.own, np.zeros_like(self.own)), axis=1)
                self.free = list(range(2 * size - 1, size - 1, -1))
            self.row[request] = self.free.pop()
        return self.row[request]

    def drop(self, request: Hashable) -> None:
        if (row := self.row.pop(request, None)) is not None:
            self.own[:, row] = 0
            self.free.append(row)

    def expected(self, requests: Sequence[Hashable], prior: float = PRIOR) -> tuple[Array, Array]:
        """[requests, K] drafts kept of so many, and [requests, 1] from how many drafts that is known."""
        rows = [self.row.get(request, 0) for request in requests]
        right = (self.given + FORETOLD_PRIOR) / (self.foretold + FORETOLD_PRIOR)
        right = 1 + (right - 1) * (1 - 1 / len(rows))  # as far as it was learnt of such batches
        return self._foretell(rows, prior) * right, self._seen(rows)[:, None]

    def _seen(self, rows: list[int]) -> Array:
        """[requests] drafts that what is foretold goes by."""
        return np.asarray(self.own[0, rows] + OTHERS * self.tried.sum())

    def _foretell(self, rows: list[int], prior: float) -> Array:
        """[requests, K], by their rows."""
        _, rejected, expected = self.own[:, rows, None]
        factor = (rejected + prior) / (expected + prior)
        chance = np.clip(1 - (1 - self.chance()) * factor, LEAST, SUREST)
        return np.asarray(chance.cumprod(1).cumsum(1))


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
            promised, sure = _of_each(kept, seen[:, 0], drafts)
            promised = np.minimum(promised, drafts)
            forget = FORGET_ALL ** float(sure.sum())
            self.promised = forget * self.promised + float(sure @ promised)
            self.given = forget * self.given + float(sure @ accepted)
        mine.add(outcomes)
        other.fade(outcomes)

    @property
    def known(self) -> bool:
        """Enough to judge riding drafts by."""
        return float(self.alone.tried.sum()) >= SHARE_PRIOR

    def drop(self, request: Hashable) -> None:
        self.alone.drop(request)
        self.riding.drop(request)

    def tokens(self, requests: Sequence[Hashable], rode: bool, prior: float = PRIOR) -> Array:
        """[K + 1], expected of one step with so many drafts, of all these requests together."""
        alone, seen_alone = self.alone.expected(requests, prior)
        riding, seen_riding = self.riding.expected(requests, prior)
        mine, other = (riding, alone * self.share) if rode else (alone, riding / self.share)
        seen_mine, seen_other = (seen_riding, seen_alone) if rode else (seen_alone, seen_riding)
        total = seen_mine + seen_other
        weight = np.divide(seen_mine, total, out=np.full_like(total, 0.0 if rode else 1.0), where=total > 0)
        places = np.arange(1, alone.shape[1] + 1)
        return _with_bonus(np.minimum(weight * mine + (1 - weight) * other, places))


def _of_each(kept: Array, seen: Array, drafts: Array) -> tuple[Array, Array]:
    """[requests] of kept [requests, K]: what of so many drafts, and how far that is known of the request."""
    return kept[np.arange(len(kept)), drafts - 1], seen / (seen + drafts)


def _with_bonus(drafts: Array) -> Array:
    """drafts [requests, K], kept of so many."""
    summed: Array = len(drafts) + np.concatenate(([0.0], drafts.sum(0)))
    return summed
