"""The engine with every kernel of ours in the form that a GPU runs, interpreted."""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.engine.conftest import Checkpoints, StartEngine, one_pass
from tests.engine.harness import Counts, Engine, prompts
from tests.rehearsal.launches import Launch, Recorder
from vllm_orthrus.kernels.forms import SETTING
from vllm_orthrus.speculator import OrthrusSpeculator

ROWS = {"orthrus_block_size": 5, "num_speculative_tokens": 4, "orthrus_hypotheses": 3, "orthrus_rows": 96}
GIVEN = prompts(5, shortest=9)


class Told(NamedTuple):
    """All that an engine says and counts."""

    greedy: list[list[int]]
    sampled: list[list[int]]
    counts: Counts
    accepted_at: dict[int, int]
    one_pass: Counter[str]


def told_by(engine: Engine) -> Told:
    greedy = engine.run(GIVEN, 14)
    sampled = engine.run(GIVEN[:4], 10, temperature=0.8, seed=3)
    counts = Counts(*(one + other for one, other in zip(greedy.counts, sampled.counts, strict=True)))
    return Told(greedy.tokens, sampled.tokens, counts, dict(engine.accepted_at), engine.one_pass)


@pytest.fixture
def form(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield
    os.environ.pop(SETTING, None)


def told_in(form: str, start: StartEngine, config: dict[str, Any], **options: Any) -> Told:
    os.environ[SETTING] = form
    engine = start(config, max_num_seqs=5, **options)
    attention = type(engine.runner.speculator.attention).__name__
    assert attention == {"torch": "GatherAttention", "triton": "KernelAttention"}[form]
    return told_by(engine)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("passes", ["one", "two"])
def test_tells_what_the_twins_tell(passes: str, start: StartEngine, tiny: Checkpoints) -> None:
    """Batches of up to five requests: the text, and every counter of acceptance and of foreseen outcomes."""
    config = one_pass(tiny.block_head, orthrus_passes=passes, **ROWS)
    twins, interpreted = (told_in(form, start, config) for form in ("torch", "triton"))
    assert interpreted == twins
    assert twins.counts.accepted > 0
    if passes == "one":
        assert twins.one_pass["hits"] > 0
        assert twins.one_pass["bonus_missed"] > 0


@pytest.mark.usefixtures("form")
def test_every_step_launches_what_was_warmed_up(
    start: StartEngine, tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every number of requests, so that none waits for a compiler."""
    os.environ[SETTING] = "triton"
    recorder, warm, warm_up = Recorder(), set[Launch](), OrthrusSpeculator._warm_up

    def remember(speculator: OrthrusSpeculator, *arguments: Any) -> None:
        recorder.take()
        warm_up(speculator, *arguments)
        warm.update(recorder.take())

    monkeypatch.setattr(OrthrusSpeculator, "_warm_up", remember)
    with recorder.recording(monkeypatch):
        engine = start(one_pass(tiny.block_head, **ROWS), max_num_seqs=5)
        for count in (1, 2, 3, 4, 5):
            engine.run(prompts(count, shortest=7), 5)
    launched = recorder.take()
    assert {launch.kernel for launch in launched} >= {"attend", "_choose", "_match", "_scan", "_merge", "_prepare"}
    assert launched <= warm, sorted(launched - warm)
