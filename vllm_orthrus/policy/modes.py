"""How many tokens to draft in the next step, none included: what gives most tokens per second.

    gain(mode) = E[tokens | mode] / seconds(mode)

Both sides are learnt while serving: what is kept (`kept.py`), and what a step takes (`clock.py`). The number of drafts
names the mode. 0 is plain decoding; the largest, where one pass is among the modes, drafts inside the verification; all
others draft in a pass of their own.

Where drafting does not pay, a few verifications show it. From then on it is tried again now and then, as nothing is
learnt of drafts that nobody makes. Trials are paid for: plain steps set aside a small share of their time, drafting a
share of what it saves. A trial waits until what it is expected to lose can be afforded, and if it fails, what it lost
beyond that is owed. Requests of which nothing is known are a reason for one; without any, the next waits for more. What
would not pay even for text that is easily foreseen is not tried. The other way round, a few steps now and then say what
other modes take, plain decoding above all, and what they give, lest drafting go on by a wrong idea of that.

Where reading the weights is what takes time, drafting with a pass of its own at most doubles a step. On CPUs, and in
large batches, it takes several times as long, and so much is lost by drafts that are made in vain: the dearer they
are, the less is spent on trials, and the sooner a request's own rejections count for more than what others kept.

Nothing here knows of an engine: the host calls `choose` before a step, `verified`, `observe` and `gave` behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

from vllm_orthrus.policy.clock import TIMED, Cell, Clock, Costs, Step
from vllm_orthrus.policy.kept import PRIOR, KeptBothWays, Outcome
from vllm_orthrus.policy.worth import Worth

STAY = 1.03  # another mode must promise that much more to be taken
LEAVE = 1.1  # times plain decoding, to begin with drafts: what seems the best of several seems better than it is
TRIAL = 3  # verifications of a trial
TRUST = 0.9  # in what is expected of a trial: its price is that, and not what it loses if all drafts are lost
SET_ASIDE = 0.02  # of the time of plain steps
SAVED = 0.5  # of what drafting saves
MOST = 3  # trials that may be paid for in advance
TWICE = 2.0  # plain steps: what reading all weights twice takes, where nothing else matters. What takes longer is dear
WARY, WARIEST = 2.0, 0.2  # by so much for each plain step more, down to so much
LONGEST = 4  # times the price of a trial, for requests that are known
CHEAP = 1.1  # a trial takes as many drafts as cost little more than the fewest
SOON = 24  # steps with drafts after which a mode is timed that never was; and plain steps, again
LATER = 1000  # the same for plain steps, once they were timed again and again: each time waits twice as long
LOOK = 100  # steps in one pass after which others are looked at, and the other way round
EAGER = 1.2  # by how much better one pass may turn out than it seems
DEAR = 2.0  # times the mode's own time: what takes longer is not timed
EASY = 0.9  # chance of a draft of text that is easily foreseen


class ModePolicy:
    """The state: one mode for the batch, and what was learnt."""

    def __init__(
        self, modes: Sequence[int], costs: Costs, rides: Callable[[int], bool] = lambda requests: False
    ) -> None:
        """modes: numbers of drafts to choose from, 0 among them. rides: if the largest does, with so many requests."""
        self.modes = tuple(sorted(modes))
        self.rides = rides
        self.clock = Clock(costs)
        self.kept = KeptBothWays(self.modes[-1])
        self.worth = Worth()
        self.mode = 0
        self.riding: int | None = None  # the mode of this batch that drafts inside the verification
        self.patience = 1  # times the price, without new requests
        self.purse: float | None = None  # seconds, for trials; the first is free
        self.trial = 0  # steps that are left of it
        self.paid = self.got = 0.0  # for it; and drafts of a request that it kept
        self.unsure: dict[Cell, int] = {}  # steps with drafts, in such batches, since another mode was timed
        self.wait: dict[Cell, int] = {}  # after so many of them plain steps are timed again
        self.timing, self.other = 0, 0  # steps that are left to time it

    # Behind a step

    def verified(self, outcomes: Sequence[Outcome]) -> None:
        if outcomes and self.trial:
            self.got += sum(outcome.accepted for outcome in outcomes) / len(outcomes)
        riding = self.modes[-1] if outcomes and self.rides(len(outcomes)) else None
        for rode in (False, True):
            self.kept.add([outcome for outcome in outcomes if (outcome.drafts == riding) == rode], rode)

    def finished(self, request: Hashable) -> None:
        self.kept.drop(request)

    def observe(self, step: Step) -> None:
        self.clock.observe(step)

    def gave(self, tokens: int, step: Step) -> None:
        """To all requests together; steps on the way from one mode to another count, too."""
        plain = step.verified == step.drafting == 0
        if plain or self.clock.known:
            asked = {0: step.seconds} if plain else self.clock.seconds(step.requests, step.context, (0,))
            self.worth.add(step.seconds, asked[0], tokens, step.requests)

    # Before a step

    def choose(self, requests: Sequence[Hashable], context: float) -> int:
        """context: cached positions of a request, on average."""
        seconds = self.clock.seconds(len(requests), context, self.modes)
        self.riding = self.modes[-1] if self.rides(len(requests)) else None
        tried = self._tried(seconds)
        daring = _daring(seconds, tried)
        tokens = self.kept.tokens(requests, rode=False, prior=PRIOR * daring)
        gains = {drafts: float(tokens[drafts]) / seconds[drafts] for drafts in self.modes}
        if self.riding is not None:
            known = self.kept.known or self.modes[1:] == (self.riding,)  # there may be no other drafts to judge it by
            rode = self.kept.tokens(requests, rode=True, prior=PRIOR * daring)[-1] if known else 0.0
            gains[self.riding] = float(rode) / seconds[self.riding]
        best = max(self.modes, key=lambda drafts: gains[drafts])
        if gains[best] < (1 if self.mode and not self.trial else LEAVE) * gains[0]:
            best = 0
        if self.trial:
            self.trial -= 1
            if self.trial:
                return self.mode
            self.patience = 1 if best else min(2 * self.patience, LONGEST)
            if best == 0:
                self.purse = (self.purse or 0.0) - self._owed(seconds)
        if best == 0 or gains[best] > STAY * gains[self.mode]:
            self.mode = best
        price = self._price(seconds, gains, tried, daring)
        if self.purse is None:
            self.purse = price if price < math.inf else 0.0
        if self.mode:
            saved = seconds[self.mode] * (gains[self.mode] / gains[0] - 1)
            self.purse += SAVED * daring * max(0.0, saved)
        else:
            self.purse += SET_ASIDE * seconds[0]
            if self.purse >= price * (1 if self._many_new(requests) else self.patience):
                self.purse -= price
                self.mode, self.trial = tried, TRIAL + 1  # the first step verifies none
                self.paid, self.got = price, 0.0
        self.purse = min(self.purse, max(1.0, MOST * daring) * price if self.mode else LONGEST * price)
        return self._timed(len(requests), context, seconds, gains)

    def _tried(self, seconds: dict[int, float]) -> int:
        """What a trial takes."""
        passes = [drafts for drafts in self.modes[1:] if drafts != self.riding] or list(self.modes[1:])
        return max(drafts for drafts in passes if seconds[drafts] <= CHEAP * min(map(seconds.__getitem__, passes)))

    def _price(self, seconds: dict[int, float], gains: dict[int, float], tried: int, daring: float) -> float:
        """Of a trial: what it loses if as much is kept of its drafts as is to be expected, or most of what it may."""
        easy = {drafts: (1 - EASY ** (drafts + 1)) / (1 - EASY) for drafts in self.modes}  # tokens
        if all(easy[drafts] / seconds[drafts] < 1 / seconds[0] for drafts in self.modes[1:]):
            return math.inf
        lost = seconds[tried] * (1 - gains[tried] / gains[0])  # of a step
        return (TRIAL + 1) * max(lost, (1 - TRUST * daring) * (seconds[tried] - seconds[0]), 0.0)

    def _owed(self, seconds: dict[int, float]) -> float:
        """What a trial that failed lost beyond what it was paid for."""
        gained = seconds[0] * self.got * (TRIAL + 1) / TRIAL
        return max(0.0, (TRIAL + 1) * (seconds[self.mode] - seconds[0]) - gained - self.paid)

    def _many_new(self, requests: Sequence[Hashable]) -> bool:
        return 2 * sum(request not in self.kept for request in requests) >= len(requests)

    def _timed(self, requests: int, context: float, seconds: dict[int, float], gains: dict[int, float]) -> int:
        """The mode; or, for a few steps, one of which not enough is known."""
        if self.timing:
            self.timing -= 1
            return self.other
        batch = Cell.of(0, requests, context)
        self.unsure[batch] = steps = self.unsure.get(batch, 0) + 1 if self.mode else 0
        other = self._worth_a_look(steps, batch, seconds, gains)
        if other is None:
            return self.mode
        if other == 0:
            self.unsure[batch] = 0
            self.wait[batch] = min(2 * self.wait.get(batch, SOON), LATER)
        self.other, self.timing = other, TIMED  # and this one, which still verifies what the mode drafted
        return other

    def _worth_a_look(self, steps: int, batch: Cell, seconds: dict[int, float], gains: dict[int, float]) -> int | None:
        """steps: with drafts, in batches like this one, since plain decoding was timed."""
        if steps and steps % SOON == 0:
            for drafts in self.modes:
                timed = self.clock.known.get(batch._replace(drafts=drafts), (0, 0.0))[0] >= TIMED
                if not timed and seconds[drafts] <= DEAR * seconds[self.mode]:
                    return drafts
        if steps > self.wait.get(batch, SOON):
            return 0
        if self.riding is not None and steps % LOOK == LOOK // 2:
            if self.mode == self.riding:
                return max(self.modes[:-1], key=lambda drafts: gains[drafts])
            if self.kept.known and gains[self.riding] * EAGER > gains[self.mode]:
                return self.riding
        return None


def _daring(seconds: dict[int, float], tried: int) -> float:
    """1 where rows cost next to nothing."""
    dear = seconds[tried] / seconds[0] - TWICE
    return min(1.0, max(WARIEST, 1 - WARY * dear))
