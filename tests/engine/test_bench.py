"""`vllm-orthrus bench` from the command line to its files, with real servers and real engines."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_orthrus.cli.main import main

TINY = Path(__file__).parents[2] / "examples" / "tiny-orthrus"
ASKED = [
    *("--model", str(TINY / "base"), "--head", str(TINY / "head"), "--dataset", str(TINY / "heldout.jsonl")),
    *("--classes", "counting", "--tokens", "24", "--dtype", "float32"),
]
SMALL = [
    "--",
    "--enforce-eager",
    "--max-model-len",
    "512",
    "--max-num-seqs",
    "4",
    "--kv-cache-memory-bytes",
    "67108864",
]

pytestmark = pytest.mark.slow


def bench(what: str, folder: Path, *more: str) -> dict[str, Any]:
    out = folder / "found.json"
    assert main(["bench", what, *ASKED, "--out", str(out), *more, *SMALL]) == 0
    assert out.with_suffix(".png").stat().st_size > 10_000
    with out.with_suffix(".csv").open() as lines:
        assert list(csv.DictReader(lines))
    found: dict[str, Any] = json.loads(out.read_text())
    assert found["environment"]["packages"]["transformers"]
    return found


@pytest.mark.parametrize("over", ["servers", "engines"])
def test_throughput(over: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--ways", "plain", "two", "--concurrency", "2", "--rounds", "1", "--per-client", "1"]
    found = bench("throughput", tmp_path, *asked, *(["--offline"] if over == "engines" else []))
    assert found["same_text"] == {"two": "all 8 answers are plain decoding's"} and not found["red"]
    plain, two = found["rounds"]
    assert (plain["way"], two["way"]) == ("plain", "two")
    assert (
        plain["requests"] == 2 and plain["tokens"] == two["tokens"] > 24 and min(plain["seconds"], two["seconds"]) > 0
    )
    assert plain["cycles"] == 0, "the baseline drafts"
    assert 0 < two["accepted"] < two["drafted"] and not found["flags"]
    assert found["summary"]["2"]["counting"]["two"]["verdict"] == "no difference seen", "of a single round"
    assert ("median_tpot_ms" in plain) == (over == "servers")
    printed = capsys.readouterr().out
    assert "2 at once" in printed
    if over == "servers" and not torch.cuda.is_available():
        # On a CPU only this package makes vLLM's second model runner work: who runs it is not stock vLLM.
        logs = Path(printed.splitlines()[0].rpartition(" ")[2])
        runners = {way: "V1 model runner" in (logs / f"{way}.log").read_text() for way in ("plain", "two")}
        assert runners == {"plain": True, "two": False}


def test_acceptance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counting is foreseen well; two forwards a cycle halve it."""
    found = bench("acceptance", tmp_path, "--ways", "two", "--per-class", "2")["summary"]["two"]["counting"]
    assert found["prompts"] == 2 and found["cycles"] > 0
    assert 2 < found["tokens_per_cycle"] < 16
    assert found["tokens_per_forward"] == pytest.approx(found["tokens_per_cycle"] / 2, rel=0.15)
    kept = found["accepted_at"]
    assert kept == sorted(kept, reverse=True) and sum(kept) == pytest.approx(found["tokens_per_cycle"] - 1)
    assert "counting" in capsys.readouterr().out


def test_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every mode with every size of a batch, whatever the engine had timed before it served."""
    out = tmp_path / "cost.json"
    sizes = ["--concurrency", "1", "3", "--context", "48", "--dtype", "float32"]
    assert main(["bench", "cost", *ASKED[:4], *sizes, "--out", str(out), *SMALL]) == 0
    found = json.loads(out.read_text())
    assert {(step["requests"], step["drafting"]) for step in found["steps"]} == {
        (requests, drafts) for requests in (1, 3) for drafts in (0, 3, 7, 15)
    }
    assert {step["timed_before"] for step in found["steps"]} == {True, False}
    assert all(0 < step["seconds"] < 5 and step["foretold"] > 0 for step in found["steps"])
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "not timed before" in capsys.readouterr().out


def test_lossless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain decoding against itself, and drafting against it, with the logits of what was likely."""
    out = tmp_path / "lossless.json"
    asked = ["--ways", "two", "--per-class", "3", "--at-once", "1", "3", "--out", str(out)]
    assert main(["bench", "lossless", *ASKED[:-2], *asked, *SMALL]) == 0
    found = json.loads(out.read_text())
    names = [(one["way"], one["at_once"]) for one in found["comparisons"]]
    assert names == [("plain", 3), ("two", 1), ("two", 3)]
    assert found["bound"] == 0.5, "bfloat16 is what it asks for by default"
    assert 0 < found["tied"]["places"] <= 3 * 24
    partings = [parted for one in found["comparisons"] for parted in one["partings"]]
    assert all(0 <= parted["best_logit"] - parted["second_logit"] <= parted["gap"] < 0.5 for parted in partings)
    assert [one["equal"] + len(one["partings"]) for one in found["comparisons"]] == [3, 3, 3]
    with out.with_suffix(".csv").open() as lines:
        assert len(list(csv.DictReader(lines))) == len(partings)
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "largest gap" in capsys.readouterr().out
