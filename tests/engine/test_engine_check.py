"""The check kit for the whole engine must be right the first time it meets a GPU: here it runs on a CPU."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import engine_check
from benchmarks.engine_check import OtherEnvironmentError, PhaseEvidence
from benchmarks.evidence import environment
from benchmarks.phases import PHASES, QWEN3_06B, Scale
from tests.engine.conftest import THOROUGH

ON_A_CPU = {"max_num_batched_tokens": 1024, "kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}
SMALL = QWEN3_06B | {
    "dtype": "float32",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 1088,
}
all_of_it = pytest.mark.skipif(not THOROUGH, reason="engines of their own; ORTHRUS_TEST_THOROUGH=1 starts them")


@pytest.fixture
def scale() -> Scale:
    prompts, stop = engine_check.tiny_prompts(per_class=1)
    return Scale(
        small=SMALL,
        large=SMALL,
        ways=("plain", "one pass"),
        prompts=prompts,
        stop=stop,
        length=16,
        at_once=(2,),
        rows=((1, 4),),
        rows_points=((1, 32), (1, 40)),
        points=((1, 32), (2, 40), (2, 1000)),
        block=4,
        drafts=3,
        steps=3,
        wide_dtype="float32",
        oracles=("float32",),
        engine=ON_A_CPU,
    )


def run(phase: str, scale: Scale, folder: Path, seconds: float = 500) -> PhaseEvidence:
    evidence = PhaseEvidence.open(folder, phase, environment())
    engine_check.run_phase(PHASES[phase], scale, evidence, time.monotonic() + seconds)
    return evidence


@pytest.mark.once
def test_the_oracle(tmp_path: Path, scale: Scale) -> None:
    evidence = run("oracle", scale._replace(prompts=scale.prompts[:2]), tmp_path)
    assert engine_check.state(evidence) == "right", (evidence.red, evidence.failed)
    (answers,) = json.loads(evidence.path.read_text())["engines"]["float32"]["answers"]
    assert answers["counted"]["vllm:spec_decode_num_draft_tokens"] >= 2 * 7
    assert any(answers["close"]), "no token ever came close to the best, so that ties can't be seen"


@all_of_it
def test_a_phase_goes_on_where_it_stopped(tmp_path: Path, scale: Scale, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain decoding, then time is up; the rest, and no engine twice."""
    estimate = PHASES["rows"].starts(scale, tmp_path)[0].seconds + PHASES["rows"].prepare_seconds
    first = run("rows", scale, tmp_path, seconds=estimate + 1)
    assert engine_check.state(first) == "unfinished"
    assert list(first.postponed) == ["8 rows"]
    assert list(first.engines) == ["plain"]
    second = run("rows", scale, tmp_path)
    assert engine_check.state(second) == "right", (second.red, second.failed)
    assert second.engines["plain"] == first.engines["plain"]
    steps = json.loads(second.path.read_text())["engines"]["8 rows"]["steps"]
    assert [(step["context"], step["rows"]) for step in steps] == [(32, 8), (40, 8)]
    assert all(0 < step["forward"] < step["mean"] for step in steps)
    capsys.readouterr()
    assert engine_check.check(["rows"], scale, tmp_path, environment(), minutes=1) == 0
    told = capsys.readouterr().out
    assert "has its evidence already" in told
    assert "8 rows: speed not shown, oracle has not shown that it is right" in told
    assert "plain              1 x 40" in told


@all_of_it
def test_the_tiny_model_in_two_ways(tmp_path: Path, scale: Scale) -> None:
    evidence = run("text", scale, tmp_path)
    assert engine_check.state(evidence) == "right", (evidence.red, evidence.failed)


@all_of_it
def test_the_tiny_model_in_a_larger_shape(tmp_path: Path, scale: Scale, capsys: pytest.CaptureFixture[str]) -> None:
    evidence = run("wide", scale, tmp_path)
    assert engine_check.state(evidence) == "right", (evidence.red, evidence.failed)
    told = "".join(engine_check.lines(evidence, PHASES["wide"].starts(scale, tmp_path), lambda way: None))
    assert "tokens per second" in told and "tokens per cycle" in told


@all_of_it
def test_steps(tmp_path: Path, scale: Scale) -> None:
    evidence = run("steps", scale, tmp_path)
    assert engine_check.state(evidence) == "right", (evidence.red, evidence.failed)
    *measured, last = evidence.engines["one pass"]["steps"]
    assert [(step["requests"], step["context"]) for step in measured] == [(1, 32), (2, 40)]
    assert "skipped" in last or last["mean"] > 0


# Without an engine

STEP = {"requests": 1, "context": 2048, "mean": 0.01, "forward": 0.008, "rows": None}
STARTED = {"seconds": 1.0, "eager": True, "passes": None, "draft_graphs": [], "cudagraph_mode": "NONE"}


