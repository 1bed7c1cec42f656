"""Plain steps, and drafts of any number, in turns and as the policy chooses."""

from itertools import cycle
from typing import Any

import pytest
from prometheus_client import REGISTRY

from tests.engine.conftest import THOROUGH, Checkpoints, StartEngine
from tests.engine.harness import Engine, listen, prompts
from vllm_orthrus.engine.config import default_modes
from vllm_orthrus.patches.metrics import MODE_METRICS
from vllm_orthrus.patches.modes import AskPolicy
from vllm_orthrus.policy.clock import Step
from vllm_orthrus.policy.modes import ModePolicy


def policy_of(engine: Engine) -> ModePolicy:
    scheduler: Any = engine.llm.llm_engine.engine_core.engine_core.scheduler
    assert isinstance(scheduler.dynamic_sd_lookup, AskPolicy)
    return scheduler.dynamic_sd_lookup.policy


@pytest.fixture(scope="module")
def changing(start: StartEngine, tiny: Checkpoints) -> Engine:
    return start({"method": "orthrus", "model": str(tiny.block_head)})


def test_default_on_a_cpu(changing: Engine) -> None:
    config = changing.llm.llm_engine.vllm_config.speculative_config
    assert config.orthrus_passes == "two"
    assert config.orthrus_modes == default_modes(config.num_speculative_tokens)


def take_turns(policy: ModePolicy, patch: pytest.MonkeyPatch) -> list[int]:
    """Every change from a mode to another, again and again."""
    chosen: list[int] = []
    pairs = [mode for one in policy.modes for other in policy.modes for mode in (one, other)]
    turns = cycle(pairs)

    def choose(requests: Any, context: float) -> int:
        chosen.append(next(turns))
        return chosen[-1]

    patch.setattr(policy, "choose", choose)
    return chosen


def test_text_stays_the_same_through_all_changes(
    changing: Engine, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = take_turns(policy_of(changing), monkeypatch)
    given = [prompt[-40:] for prompt in prompts(200 if THOROUGH else 40)]
    run = changing.run(given, 24)
    assert run.tokens == plain.run(given, 24).tokens
    assert set(chosen) == set(policy_of(changing).modes)
    assert 0 < run.counts.accepted < run.counts.drafted


def test_drafts_are_right_through_all_changes(
    start: StartEngine, oracle_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a head that copies the base, in blocks of one row, so that every draft is kept."""
    engine = start(oracle_config | {"orthrus_modes": [0, 1], "orthrus_attention": "gather"})
    chosen = take_turns(policy_of(engine), monkeypatch)
    run = engine.run(prompts(8), 24)
    assert {0, 1} == set(chosen)
    assert 0 < run.counts.drafted == run.counts.accepted


def test_a_narrow_block_has_as_many_rows_as_drafts(changing: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: set[int] = set()
    draft_pass = changing.runner.speculator.draft_pass
    compute = draft_pass.compute

    def watched(num_reqs: int, context: Any, width: int) -> None:
        widths.add(width)
        compute(num_reqs, context, width)

    monkeypatch.setattr(draft_pass, "compute", watched)
    take_turns(policy_of(changing), monkeypatch)
    changing.run(prompts(2), 24)
    narrow = policy_of(changing).modes[1:-1]
    assert widths == {*narrow, draft_pass.shape.block}


def steps_of(engine: Engine, patch: pytest.MonkeyPatch) -> list[Step]:
    steps: list[Step] = []
    observe = ModePolicy.observe

    def watched(policy: ModePolicy, step: Step) -> None:
        steps.append(step)
        observe(policy, step)

    patch.setattr(ModePolicy, "observe", watched)
    return steps


def ends_plain(engine: Engine, patch: pytest.MonkeyPatch) -> bool:
    """With a head that is hardly ever right, most steps are soon plain."""
    steps = steps_of(engine, patch)
    for given in prompts(3, shortest=20):
        engine.run([given], 120)
    late = steps[len(steps) // 2 :]
    assert len(late) > 80
    # On busy cores steps take what they like, and a mode that happened to be fast stays a while.
    return sum(step.drafting == 0 for step in late) > 0.5 * len(late)


def test_drafts_that_do_not_pay_are_soon_given_up(start: StartEngine, tiny: Checkpoints, monkeypatch: Any) -> None:
    engine = start({"method": "orthrus", "model": str(tiny.block_head)})
    assert ends_plain(engine, monkeypatch)
    policy = policy_of(engine)
    assert len(policy.kept.alone.row) <= 1, "of requests that have ended nothing is kept, once the next step is planned"
    seconds = policy.clock.seconds(1, 40, policy.modes)
    assert 0 < seconds[0] < seconds[policy.modes[-1]]

    # A planted fault: a clock that takes slow for fast.
    faulty = start({"method": "orthrus", "model": str(tiny.block_head)})
    clock = policy_of(faulty).clock
    observe = clock.observe
    monkeypatch.setattr(clock, "observe", lambda step: observe(step._replace(seconds=1e-4 / step.seconds**2)))
    assert not ends_plain(faulty, monkeypatch)


def counted() -> dict[str, float]:
    """As `/metrics` has them, of the engine that was started last: vLLM lets go of those before."""
    families = {family.name: family for family in REGISTRY.collect()}
    return {
        name: sum(one.value for one in families[metric.name].samples if one.name.endswith("_total"))
        for name, metric in MODE_METRICS.items()
    }


def test_what_it_was_worth_is_told(start: StartEngine, tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the policy to `/metrics` and the log, once. Steps behind the last verification are told with the next."""
    changing = start({"method": "orthrus", "model": str(tiny.block_head)})
    logger, said = listen(changing, monkeypatch)
    take_turns(policy_of(changing), monkeypatch)
    before, told_before = counted(), dict(changing.one_pass)
    for _ in range(2):
        changing.run(prompts(3, shortest=20), 24)
        for name, seconds in counted().items():
            told = changing.one_pass[name] - told_before.get(name, 0)
            assert seconds - before[name] == pytest.approx(1e-6 * told) and told > 0
        worth = policy_of(changing).worth
        assert 0.5 * worth.seconds < 1e-6 * changing.one_pass["seconds"] <= worth.seconds + 1e-6
        assert 0.5 * worth.plain < 1e-6 * changing.one_pass["plain_seconds"] <= worth.plain + 1e-6
    logger.log()
    assert len([line for line in said if "times as fast as plain steps" in line]) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"orthrus_modes": [3, 5]}, "must name different numbers of drafts, among them 0"),
        ({"orthrus_modes": [0, 99]}, "which is the most"),
        ({"orthrus_modes": [0, 5, 9], "orthrus_passes": "one"}, r"for example \[0, 3, 6, 7\]"),
        ({"orthrus_modes": [0, 7], "num_speculative_tokens_per_batch_size": [(1, 8, 7)]}, "Leave one of them out"),
        ({"orthrus_modes": [0, 7], "orthrus_check_attention": True}, "no orthrus_check_attention"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str, tiny: Checkpoints, start: StartEngine) -> None:
    with pytest.raises(ValueError, match=message):
        start({"method": "orthrus", "model": str(tiny.block_head)} | settings)
