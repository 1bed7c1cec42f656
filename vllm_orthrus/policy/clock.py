"""What a step takes: a cost model's word, corrected by the steps that were timed.

    seconds = model * factor      by drafts, size of the batch and length of its contexts

A factor is learnt where steps ran. Elsewhere its logarithm is taken from a plane through those of the neighbours, over
the logarithms of rows, requests and context. So a few steps of any mode put a model right that is wrong throughout, and
a few steps of two modes one that takes rows for dearer, or cheaper, than they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

TIMED = 3  # steps of a mode that make its time known
EASE = 0.2  # weight of the newest step
EARLY = 0.6  # of one that took far less time than is known
FAR = 2.0  # by how much less a neighbour counts for each doubling that it is away
FLAT = 0.03  # what speaks against a slope
STEPS_OF_CONTEXT = 16  # to a doubling
SLIGHT = 0.02  # a change that is not worth working out again what follows from it

# Seconds of a step by its drafts, requests, and their cached positions on average. For a model that has no idea of a
# device's speed, any unit will do.
Array = np.ndarray[Any, Any]
Costs = Callable[[int, int, float], float]


class Step(NamedTuple):
    """One step that decoded and read no prompt."""

    requests: int
    context: float  # cached positions of a request, on average
    verified: int  # drafts of each request that its forward verified
    drafting: int  # drafts that it made for the next one
    seconds: float


class Cell(NamedTuple):
    """Steps that take about as long for the same reason. Doublings from one to the next."""

    drafts: int
    requests: int
    context: int

    @classmethod
    def of(cls, drafts: int, requests: int, context: float) -> Cell:
        """Single requests apart, then powers of two; contexts by fours, from 2K on."""
        size = requests if requests <= 4 else 2 ** math.ceil(math.log2(requests))
        return cls(drafts, size, 2 * max(0, math.ceil(math.log2(max(context, 1) / 2048) / 2)))

    def away_from(self, other: Cell) -> tuple[float, float, float]:
        rows = math.log2((self.drafts + 1) / (other.drafts + 1))
        return rows, math.log2(self.requests / other.requests), float(self.context - other.context)


class Clock:
    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self._remembered = functools.lru_cache(4096)(costs)  # asked in every step, of contexts that hardly change
        self.known: dict[Cell, tuple[int, float]] = {}  # how often seen, and the logarithm of the factor
        self.guessed: dict[Cell, float] = {}  # what follows from these for others
        self.paused = False  # the last step took far longer than is known

    def observe(self, step: Step) -> None:
        if step.verified != step.drafting:  # on the way from one mode to another: neither's time
            return
        cell = Cell.of(step.drafting, step.requests, step.context)
        factor = math.log(step.seconds / self.costs(step.drafting, step.requests, step.context))
        seen, known = self.known.get(cell, (0, factor))
        # A machine pauses now and then, and nothing runs faster than it can: what is late is believed slowly, and what
        # is early at once, as other work may have gone on while the mode was timed first.
        late, early = factor > known + math.log(1.5), factor < known - math.log(1.25)
        behind_a_pause, self.paused = self.paused, late
        if early and behind_a_pause:  # where steps are scheduled ahead, what the one before waited lacks this one
            return
        ease = EASE / 4 if late and seen >= TIMED else max(EARLY if early else EASE, 1 / (seen + 1))
        factor = min(factor, known + math.log(2)) if seen >= TIMED else factor
        change = ease * (factor - known)
        self.known[cell] = (seen + 1, known + change)
        if seen < TIMED or abs(change) > SLIGHT:
            self.guessed.clear()

    def believe(self, step: Step) -> None:
        """Timed with care, before there was anything to serve."""
        for _ in range(TIMED):
            self.observe(step)

    def errors(self) -> list[float]:
        """By how much each known time is missed by what follows from the others, relative."""
        found = []
        for cell, (_, factor) in self.known.items():
            others = {other: known for other, known in self.known.items() if other != cell}
            found.append(abs(math.expm1(_plane(others, cell) - factor)))
        return found

    def seconds(self, requests: int, context: float, modes: Sequence[int]) -> dict[int, float]:
        """Of a step in each mode."""
        about = 2.0 ** (round(STEPS_OF_CONTEXT * math.log2(max(context, 1))) / STEPS_OF_CONTEXT)
        return {
            drafts: self._remembered(drafts, requests, about)
            * math.exp(self._factor(Cell.of(drafts, requests, context)))
            for drafts in modes
        }

    def _factor(self, cell: Cell) -> float:
        seen, factor = self.known.get(cell, (0, 0.0))
        if seen >= TIMED:
            return factor
        if cell not in self.guessed:
            self.guessed[cell] = _plane(self.known, cell)
        return self.guessed[cell]


def _plane(known: Mapping[Cell, tuple[int, float]], cell: Cell) -> float:
    """Through the factors that are known, near ones above all, and no steeper than they demand."""
    if not known:
        return 0.0
    rows: list[Array] = [np.sqrt(FLAT) * np.eye(4)[1:]]
    targets: list[Array] = [np.zeros(3)]
    for other, (seen, factor) in known.items():
        away = other.away_from(cell)
        weight = math.sqrt(min(seen, TIMED) * FAR ** -float(np.abs(away).sum()))
        rows.append(weight * np.array([[1.0, *away]]))
        targets.append(np.array([weight * factor]))
    plane, *_ = np.linalg.lstsq(np.vstack(rows), np.concatenate(targets), rcond=None)
    return float(plane[0])
