"""The choice of a mode against a made-up machine, and text, whose best mode is known."""

import random
from collections.abc import Callable
from itertools import count

import numpy as np
import pytest

from vllm_orthrus.policy.clock import Costs, Step
from vllm_orthrus.policy.kept import PRIOR, KeptBothWays, Outcome
from vllm_orthrus.policy.modes import ModePolicy

MODES = (0, 3, 7, 15)
Chance = Callable[[int], float]  # that a draft is kept behind so many tokens


def costs(rows_per_forward: float) -> Costs:
    """Of a machine on which so many rows take as long again as a forward of one; contexts cost nothing."""

    def forward(rows: int) -> float:
        return 1 + (rows - 1) / rows_per_forward

    def step(drafts: int, requests: int, context: float) -> float:
        return forward(requests * (drafts + 1)) + (forward(requests * drafts) if drafts else 0)

    return step


class Machine:
    """Steps of these costs, with drafts kept at these chances."""

    def __init__(self, policy: ModePolicy, rows_per_forward: float, noise: float = 0.03) -> None:
        self.policy, self.knee, self.noise = policy, rows_per_forward, noise
        self.random, self.scheduled, self.names = random.Random(0), 0, count()
        self.modes: list[int] = []

    def forward(self, rows: int) -> float:
        return 1 + (rows - 1) / self.knee

    def seconds(self, requests: int, verified: int, drafting: int) -> float:
        return self.forward(requests * (verified + 1)) + (self.forward(requests * drafting) if drafting else 0)

    def serve(self, chance: Chance, tokens: int, requests: int = 1) -> float:
        """Tokens per second over answers of this length, all of which begin together."""
        names = [next(self.names) for _ in range(requests)]
        said, clock, verified = dict.fromkeys(names, 0), 0.0, 0
        while min(said.values()) < tokens:
            drafting = self.policy.choose(names, 1000)
            self.modes.append(drafting)
            spent = self.seconds(requests, verified, drafting) * (1 + self.noise * self.random.random())
            outcomes, before = [], sum(said.values())
            for name in names:
                accepted = 0
                while accepted < verified and self.random.random() < chance(said[name]):
                    accepted += 1
                said[name] += accepted + 1
                if verified:
                    outcomes.append(Outcome(name, verified, accepted))
            self.policy.verified(outcomes)
            step = Step(requests, 1000, verified, drafting, spent)
            self.policy.observe(step)
            self.policy.gave(sum(said.values()) - before, step)
            clock, verified = clock + spent, drafting
        for name in names:
            self.policy.finished(name)
        return sum(said.values()) / clock

    def fixed(self, drafts: int, chance: Chance, requests: int = 1) -> float:
        """The expected rate of one mode alone."""
        expected = survive = 1.0
        for _ in range(drafts):
            survive *= chance(0)
            expected += survive
        return requests * expected / self.seconds(requests, drafts, drafts)

    def best(self, chance: Chance, requests: int = 1) -> tuple[int, float]:
        return max(((k, self.fixed(k, chance, requests)) for k in MODES), key=lambda one: one[1])


def test_predictable_text_is_drafted_far() -> None:
    machine = Machine(ModePolicy(MODES, costs(20)), rows_per_forward=20)
    rate = machine.serve(lambda said: 0.95, 2000)
    mode, best = machine.best(lambda said: 0.95)
    assert rate >= 0.95 * best > 1.8
    assert machine.modes.count(mode) > 0.8 * len(machine.modes)


@pytest.mark.parametrize("wrong", [4, 100])
def test_a_wrong_idea_of_the_machine_is_corrected(wrong: float) -> None:
    machine = Machine(ModePolicy(MODES, costs(wrong)), rows_per_forward=20)
    machine.serve(lambda said: 0.9, 300)
    assert machine.serve(lambda said: 0.9, 2000) >= 0.95 * machine.best(lambda said: 0.9)[1]


@pytest.mark.parametrize("requests", [1, 2, 8, 64])
def test_never_much_slower_than_plain(requests: int) -> None:
    """Text that no draft foresees; the first answers, too."""
    machine = Machine(ModePolicy(MODES, costs(20)), rows_per_forward=20)
    plain = machine.fixed(0, lambda said: 0.1, requests)
    assert machine.serve(lambda said: 0.1, 128, requests) >= 0.9 * plain
    assert machine.serve(lambda said: 0.1, 1000, requests) >= 0.97 * plain
    assert machine.modes.count(0) > 0.9 * len(machine.modes)


def test_classes_in_turn() -> None:
    """Hard text does not keep easy text behind it from being drafted, nor the other way round."""
    machine = Machine(ModePolicy(MODES, costs(20)), rows_per_forward=20)
    machine.serve(lambda said: 0.1, 1000)
    for chance in (0.95, 0.1, 0.95, 0.1):
        rate = machine.serve(lambda said, chance=chance: chance, 256)
        assert rate >= 0.8 * machine.best(lambda said, chance=chance: chance)[1]


def test_text_that_changes_its_nature_is_noticed() -> None:
    machine = Machine(ModePolicy(MODES, costs(20)), rows_per_forward=20)
    machine.serve(lambda said: 0.05 if said < 500 else 0.95, 2000)
    assert sum(mode == 15 for mode in machine.modes[-50:]) > 40


