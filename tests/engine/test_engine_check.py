"""The check kit for the whole engine must be right the first time it meets a GPU: here it runs on a CPU."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import engine_check
from benchmarks.engine_check import EngineEvidence
from tests.engine.conftest import THOROUGH

ON_A_CPU = {"max_num_batched_tokens": 1024, "kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}


@pytest.fixture
def evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineEvidence:
    run_engine = engine_check.run_engine

    def run(task: dict[str, Any], timeout: float) -> dict[str, Any]:
        return run_engine(task | {"engine": task["engine"] | ON_A_CPU}, timeout)

    monkeypatch.setattr(engine_check, "run_engine", run)
    ways = {way: engine_check.WAYS[way] for way in ("plain", "one pass")}
    monkeypatch.setattr(engine_check, "WAYS", ways)
    return EngineEvidence(tmp_path / "evidence.json", {})


@pytest.mark.skipif(not THOROUGH, reason="four engines of their own; ORTHRUS_TEST_ALL_PROMPTS=1 starts them")
def test_right_first_and_then_timed(evidence: EngineEvidence, capsys: pytest.CaptureFixture[str]) -> None:
    assert engine_check.check(evidence, time.monotonic() + 500, per_class=1, length=24), evidence.red
    tiny = json.loads((engine_check.TINY / "base" / "config.json").read_text())
    engine_check.measure(evidence, time.monotonic() + 500, tiny, [(1, 32), (2, 40)])
    assert not evidence.failed
    written = json.loads(evidence.path.read_text())
    steps = written["seconds_per_step"]["one pass"]["steps"]
    assert [(step["requests"], step["context"]) for step in steps] == [(1, 32), (2, 40)]
    assert all(step["mean"] > 0 for step in steps)
    assert "one pass, 2 x 40" in capsys.readouterr().out


COUNTED = {"vllm:spec_decode_num_drafts": 10, "vllm:spec_decode_num_accepted_tokens": 30, "vllm:orthrus_hits": 4}


@pytest.mark.parametrize(
    ("changes", "text", "problem"),
    [
        ({}, [1, 2], None),
        ({}, [1, 3], "texts differ"),
        ({"vllm:spec_decode_num_accepted_tokens": 3}, [1, 2], "tokens per cycle"),
        ({"vllm:orthrus_hits": 0}, [1, 2], "no outcome was foreseen"),
    ],
)
def test_what_turns_it_red(changes: dict[str, int], text: list[int], problem: str | None) -> None:
    said = {"plain": [[1, 2]], "one pass": [text]}
    found = engine_check.judge("one pass", {"counted": COUNTED | changes}, said)
    assert len(found) == (problem is not None)
    assert all(problem is not None and problem in line for line in found)


def test_an_engine_that_fails_is_reported(evidence: EngineEvidence, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(task: dict[str, Any], timeout: float) -> dict[str, Any]:
        raise RuntimeError("no such device")

    monkeypatch.setattr(engine_check, "run_engine", broken)
    assert not engine_check.check(evidence, time.monotonic() + 500, per_class=1, length=8)
    assert "no such device" in json.loads(evidence.path.read_text())["failed"]["correctness, plain"]
