"""Examples that people start from, as they would run them, with the tiny model."""

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pyarrow.parquet
import pytest

from examples.chat import FORM, TOOL
from tests.serve import servers, traffic
from tests.serve.readmes import ROOT, changed, commands
from tests.serve.servers import FEW_BLANKS, TINY
from tests.serve.traffic import Pool
from vllm_orthrus.demo.server import Server, free_port
from vllm_orthrus.training.samples import read_jsonl

EXAMPLES = ROOT / "examples"
SMALL = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # GiB


def run(name: str, *arguments: str) -> str:
    return all_said(name, *arguments).stdout


def all_said(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=servers.PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_offline() -> None:
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "kv_cache_memory_bytes": 32 << 20}
    given = ["--model", str(TINY / "base"), "--head", str(TINY / "head"), "--tokens", "96"]
    said = run("offline.py", "Count from 3 to 30.", *given, "--options", json.dumps(options))
    cycles = re.search(r"\d+ tokens in .* s, ([\d.]+) tokens per cycle of (\d+)", said)
    assert cycles is not None and float(cycles[1]) > 1.2, "vLLM's counters say that drafts were kept"


def test_chat(server: Server) -> None:
    parameters = json.dumps(FEW_BLANKS)
    said = run("chat.py", "--url", f"{server.url}/v1", "--parameters", parameters)
    answers = dict(line.split(": ", 1) for line in said.splitlines() if ": " in line)
    assert answers["stream"] and answers["turns"]
    jsonschema.validate(json.loads(answers["form"]), FORM)
    call = re.fullmatch(r"add\((.*)\)", answers["tools"])
    assert call is not None
    jsonschema.validate(json.loads(call[1]), TOOL["function"]["parameters"])


@pytest.mark.slow
@pytest.mark.thorough
def test_ray_data(tmp_path: Path) -> None:
    """Two replicas; every row once, with its own answer, which is the one that vLLM gives without drafts."""
    pytest.importorskip("ray.data")
    records = [record for record in read_jsonl(TINY / "heldout.jsonl") if record["class"] in ("json", "log")][:24]
    asked = {"prompt": [one["prompt"] for one in records], "number": list(range(len(records)))}
    pyarrow.parquet.write_table(pyarrow.table(asked), tmp_path / "prompts.parquet")
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": 32 << 20}
    given = ["--model", str(TINY / "base"), "--head", str(TINY / "head"), "--tokens", "48", "--replicas", "2"]
    answers = []
    for name, further in (("drafting", []), ("plain", ["--plain"])):
        where = [str(tmp_path / "prompts.parquet"), str(tmp_path / name)]
        done = all_said("ray_data.py", *where, "--cpus", "1", "--options", json.dumps(options), *given, *further)
        assert f"{len(records)} answers" in done.stdout
        assert ("Orthrus head" in done.stdout + done.stderr) == (name == "drafting"), "Ray hands on what replicas log"
        answers.append(sorted(pyarrow.parquet.read_table(tmp_path / name).to_pylist(), key=lambda row: row["number"]))
    assert answers[0] == answers[1]
    assert [(row["prompt"], row["number"]) for row in answers[0]] == list(zip(*asked.values(), strict=True))
    assert all(row["answer"] and row["tokens"] > 0 for row in answers[0])


@pytest.mark.slow
@pytest.mark.thorough
def test_a_target_of_four_bits(tmp_path: Path) -> None:
    """With the head of the model as it was before."""
    from tests.engine.test_features_models import quantize

    options = {"dtype": "float16", "enforce_eager": True, "max_model_len": 256, "kv_cache_memory_bytes": 32 << 20}
    given = ["--model", str(quantize(tmp_path / "four-bits", "int4")), "--head", str(TINY / "head"), "--tokens", "96"]
    said = run("offline.py", "Count from 3 to 30.", *given, "--options", json.dumps(options))
    cycles = re.search(r"([\d.]+) tokens per cycle", said)
    assert cycles is not None and float(cycles[1]) > 1.2


def of_yours(command: list[str], folder: Path) -> Server:
    """The README's, with the tiny model, a machine of two cores, and a head that is known by the model's name."""
    port, heads = free_port(), folder / "heads.json"
    heads.write_text(json.dumps({str(TINY / "base"): str(TINY / "head")}))
    smaller = changed(command, {"Qwen/Qwen3-8B": str(TINY / "base"), "32768": "1024"})
    served = ["--port", str(port), "--served-model-name", servers.MODEL]
    variables = {"VLLM_ORTHRUS_HEADS": str(heads), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    name = "after.log" if "--speculative-config" in command else "before.log"
    return Server([*smaller, *served, *servers.OPTIONS], port, folder / name, servers.PATIENCE, variables)


@pytest.mark.slow
@pytest.mark.thorough
def test_from_a_command_of_yours(tmp_path: Path) -> None:
    """Before and after, with two ranks of tensor parallelism; one of them drafts, and both say the same."""
    before, after = commands(EXAMPLES / "README.md", "vllm serve")
    assert after == [*before, "--speculative-config", '{"method":"orthrus"}']
    assert before[before.index("--tensor-parallel-size") + 1] == "2"
    pool = Pool(seed=5)
    asked, texts = [pool.request("short") for _ in range(8)], []
    for command, drafts in ((before, False), (after, True)):
        with of_yours(command, tmp_path) as server:
            answers = asyncio.run(traffic.answer_all(server.url, [one for one in asked if one.greedy]))
            assert (server.draft_counters().accepted > 0) == drafts
        texts.append({key: answer.answers[0].text for key, answer in answers.items()})
    assert texts[0] == texts[1] and all(texts[0].values())


@pytest.mark.slow
@pytest.mark.thorough
def test_a_head_of_your_own(tmp_path: Path) -> None:
    """With few prompts and few steps; what comes of it serves."""
    config = tmp_path / "train.yaml"
    config.write_text((EXAMPLES / "own_head" / "train.yaml").read_text().replace("runs/own-head", str(tmp_path)))
    changes = {"examples/own_head/train.yaml": str(config), "runs/own-head": str(tmp_path)}
    fewer = {"prompts.py": ["--count", "40"], "train": ["--set", "run.max_steps=30"], "verify": ["--per-class", "2"]}
    said = []
    for command in commands(EXAMPLES / "own_head" / "README.md"):
        less = next((given for name, given in fewer.items() if any(word.endswith(name) for word in command)), [])
        done = subprocess.run(
            [*changed(command, changes), *less],
            cwd=ROOT,
            env=SMALL,
            capture_output=True,
            text=True,
            timeout=servers.PATIENCE,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said.append(done.stdout)
    *_, verified, served = said
    of_log = re.search(r"^log .*", verified, re.MULTILINE)
    assert of_log is not None and float(of_log[0].split()[3]) > 1
    assert "tokens per cycle" in served
