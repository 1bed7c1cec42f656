"""Every kernel compiles for every GPU we name, into what we think it does. Needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GPUS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


def resources(*options: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one has Triton's interpreter in the compiler's place."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernel_resources", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("gpu", GPUS)
def test_resources(gpu: str) -> None:
    """No spills, shared memory within the limit, and the matrix instructions that this GPU is fastest with."""
    found = resources("--quick", "--gpu", gpu)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("| attend |") >= 4
    for kernel in ("merge", "prepare", "prepare hypotheses", "scan logits", "merge scans", "choose", "match"):
        assert f"| {kernel} |" in found.stdout


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
def test_resources_of_every_shape(gpu: str) -> None:
    found = resources("--gpu", gpu)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_table_covers_every_gpu() -> None:
    table = (ROOT / "docs" / "kernels.md").read_text()
    for gpu in GPUS:
        assert f"| attend | {gpu} |" in table
