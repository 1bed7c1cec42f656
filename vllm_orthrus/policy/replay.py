"""A policy at work on a machine and on text that are only described: what it would be worth there, without either.

The machine is a device by the roofline. Text is, for each place where a draft may begin, how many drafts it would
accept; requests walk through answers, and a new one begins where one ends. What a step costs and gives follows from
the mode that the policy chose for it, as in an engine: its drafts are verified in the step behind.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vllm_orthrus.policy.clock import Step
from vllm_orthrus.policy.cost import Device, Mode, Model, forward_seconds, forwards, step_seconds
from vllm_orthrus.policy.kept import Outcome

ModeOf = Callable[[int, int], Mode]  # of so many drafts, with so many requests


class Text(NamedTuple):
    """Of one class."""

    answers: list[list[int]]  # at each place, drafts accepted of a pass of their own
    hits: dict[int, float]  # by number of hypotheses: how often one had foreseen the outcome
    tails: dict[int, list[int]]  # accepted where none had


class World(NamedTuple):
    device: Device
    model: Model
    mode_of: ModeOf
    noise: float = 0.03  # by how much steps take longer than the roofline says, at most

    def seconds(self, verified: int, drafting: int, requests: int, context: float) -> float:
        """Of a step that verifies what one mode drafted, and drafts by another."""
        if verified == drafting:
            return step_seconds(self.device, self.model, self.mode_of(drafting, requests), requests, context)
        # A verification takes along what rides in its own mode; a pass of its own drafts for the next.
        total = self.device.step
        for drafts, which in ((verified, slice(0, 1)), (drafting, slice(1, None))):
            mode = self.mode_of(drafts, requests)
            if drafts == drafting and mode.hypotheses:
                mode = mode._replace(hypotheses=0)
            total += sum(
                forward_seconds(self.device, self.model, one) for one in forwards(mode, requests, context)[which]
            )
        return total


def read_traces(found: dict[str, Any]) -> dict[str, Text]:
    """As `benchmarks/traces.py` writes them below `text`: digits are drafts accepted."""

    def digits(line: str) -> list[int]:
        return [int(digit, 16) for digit in line]

    return {
        kind: Text(
            [digits(line) for line in one["alone"] if line],
            {int(number): what["hits"] for number, what in one["riding"].items()},
            {int(number): digits(what["tails"]) or [0] for number, what in one["riding"].items()},
        )
        for kind, one in found.items()
    }


class Always:
    """Stands where a policy is: one mode."""

    def __init__(self, drafts: int) -> None:
        self.drafts = drafts

    def choose(self, requests: Sequence[Any], context: float) -> int:
        return self.drafts

    def observe(self, step: Step) -> None: ...

    def verified(self, outcomes: Sequence[Outcome]) -> None: ...

    def finished(self, request: Any) -> None: ...


class Replayed(NamedTuple):
    tokens_per_second: float
    modes: list[int]


def replay(
    policy: Any, world: World, text: Text, requests: int, context: float, tokens: int, seed: int = 0
) -> Replayed:
    """Until so many tokens have come of each request on average. Prompts are read in no time."""
    draw = random.Random(seed)
    following = Requests(text, requests, draw)
    seconds, said, verified, modes = 0.0, 0, 0, list[int]()
    while said < tokens * requests:
        drafting = policy.choose(following.names, context)
        modes.append(drafting)
        spent = world.seconds(verified, drafting, requests, context) * (1 + world.noise * draw.random())
        accepted = following.verify(verified, world.mode_of(verified, requests).hypotheses)
        if verified:
            outcomes = zip(following.names, accepted, strict=True)
            policy.verified([Outcome(name, verified, count) for name, count in outcomes])
        for name in following.begin_anew():
            policy.finished(name)
        policy.observe(Step(requests, context, verified, drafting, spent))
        seconds, said, verified = seconds + spent, said + sum(accepted) + requests, drafting
    return Replayed(said / seconds, modes)


class Requests:
    def __init__(self, text: Text, count: int, draw: random.Random) -> None:
        self.text, self.draw = text, draw
        self.names = list(range(count))
        self.next_name = count
        # One answer after the other, so that whatever decides how they are drafted, they are the same.
        order = draw.sample(text.answers, len(text.answers))
        self.coming = itertools.cycle(order)
        self.answer = [next(self.coming) for _ in self.names]
        self.place = [draw.randrange(len(answer)) if count > 1 else 0 for answer in self.answer]

    def verify(self, drafts: int, hypotheses: int) -> list[int]:
        accepted = [min(drafts, answer[place]) for answer, place in zip(self.answer, self.place, strict=True)]
        if hypotheses and drafts:
            known = max((number for number in self.text.hits if number <= hypotheses), default=1)
            hits, tails = self.text.hits[known], self.text.tails[known]
            accepted = [
                count if self.draw.random() < hits else min(drafts, self.draw.choice(tails)) for count in accepted
            ]
        self.place = [place + count + 1 for place, count in zip(self.place, accepted, strict=True)]
        return accepted

    def begin_anew(self) -> list[int]:
        """Those that have ended."""
        ended = []
        for at, (place, answer) in enumerate(zip(self.place, self.answer, strict=True)):
            if place >= len(answer):
                ended.append(self.names[at])
                self.names[at], self.next_name = self.next_name, self.next_name + 1
                self.answer[at], self.place[at] = next(self.coming), 0
        return ended
