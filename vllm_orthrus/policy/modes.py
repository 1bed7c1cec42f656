"""How many tokens to draft in the next step, none included: what gives most tokens per second.

    gain(K) = sum over requests of E[tokens | K] / seconds(K, requests)
    E[tokens | K] = 1 + P(d1 kept) + P(d1, d2 kept) + ... + P(d1 .. dK kept)

Both sides are learnt while serving. What is kept is counted by place, for each request and for all. What a step takes
is its time by the clock, by K and size of the batch; where a mode was not timed yet, it is that of a line through
those that were, over forwards and rows.

Where drafting does not pay, a few verifications show it. From then on it is tried again rarely, as nothing is learnt of
drafts that nobody makes. A trial takes the shortest drafts; how long the pause before it is follows from what it costs,
doubles each time that drafting still does not pay, and is shorter the more requests are new. What would not pay if all
drafts were kept is not tried.

Nothing here knows of an engine: the host calls `choose` before a step, `verified` and `observe` behind it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

PRIOR = 3.0  # verifications that other places, and other requests, are worth beside a place's own
FORGET = 0.9  # of a request's own counts, per verification
FORGET_ALL = 0.99  # of the counts of all requests, per verification
HOPE = 0.8  # how likely a draft is kept of which nothing is known
STAY = 1.03  # another mode must promise that much more to be taken
TIMED = 3  # steps of a mode that make its time known
EASE = 0.2  # weight of the newest step in a mode's time
TRIAL = 3  # verifications of a trial
SHARE = 0.03  # of the time that trials may cost at first
LONGEST = 16  # times the first pause


class Step(NamedTuple):
    """One step that decoded and read no prompt."""

    requests: int
    verified: int  # drafts of each request that its forward verified
    drafting: int  # drafts that it made for the next one
    seconds: float


class Kept:
    """Decayed counts of verifications, by place of the draft: of each request, and of all together."""

    def __init__(self, places: int) -> None:
        self.row: dict[Hashable, int] = {}
        self.free: list[int] = []
        self.places = np.arange(places)
        self.tried = np.zeros((1, places))  # row 0 is that of requests of which nothing is known
        self.kept = np.zeros((1, places))
        self.all_tried, self.all_kept = np.zeros(places), np.zeros(places)

    def add(self, request: Hashable, drafts: int, accepted: int) -> None:
        """A place was tried if it was verified and all before it were kept."""
        tried = self.places < min(drafts, accepted + 1)
        kept = self.places < min(drafts, accepted)
        row = self._row_of(request)
        for counts, new, forget in (
            (self.tried[row], tried, FORGET),
            (self.kept[row], kept, FORGET),
            (self.all_tried, tried, FORGET_ALL),
            (self.all_kept, kept, FORGET_ALL),
        ):
            counts[tried] = counts[tried] * forget + new[tried]

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

    def tokens(self, requests: Sequence[Hashable]) -> np.ndarray[Any, Any]:
        """[K + 1], expected of one step with so many drafts, of all these requests together."""
        rows = [self.row.get(request, 0) for request in requests]
        tried, kept = self.tried[rows], self.kept[rows]  # [requests, K]
        shared = (self.all_kept + HOPE) / (self.all_tried + 1)
        own = (kept.sum(1, keepdims=True) + PRIOR * shared) / (tried.sum(1, keepdims=True) + PRIOR)
        chance = (kept + PRIOR * own) / (tried + PRIOR)
        drafts: np.ndarray[Any, Any] = chance.cumprod(1).sum(0).cumsum()
        return len(requests) + np.concatenate(([0.0], drafts))


@dataclass
class Clock:
    """What a step takes, by its drafts and by the size of the batch."""

    rows_per_forward: float  # rows that cost as much again as a forward of one, as far as is known before
    times: dict[tuple[int, int], tuple[int, float]] = field(default_factory=dict)  # how often seen, seconds

    def observe(self, step: Step) -> None:
        if step.verified != step.drafting:  # on the way from one mode to another: neither's time
            return
        at = (step.drafting, _size(step.requests))
        seen, known = self.times.get(at, (0, step.seconds))
        # A machine pauses now and then, and nothing runs faster than it can: what is late is believed slowly.
        spent = min(step.seconds, 2 * known) if seen >= TIMED else step.seconds
        ease = EASE / 4 if spent > 1.5 * known else max(EASE, 1 / (seen + 1))
        self.times[at] = (seen + 1, known + ease * (spent - known))

    def seconds(self, requests: int, modes: Sequence[int]) -> dict[int, float]:
        """Of a step in each mode. If nothing was timed yet, in forwards of one row."""
        size = _size(requests)
        timed = {drafts: self.times.get((drafts, size), (0, 0.0)) for drafts in modes}
        found = {drafts: known for drafts, (seen, known) in timed.items() if seen >= TIMED}
        if len(found) < len(modes):
            forward, row = self._line(size)
            for drafts in modes:
                forwards, rows = _work(drafts, size)
                found.setdefault(drafts, forward * forwards + row * rows)
        return found

    def _line(self, size: int) -> tuple[float, float]:
        """Seconds of a forward of one row, and of a row more: least squares, relative, those of this size above all."""
        # The idea that one had before is an observation, too: forward - rows_per_forward * row = 0, lightly believed.
        matrix = np.array([[1e-3, -1e-3 * self.rows_per_forward]])
        if not self.times:
            return 1.0, 1 / self.rows_per_forward
        scale = min(time for _, time in self.times.values())
        matrix, target = matrix / scale, np.zeros(1)
        for (drafts, other), (_, time) in self.times.items():
            weight = 1.0 if other == size else 0.1
            matrix = np.vstack((matrix, weight * np.array(_work(drafts, other)) / time))
            target = np.append(target, weight)
        (forward, row), *_ = np.linalg.lstsq(matrix, target, rcond=None)
        return max(float(forward), 1e-3 * scale), max(float(row), 0.0)


def _work(drafts: int, requests: int) -> tuple[float, float]:
    """Forwards, and rows beyond the first of each: a verification of K + 1 rows a request, and a draft pass of K."""
    rows = requests * (drafts + 1) - 1
    return (2.0, float(rows + requests * drafts - 1)) if drafts else (1.0, float(rows))


def _size(requests: int) -> int:
    """Batches of about this size take about as long."""
    return requests if requests <= 4 else 2 ** math.ceil(math.log2(requests))


class ModePolicy:
    """The state: one mode for the batch, and what was learnt."""

    def __init__(self, modes: Sequence[int], rows_per_forward: float) -> None:
        """modes: numbers of drafts to choose from, 0 among them."""
        self.modes = tuple(sorted(modes))
        self.clock = Clock(rows_per_forward)
        self.kept = Kept(self.modes[-1])
        self.mode = self.modes[-1]
        self.patience = 1  # how much longer than at first the pause before a trial is
        self.plain_steps = 0
        self.trial = 0  # steps that are left of it

    # Behind a step

    def verified(self, request: Hashable, drafts: int, accepted: int) -> None:
        self.kept.add(request, drafts, accepted)

    def finished(self, request: Hashable) -> None:
        self.kept.drop(request)

    def observe(self, step: Step) -> None:
        self.clock.observe(step)

    # Before a step

    def choose(self, requests: Sequence[Hashable]) -> int:
        seconds = self.clock.seconds(len(requests), self.modes)
        tokens = self.kept.tokens(requests)
        gains = {drafts: float(tokens[drafts]) / seconds[drafts] for drafts in self.modes}
        best = max(self.modes, key=lambda drafts: gains[drafts])
        if self.trial:
            self.trial -= 1
            if self.trial:
                return self.mode
            self.patience = 1 if best else min(2 * self.patience, LONGEST)
        if best != self.mode and gains[best] > STAY * gains[self.mode]:
            self.mode, self.plain_steps = best, 0
        if self.mode == 0:
            self.plain_steps += 1
            if self.plain_steps > self._pause(requests, seconds):
                self.mode, self.trial = self.modes[1], TRIAL + 1  # the first step makes drafts, and verifies none
        return self.mode

    def _pause(self, requests: Sequence[Hashable], seconds: dict[int, float]) -> float:
        """Plain steps before a trial."""
        if all((drafts + 1) / seconds[drafts] < 1 / seconds[0] for drafts in self.modes[1:]):
            return math.inf
        new = sum(request not in self.kept.row for request in requests) / max(1, len(requests))
        cost = (TRIAL + 1) * (seconds[self.modes[1]] / seconds[0] - 1)
        return self.patience * max(0.0, cost) / SHARE * (1 - new)