def told(folder: Path, scale: Scale, capsys: pytest.CaptureFixture[str], **oracle: Any) -> str:
    """What is said of measured steps, when the oracle found this."""
    facts = environment()
    evidence = PhaseEvidence.open(folder, "steps", facts)
    for way in scale.ways:
        evidence.keep(way, {"started": STARTED})
        evidence.keep(way, {"step": STEP})
    evidence.finished = True
    evidence.write()
    for phase, found in (("oracle", oracle), ("text", {})):
        right = PhaseEvidence(engine_check.default_path(f"engine_check-{phase}", facts["gpu"], folder), facts, phase)
        right.engines = {way: {"answers": [{}]} for way in scale.ways}
        right.finished = True
        vars(right).update(found)
        right.write()
    engine_check.check(["steps"], scale, folder, facts, minutes=1)
    return capsys.readouterr().out


def test_speeds_of_what_is_right(tmp_path: Path, scale: Scale, capsys: pytest.CaptureFixture[str]) -> None:
    said = told(tmp_path, scale, capsys)
    assert "1.00 times plain" in said
    assert "not shown" not in said


def test_near_ties_keep_nothing_from_being_shown(
    tmp_path: Path, scale: Scale, capsys: pytest.CaptureFixture[str]
) -> None:
    said = told(tmp_path, scale, capsys, near_ties={"bfloat16": ["2 of 500 drafts were rejected"]})
    assert "1.00 times plain" in said
    assert "right, but for near ties" in said


def test_no_speed_of_what_is_wrong(tmp_path: Path, scale: Scale, capsys: pytest.CaptureFixture[str]) -> None:
    said = told(tmp_path, scale, capsys, red={"float32": ["99 of 100 drafts were rejected"]})
    assert "one pass: speed not shown, oracle is red" in said
    assert said.count("ms per step") == 1, "plain decoding is vLLM's own, and its speed stands"


def test_an_engine_that_fails_is_reported_and_the_next_one_runs(
    tmp_path: Path, scale: Scale, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(task: dict[str, Any], timeout: float, keep: engine_check.Keep) -> None:
        keep({"started": STARTED})
        keep({"step": STEP})
        raise RuntimeError("no such device")

    monkeypatch.setattr(engine_check, "run_engine", broken)
    run("steps", scale, tmp_path)
    written = json.loads(PhaseEvidence.open(tmp_path, "steps", environment()).path.read_text())
    assert set(written["failed"]) == set(scale.ways)
    assert all("no such device" in reason for reason in written["failed"].values())
    assert written["engines"]["one pass"]["steps"] == [STEP], "what was measured before is lost"
    assert not written["finished"]


def test_an_engine_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "engine_run.py").write_text(
        "import time\nprint('PART {\"started\": {}}', flush=True)\ntime.sleep(60)"
    )
    monkeypatch.setattr(engine_check, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    kept: list[dict[str, Any]] = []
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="did not end within 3 s"):
        engine_check.run_engine({"engine": {}}, 3, kept.append)
    assert time.monotonic() - start < 30
    assert kept == [{"started": {}}]


def test_findings_of_another_environment_are_not_added_to(tmp_path: Path) -> None:
    facts = environment()
    elsewhere = facts | {"packages": facts["packages"] | {"vllm": "0.1"}}
    evidence = PhaseEvidence.open(tmp_path, "rows", elsewhere)
    evidence.keep("plain", {"step": STEP})
    with pytest.raises(OtherEnvironmentError, match=r"packages: .*0\.1.*--anew"):
        PhaseEvidence.open(tmp_path, "rows", facts)
    assert PhaseEvidence.open(tmp_path, "rows", facts, anew=True).engines == {}
    later = elsewhere | {"date": "tomorrow", "commit": "unknown", "clocks": None}
    assert PhaseEvidence.open(tmp_path, "rows", later).engines["plain"]["steps"] == [STEP]


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["engine_check", "--phase", "rows"])
    assert engine_check.main() == 2
    assert "found none" in capsys.readouterr().out


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_fits_nine_minutes(phase: str, tmp_path: Path) -> None:
    """By its own estimate, at full size; and no engine is known by another's name."""
    starts = PHASES[phase].starts(Scale(), tmp_path)
    assert PHASES[phase].prepare_seconds + sum(start.seconds for start in starts) < 9 * 60
    assert len({start.name for start in starts}) == len(starts)


def test_the_rows_that_are_asked_for(tmp_path: Path) -> None:
    names = [start.name for start in PHASES["rows"].starts(Scale(), tmp_path)]
    assert names == ["plain", *(f"{rows} rows" for rows in (112, 128, 144, 240, 272))]
