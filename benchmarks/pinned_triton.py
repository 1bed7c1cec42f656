"""The Triton versions that supported vLLMs bring to NVIDIA GPUs, each in a folder of its own.

vLLM pins a PyTorch and that pins its Triton, which so differs from what this environment has. Compiling needs no GPU,
and nothing of a Triton but its own package, so one can be looked at without installing it.
"""

import shutil
import subprocess
import sys
from pathlib import Path

# vLLM 0.32 asks for torch 2.13.0, which asks for triton 3.7.1; vLLM 0.33 for torch 2.14.0, and that for ~=3.8.0.
PINNED = {"3.7.1": "0.32", "3.8.0": "0.33"}

FOLDER = Path(__file__).resolve().parents[1] / ".venv"


def unpacked(version: str) -> Path:
    """Where this Triton can be imported from, with PYTHONPATH. Downloads it if need be."""
    folder = FOLDER / f"triton-{version}"
    if not (folder / "complete").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, f"triton=={version}"], check=True)
        (folder / "complete").touch()
    return folder
