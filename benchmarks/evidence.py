"""Where the findings of a check go, and what they must say about where they come from."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from vllm_orthrus.bench import environment as bench
from vllm_orthrus.bench.files import write_json

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "evidence"
SOURCES = ("vllm_orthrus", "kernels", "benchmarks", "examples/tiny-orthrus")

# Findings that differ in these may stand in one file. The commit is told by what it changes: `sources`.
PASSING = ("date", "commit", "changed", "clocks", "load")


@dataclass
class Evidence:
    """Everything that was found, written out after every step."""

    path: Path
    environment: dict[str, Any]

    def write(self) -> None:
        content = asdict(self)
        content.pop("path")
        write_json(self.path, content)


def default_path(check: str, gpu: str, folder: Path = FOLDER) -> Path:
    name = "".join(letter if letter.isalnum() else "-" for letter in gpu)
    return folder / f"{check}-{name}.json"


def environment() -> dict[str, Any]:
    return bench.environment(ROOT / folder for folder in SOURCES) | {"triton": triton.__version__}


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """In what two environments differ, apart from what passes."""
    mine, theirs = (json.loads(json.dumps(facts, default=str)) for facts in (mine, theirs))
    names = [name for name in {**mine, **theirs} if name not in PASSING]
    return [
        f"{name}: {theirs.get(name)} there, {mine.get(name)} here"
        for name in names
        if mine.get(name) != theirs.get(name)
    ]
