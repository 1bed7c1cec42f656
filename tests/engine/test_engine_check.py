"""The check kit for the whole engine must be right the first time it meets a GPU: here it runs on a CPU."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import engine_check, phases
from benchmarks.engine_check import OtherEnvironmentError, PhaseEvidence
from benchmarks.evidence import environment
from benchmarks.near_ties import BOUNDS
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
all_of_it = pytest.mark.skipif(not THOROUGH, reason="engines of their own; ORTHRUS_TEST_ALL_PROMPTS=1 starts them")


@pytest.fixture
def scale() -> Scale:
    prompts, stop = engine_check.tiny_prompts(per_class=1)
    return Scale(
        small=SMALL,
        large=SMALL,
        ways=("plain", "one pass"),
        prompts=prompts,
        stop=stop,
        length=24,
        at_once=(2,),
        rows=((1, 4),),
        rows_points=((1, 32), (1, 40)),
        points=((1, 32), (2, 40), (2, 1000)),
        block=4,
        steps=3,
        wide_dtype="float32",
        oracles=("float32",),
        engine=ON_A_CPU,
    )


def run(phase: str, scale: Scale, folder: Path, seconds: float = 500) -> PhaseEvidence:
    evidence = PhaseEvidence.open(folder, phase, environment())
    engine_check.run_phase(PHASES[phase], scale, evidence, time.monotonic() + seconds)
    return evidence


def test_the_oracle(tmp_path: Path, scale: Scale) -> None:
    evidence = run("oracle", scale._replace(prompts=scale.prompts[:3]), tmp_path)
    assert engine_check.state(evidence) == "right", (evidence.red, evidence.failed)
    (answers,) = json.loads(evidence.path.read_text())["engines"]["float32"]["answers"]
    assert answers["counted"]["vllm:spec_decode_num_draft_tokens"] >= 3 * 12
    assert any(answers["close"]), "no token ever came close to the best, so that ties can't be seen"


def test_a_phase_goes_on_where_it_stopped(
    tmp_path: Path, scale: Scale, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plain decoding, then time is up; the rest, and no engine twice."""
    estimate = PHASES["rows"].starts(scale, tmp_path)[0].seconds + PHASES["rows"].prepare_seconds
    first = run("rows", scale, tmp_path, seconds=estimate + 1)
    assert engine_check.state(first) == "failed"
    assert "no time" in first.failed["20 rows"]
    assert list(first.engines) == ["plain"]
    second = run("rows", scale, tmp_path)
    assert engine_check.state(second) == "right", (second.red, second.failed)
    assert second.engines["plain"] == first.engines["plain"]
    steps = json.loads(second.path.read_text())["engines"]["20 rows"]["steps"]
    assert [(step["context"], step["rows"]) for step in steps] == [(32, 20), (40, 20)]
    assert all(0 < step["forward"] < step["mean"] for step in steps)
    capsys.readouterr()
    assert engine_check.check(["rows"], scale, tmp_path, environment(), minutes=1) == 0
    told = capsys.readouterr().out
    assert "has its evidence already" in told
    assert "20 rows: speed not shown, oracle has not shown that it is right" in told
    assert "plain              1 x 40" in told
