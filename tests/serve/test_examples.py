"""Examples that people start from, as they would run them, with the tiny model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from examples.chat import FORM, TOOL
from tests.serve.servers import FEW_BLANKS, TINY
from vllm_orthrus.demo.server import Server

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


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
