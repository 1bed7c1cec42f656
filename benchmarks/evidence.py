"""Where the findings of a check go, and what they must say about where they come from."""

import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "evidence"
SOURCES = ("vllm_orthrus", "kernels", "benchmarks", "examples/tiny-orthrus")
PACKAGES = ("vllm", "transformers", "numpy", "flashinfer-python")

# Findings that differ in these may stand in one file. The commit is told by what it changes: `sources`.
PASSING = ("date", "commit", "changed", "clocks")

_NUMBERS = re.compile(r"\[\s+(-?\d[^\[\]{}\"]*?)\s+\]")  # a list of nothing but numbers


@dataclass
class Evidence:
    """Everything that was found, written out after every step."""

    path: Path
    environment: dict[str, Any]

    def write(self) -> None:
        content = asdict(self)
        content.pop("path")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1, default=str)
        text = _NUMBERS.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text)
        unfinished = self.path.with_name(self.path.name + ".tmp")  # a check may be killed at any time
        unfinished.write_text(text + "\n")
        unfinished.replace(self.path)


def default_path(check: str, gpu: str, folder: Path = FOLDER) -> Path:
    name = "".join(letter if letter.isalnum() else "-" for letter in gpu)
    return folder / f"{check}-{name}.json"


def environment() -> dict[str, Any]:
    facts: dict[str, Any] = {"gpu": f"none, {platform.machine()}"}
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
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "sources": digest(),
        "commit": _output("git", "rev-parse", "HEAD") or "unknown",
        "changed": _output("git", "status", "--porcelain", "--", *SOURCES),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """In what two environments differ, apart from what passes."""
    mine, theirs = (json.loads(json.dumps(facts, default=str)) for facts in (mine, theirs))
    names = [name for name in {**mine, **theirs} if name not in PASSING]
    return [
        f"{name}: {theirs.get(name)} there, {mine.get(name)} here"
        for name in names
        if mine.get(name) != theirs.get(name)
    ]


def digest() -> str:
    """Of the code and the checkpoints that are checked: also told where there is no git."""
    found = hashlib.sha256()
    for folder in SOURCES:
        files = (ROOT / folder).rglob("*")
        for file in sorted(file for file in files if file.suffix in (".py", ".json", ".safetensors", ".jsonl")):
            if FOLDER not in file.parents:
                found.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return found.hexdigest()[:16]


def _nvidia(query: str) -> dict[str, str | None]:
    return {query: _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0")}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
