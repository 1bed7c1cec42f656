"""What steps take is timed before an engine serves, and leaves no trace but that."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import envs

from tests.engine.conftest import Checkpoints, StartEngine
from tests.engine.harness import Engine, prompts
from tests.engine.test_modes import policy_of
from vllm_orthrus.engine import timing
from vllm_orthrus.policy.clock import Clock, Step

Start = Callable[..., Engine]


@pytest.fixture
def begin(start: StartEngine, tiny: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Engines whose cache folder is empty at first."""
    monkeypatch.setattr(envs, "VLLM_CACHE_ROOT", str(tmp_path), raising=False)

    def begin_engine(enable_prefix_caching: bool = False, **settings: Any) -> Engine:
        speculative = {"method": "orthrus", "model": str(tiny.block_head)} | settings
        return start(speculative, enable_prefix_caching=enable_prefix_caching)

    return begin_engine


def clock_of(engine: Engine) -> Clock:
    return policy_of(engine).clock


def test_timed_once_and_kept(begin: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = begin()
    clock, modes = clock_of(engine), policy_of(engine).modes
    assert {(cell.drafts, cell.requests) for cell in clock.known} == {(drafts, n) for drafts in modes for n in (1, 4)}
    seconds = clock.seconds(4, timing.PROMPT, modes)
    assert 1e-4 < seconds[0] < seconds[modes[-1]] < 1
    (file,) = tmp_path.rglob("steps-*.json")
    assert json.loads(file.read_text())["of"]["settings"]["orthrus_modes"] == str(list(modes))
    assert not engine.llm.llm_engine.has_unfinished_requests()

    monkeypatch.setattr(timing, "time_modes", lambda *arguments: pytest.fail("it was kept"))
    assert clock_of(begin()).known == clock.known
    # Other settings are other steps.
    with pytest.raises(BaseException, match="it was kept"):
        begin(orthrus_block_size=4, num_speculative_tokens=4)


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "[]",
        '{"steps": []}',
        '{"steps": [[1]]}',
        '{"steps": [[1, 48, 0, 0, "soon"]]}',
        '{"steps": [[1, 48, 0, 0, -1]]}',
        '{"steps": 3}',
        "\\x00",
    ],
)
def test_damaged_file_is_as_good_as_none(tmp_path: Path, damaged: str) -> None:
    file = tmp_path / "steps.json"
    assert timing.remembered(file) is None
    steps = [Step(1, 48, 0, 0, 0.01)]
    timing.remember(file, {"model": "mine"}, steps)
    assert timing.remembered(file) == steps
    file.write_text(damaged)
    assert timing.remembered(file) is None


def test_little_time(begin: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first kind of batch is timed as far as it goes, and no other."""
    monkeypatch.setattr(timing, "SECONDS_ON_CPUS", 1e-3)
    known = clock_of(begin()).known
    assert {cell.requests for cell in known} == {1}


def test_nothing_but_time_is_left(begin: Start, plain: Engine, tmp_path: Path) -> None:
    """Seeds of requests that bring none are drawn as if nothing had run before, and the policy knows of no text."""

    def state() -> tuple[list[int], list[int]]:
        return np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[union-attr]

    assert not clock_of(begin(orthrus_time_modes=False)).known
    assert not list(tmp_path.rglob("*"))
    untimed = state()
    timed = begin(enable_prefix_caching=True)
    assert state() == untimed
    pool = timed.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool  # type: ignore[attr-defined]
    assert not len(pool.cached_block_hash_to_block)
    kept = policy_of(timed).kept
    assert not kept.alone.row and not kept.alone.tried.any()
    assert timed.run(prompts(3), 16).tokens == plain.run(prompts(3), 16).tokens


def test_steps_that_are_scheduled_ahead(begin: Start, asynchronous: None) -> None:
    """Their outputs come a step late: none is left for the first request that is served."""
    engine = begin()
    core = engine.llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    assert core.async_scheduling and core.batch_queue is not None and not core.batch_queue
    assert not core.scheduler.dynamic_sd_lookup.asked_at
    policy = policy_of(engine)
    assert policy.clock.known and not policy.kept.alone.row


def test_the_middle_one_tells_where_steps_overlap() -> None:
    """A round that is slow throughout, as first ones are, and one in which a step was looked at late."""
    late = [3.0, 3.1, 3.2, 1.0, 1.6, 0.4]
    steps = [Step(1, 48, 3, 3, seconds) for seconds in late[:3]] + [Step(1, 48, 0, 0, 0.5)] * 3
    steps += [Step(1, 48, 3, 3, seconds) for seconds in late[3:]]
    told = {ahead: {step.drafting: step.seconds for step in timing.fastest(steps, ahead)} for ahead in (True, False)}
    assert told == {True: {3: 1.0, 0: 0.5}, False: {3: 0.4, 0: 0.5}}
