"""Commands that examples have a reader type."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = Path(sys.executable).parent


def commands(readme: Path, *begin: str) -> list[list[str]]:
    """Those that begin so, or are of `.venv`; in their order, without what is said of them, and in this environment."""
    text = readme.read_text().replace("\\\n", " ")
    begins = tuple(f"    {one}" for one in begin or (".venv/bin/", "env "))
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith(begins)]
    return [[in_here(word) for word in line] for line in lines]


def in_here(word: str) -> str:
    program = word.removeprefix(".venv/bin/")
    return str(ENVIRONMENT / program) if program != word or word == "vllm" else word


def changed(command: list[str], changes: Mapping[str, str]) -> list[str]:
    """With other parts of words, as a test's own folder."""
    for old, new in changes.items():
        command = [word.replace(old, new) for word in command]
    return command
