"""How many tokens to draft in the next step, none included: what gives most tokens per second.

    gain(mode) = E[tokens | mode] / seconds(mode)

Both sides are learnt while serving: what is kept (`kept.py`), and what a step takes (`clock.py`). The number of drafts
names the mode. 0 is plain decoding; the largest, where one pass is among the modes, drafts inside the verification; all
others draft in a pass of their own.

Where drafting does not pay, a few verifications show it. From then on it is tried again rarely, as nothing is learnt of
drafts that nobody makes. A trial takes the shortest drafts; how long the pause before it is follows from what it costs,
doubles each time that drafting still does not pay, and is shorter the more requests are new. What would not pay if all
drafts were kept is not tried. The other way round, a few plain steps now and then say what plain decoding takes, lest
drafting go on by an idea of that which is wrong.

Nothing here knows of an engine: the host calls `choose` before a step, `verified` and `observe` behind it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from vllm_orthrus.policy.clock import TIMED, Cell, Clock, Costs, Step
from vllm_orthrus.policy.kept import KeptBothWays, Outcome

STAY = 1.03  # another mode must promise that much more to be taken
TRIAL = 3  # verifications of a trial
SHARE = 0.03  # of the time that trials may cost at first
LONGEST = 16  # times the first pause
SOON, LATER = 24, 1000  # steps with drafts after which plain ones are timed: for the first time, and again


class ModePolicy:
    """The state: one mode for the batch, and what was learnt."""

    def __init__(self, modes: Sequence[int], costs: Costs, one_pass: bool = False) -> None:
        """modes: numbers of drafts to choose from, 0 among them. one_pass: the largest rides along."""
        self.modes = tuple(sorted(modes))
        self.riding = self.modes[-1] if one_pass else None
        self.clock = Clock(costs)
        self.kept = KeptBothWays(self.modes[-1])
        self.mode = self.modes[-1]
        self.patience = 1  # how much longer than at first the pause before a trial is
        self.plain_steps = 0
        self.trial = 0  # steps that are left of it
        self.unsure: dict[Cell, int] = {}  # steps since plain decoding was timed
        self.timing = 0  # plain steps that are left to time it

    # Behind a step

    def verified(self, outcomes: Sequence[Outcome]) -> None:
        for rode in (False, True):
            self.kept.add([outcome for outcome in outcomes if (outcome.drafts == self.riding) == rode], rode)

    def finished(self, request: Hashable) -> None:
        self.kept.drop(request)

    def observe(self, step: Step) -> None:
        self.clock.observe(step)

    # Before a step

    def choose(self, requests: Sequence[Hashable], context: float) -> int:
        """context: cached positions of a request, on average."""
        seconds = self.clock.seconds(len(requests), context, self.modes)
        tokens = self.kept.tokens(requests, rode=False)
        gains = {drafts: float(tokens[drafts]) / seconds[drafts] for drafts in self.modes}
        if self.riding is not None:
            gains[self.riding] = float(self.kept.tokens(requests, rode=True)[-1]) / seconds[self.riding]
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
        return 0 if self._times_plain(len(requests), context) else self.mode

    def _times_plain(self, requests: int, context: float) -> bool:
        cell = Cell.of(0, requests, context)
        known = self.clock.known.get(cell, (0, 0.0))[0] >= TIMED
        self.unsure[cell] = self.unsure.get(cell, 0) + 1 if self.mode else 0
        if self.unsure[cell] > (LATER if known else SOON):
            self.unsure[cell], self.timing = 0, TIMED + 1  # the first still verifies drafts
        self.timing = max(0, self.timing - 1)
        return self.timing > 0

    def _pause(self, requests: Sequence[Hashable], seconds: dict[int, float]) -> float:
        """Plain steps before a trial."""
        if all((drafts + 1) / seconds[drafts] < 1 / seconds[0] for drafts in self.modes[1:]):
            return math.inf
        new = sum(request not in self.kept for request in requests) / max(1, len(requests))
        cost = (TRIAL + 1) * (seconds[self.modes[1]] / seconds[0] - 1)
        return self.patience * max(0.0, cost) / SHARE * (1 - new)
