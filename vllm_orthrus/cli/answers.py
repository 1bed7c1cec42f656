"""`vllm-orthrus answers`: let a base answer prompts, to train its head on what it really says."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("answers", help="let a base answer prompts, as training data for its head")
    parser.add_argument("--base", required=True, help="folder or repository of the base")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL with a `prompt` per line")
    parser.add_argument("--output", type=Path, required=True, help="JSONL to write; an unfinished one is continued")
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=256, help="prompts between two writes")
    parser.add_argument("--limit", type=int, help="answer only the first so many prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", type=json_object, default={}, help="further arguments of vLLM's LLM, as JSON")
    parser.set_defaults(run=run)


def json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object, such as {{"max_model_len": 4096}}')
    return found


def run(options: argparse.Namespace) -> int:
    from vllm_orthrus.training.answers import AnswerSettings, write_answers

    settings = AnswerSettings(**{name: getattr(options, name) for name in AnswerSettings._fields})
    print(f"{write_answers(settings)} answers written to {settings.output}")
    return 0
