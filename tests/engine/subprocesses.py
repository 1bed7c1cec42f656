"""Engines in a Python process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def result_of(folder: Path, script: str, *arguments: Any, multiprocessing: bool = False) -> Any:
    """Of a script that finds its arguments as JSON and ends by printing `RESULT` and JSON."""
    done = run(folder, script, *arguments, multiprocessing=multiprocessing)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert results, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(results[0].removeprefix("RESULT"))


def run(folder: Path, script: str, *arguments: Any, multiprocessing: bool = False) -> subprocess.CompletedProcess[str]:
    file = folder / "script.py"
    file.write_text(script)
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(multiprocessing))
    command = [sys.executable, str(file), *(json.dumps(argument) for argument in arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
