"""Kernels compile with the Triton versions that vLLM brings to GPUs, into what we think they do. Needs no GPU.

`make kernels-compiled` does all shapes on all GPUs. These are the passes that need most of one, and all that surrounds
them: whatever makes these spill, or a Triton refuse a kernel, shows here first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.pinned_triton import PINNED, unpacked

ROOT = Path(__file__).resolve().parents[2]
GPUS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")

# A planted fault: the kernel in so few registers that it has to spill.
SPILLED = """
from benchmarks import kernel_resources as resources
gpu = resources.GPUS[1]
*_, form = (form for form in resources.quick_forms(gpu) if form.kernel == "attend")
form.source.options["maxnreg"] = 128
print(resources.faults(resources.report(form, gpu)))
"""


def python(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one has Triton's interpreter in the compiler's place."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("version", PINNED)
def test_resources(version: str) -> None:
    """No spills, shared memory within the limit, and the matrix instructions that each GPU is fastest with."""
    found = python("-m", "benchmarks.kernel_resources", "--triton", version, "--quick")
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"Triton {version} |" in found.stdout
    for kernel in (
        "norm and rotate",
        "merge",
        "prepare",
        "prepare hypotheses",
        "take up",
        "take rows",
        "scan logits",
        "merge scans",
        "scan candidates",
        "merge candidates",
        "select",
        "choose",
    ):
        assert f"| {kernel} | sm_90 |" in found.stdout
    for gpu in GPUS:
        assert f"| attend | {gpu} |" in found.stdout


def test_spills_are_seen() -> None:
    found = python("-c", SPILLED, path=unpacked(next(iter(PINNED))))
    assert found.stdout.startswith("['spills: "), found.stdout + found.stderr


def test_the_table_covers_every_gpu() -> None:
    table = (ROOT / "docs" / "kernels.md").read_text()
    assert all(f"{version} (vLLM" in table for version in PINNED)
    for gpu in GPUS:
        assert f"| attend | {gpu} |" in table
