"""A selector as a GPU runs it: every kernel in Triton's form, interpreted, against the twins."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.checkpoints import write_selector
from tests.engine.conftest import Checkpoints, StartEngine, one_pass
from tests.engine.harness import Run, prompts
from tests.rehearsal.launches import Launch, Recorder
from vllm_orthrus.engine.speculator import OrthrusSpeculator
from vllm_orthrus.kernels.forms import SETTING

ROWS = {"orthrus_block_size": 5, "num_speculative_tokens": 4, "orthrus_hypotheses": 2, "orthrus_rows": 96}
GIVEN = prompts(3, shortest=9)


@pytest.fixture(autouse=True)
def _form() -> Iterator[None]:
    yield
    os.environ.pop(SETTING, None)


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["one", "two"])
def test_tells_what_the_twin_tells_and_launches_what_was_warmed_up(
    passes: str, start: StartEngine, tiny: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selector = {"orthrus_selector": str(write_selector(tmp_path / "selector"))}
    drawn = {"draft_sample_method": "probabilistic", "orthrus_passes": passes, "orthrus_modes": [0, 2, 4]}
    told = one_pass(tiny.block_head, **ROWS, **selector, **drawn)
    recorder, warm, warm_up = Recorder(), set[Launch](), OrthrusSpeculator._warm_up

    def remember(speculator: OrthrusSpeculator, *arguments: Any) -> None:
        recorder.take()
        warm_up(speculator, *arguments)
        warm.update(recorder.take())

    def tell() -> tuple[Run, Run]:
        engine = start(told, max_num_seqs=4)
        turns = iter([4, 4, 2, 4] * 100)
        scheduler: Any = engine.llm.llm_engine.engine_core.engine_core.scheduler
        monkeypatch.setattr(scheduler.dynamic_sd_lookup.policy, "choose", lambda requests, context: next(turns))
        return engine.run(GIVEN, 8), engine.run(GIVEN, 8, temperature=0.8, seed=3)

    os.environ[SETTING] = "torch"
    expected = tell()
    monkeypatch.setattr(OrthrusSpeculator, "_warm_up", remember)
    os.environ[SETTING] = "triton"
    with recorder.recording(monkeypatch):
        for found, wanted in zip(tell(), expected, strict=True):
            assert (found.tokens, found.counts) == (wanted.tokens, wanted.counts)
    launched = {launch for launch in recorder.take() if launch.kernel in ("_scan_kernel", "_select_kernel")}
    assert {launch.kernel for launch in launched} == {"_scan_kernel", "_select_kernel"}
    assert launched <= warm, sorted(launched - warm)
