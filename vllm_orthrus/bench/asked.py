"""From the command line to what is to be done, or to why it cannot be."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_orthrus.bench import plots
from vllm_orthrus.bench.environment import environment
from vllm_orthrus.bench.prompts import Classes, read_questions, render
from vllm_orthrus.bench.settings import Settings, check_options
from vllm_orthrus.bench.ways import choose_ways
from vllm_orthrus.errors import UserError


def prepare(asked: argparse.Namespace, counts: Sequence[str]) -> Path:
    """Where findings go. What could only fail after hours of measuring fails here."""
    for name in ("tokens", *counts):
        value = getattr(asked, name, 1)
        if any(number < 1 for number in (value if isinstance(value, list) else [value])):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be 1 or more.")
    if find_spec("vllm") is None:
        raise UserError("`vllm-orthrus bench` runs vLLM, which is not installed here. `vllm-orthrus doctor` says how.")
    plots.pyplot()
    out: Path = asked.out or Path(f"{asked.bench}-{datetime.now():%Y%m%d-%H%M%S}.json")
    if out.suffix != ".json":
        raise UserError(f"--out {out}: must end in .json; the table and the picture go beside it.")
    return out


def settings_for(asked: argparse.Namespace, against: Sequence[str] = ()) -> Settings:
    return Settings(
        model=asked.model,
        ways=choose_ways(asked.ways, against, asked.head),
        tokens=asked.tokens,
        temperature=asked.temperature,
        dtype=asked.dtype,
        options=check_options(asked.options),
        ignore_eos=asked.ignore_eos,
        logs=Path(tempfile.mkdtemp(prefix="vllm-orthrus-bench-")),
    )


def classes_of(asked: argparse.Namespace) -> Classes:
    from transformers import AutoTokenizer

    questions = read_questions(asked.dataset, asked.prompt_column)
    known = list(dict.fromkeys(kind for kind, _ in questions))
    for kind in asked.classes or ():
        if kind not in known:
            raise UserError(f"--classes {kind}: the prompts of {asked.dataset} have the classes {', '.join(known)}.")
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    wanted = asked.classes or known
    return render([one for one in questions if one[0] in wanted], tokenizer, asked.raw)


def environment_of(asked: argparse.Namespace, settings: Settings, at_once: int, over: str) -> dict[str, Any]:
    """`at_once`: how many engines are up together, and share the memory."""
    said = {name: value for name, value in vars(asked).items() if name not in ("run", "command")}
    return environment() | {"asked": said, "over": over, "serve_options": settings.serve_options(at_once)}


def title_of(asked: argparse.Namespace, facts: dict[str, Any]) -> str:
    device = facts["cpu"] if facts["gpu"].startswith("none") else facts["gpu"]
    return f"{asked.model}\n{asked.dtype}, temperature {asked.temperature:g}, {device}"