def test_pauses_of_the_machine_change_nothing() -> None:
    machine = Machine(ModePolicy(MODES, costs(20)), rows_per_forward=20)
    machine.serve(lambda said: 0.95, 500)
    before = machine.policy.choose(["a"], 1000)
    assert before > 0
    machine.policy.observe(Step(1, 1000, before, before, 500.0))
    assert machine.policy.choose(["a"], 1000) == before


@pytest.mark.parametrize("times", [3.0, 6.0])
def test_plain_steps_that_were_timed_beside_other_work(times: float) -> None:
    """Drafting seems to pay by what was seen before serving, and does not: that must not go on for long."""
    policy = ModePolicy(MODES, costs(20))
    machine = Machine(policy, rows_per_forward=20)
    for drafts in MODES:
        seconds = machine.seconds(1, drafts, drafts) * (times if drafts == 0 else 1)
        policy.clock.believe(Step(1, 1000, drafts, drafts, seconds))
    plain = machine.fixed(0, lambda said: 0.3)
    machine.serve(lambda said: 0.3, 100)
    assert machine.serve(lambda said: 0.3, 500) >= 0.95 * plain


def test_what_cannot_pay_is_not_tried() -> None:
    machine = Machine(ModePolicy(MODES, costs(4)), rows_per_forward=4)
    machine.serve(lambda said: 0.95, 500, requests=256)
    assert set(machine.modes[20:]) == {0}


@pytest.mark.parametrize("promised", [0.8, 0.95, 1.04])
def test_trials_that_fail_are_paid_for_in_the_end(promised: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is foretold never comes true, and nothing is learnt of that: no more is lost than was set aside."""
    policy = ModePolicy(MODES, costs(1e6))  # a step with drafts takes two plain ones
    tokens = [1.0] + [2 * promised] * MODES[-1]
    monkeypatch.setattr(policy.kept, "tokens", lambda requests, rode, prior: np.array(tokens) * len(requests))
    machine = Machine(policy, rows_per_forward=1e6)
    plain = machine.fixed(0, lambda said: 0.0) / (1 + machine.noise / 2)
    assert machine.serve(lambda said: 0.0, 3000) >= 0.97 * plain
    assert set(machine.modes) > {0}, "none was made"


def test_drafts_that_only_ride() -> None:
    """There is no pass of their own to learn from first."""
    machine = Machine(ModePolicy((0, 15), costs(200), lambda requests: True), rows_per_forward=200)
    assert machine.serve(lambda said: 0.95, 1000) >= 0.9 * machine.fixed(15, lambda said: 0.95)


def test_what_batches_taught_is_no_matter_of_one_request() -> None:
    """Hard text and then easy text leave behind what was foretold wrongly on the way."""
    kept = KeptBothWays(15)
    for accepted in (0, 15):
        for _ in range(8):
            kept.add([Outcome((accepted, request), 15, accepted) for request in range(64)], False)
    batch, one = kept.alone.expected(["new"] * 64)[0][0, -1], kept.alone.expected(["new"])[0][0, -1]
    assert one == pytest.approx(kept.alone._foretell([0], PRIOR)[0, -1]) and batch > 1.05 * one


@pytest.mark.parametrize("requests", [1, 8])
@pytest.mark.parametrize("chance", [0.1, 0.95])
def test_what_it_was_worth(chance: float, requests: int) -> None:
    """Plain steps are seen now and then only, and drafts of the newest step have given nothing yet."""
    machine = Machine(ModePolicy(MODES, costs(20)), rows_per_forward=20)
    rate = machine.serve(lambda said: chance, 1000, requests)
    plain = machine.fixed(0, lambda said: chance, requests) / (1 + machine.noise / 2)
    found = machine.policy.worth.speed_up
    assert found == pytest.approx(rate / plain, rel=0.02)
    assert found > 1.5 if (chance, requests) == (0.95, 1) else found > 0.9

    # A planted fault: failed trials are left out.
    machine = Machine(policy := ModePolicy(MODES, costs(20)), rows_per_forward=20)
    gave = policy.gave
    policy.gave = lambda tokens, step: gave(tokens, step) if tokens > requests else None  # type: ignore[method-assign]
    rate = machine.serve(lambda said: chance, 1000, requests)
    assert policy.worth.speed_up != pytest.approx(rate / plain, rel=0.02)


def test_planted_fault_inverted_costs() -> None:
    """The gate that this file is: a clock that takes slow for fast turns it red."""

    class Inverted(Machine):
        def serve(self, *arguments: object, **named: object) -> float:  # type: ignore[override]
            observe = self.policy.observe
            self.policy.observe = lambda step: observe(step._replace(seconds=1 / step.seconds))  # type: ignore[method-assign]
            return super().serve(*arguments, **named)  # type: ignore[arg-type]

    machine = Inverted(ModePolicy(MODES, costs(20)), rows_per_forward=2)
    for drafts in MODES:
        machine.policy.clock.believe(Step(8, 1000, drafts, drafts, 1 / machine.seconds(8, drafts, drafts)))
    rate = machine.serve(lambda said: 0.1, 1000, 8)
    assert rate < 0.5 * machine.fixed(0, lambda said: 0.1, 8)
