"""`vllm-orthrus demo`: the tiny model behind a real server, with and without its head."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("demo", help="serve the tiny model, with and without its head, and compare")
    parser.add_argument("--example", type=Path, default=Path("examples/tiny-orthrus"), help="folder with base and head")
    parser.add_argument("--per-class", type=int, default=2, help="held-out prompts of each class")
    parser.add_argument("--serve", action="store_true", help="only serve it with its head, until stopped")
    parser.add_argument("--port", type=int, default=8000, help="with --serve")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from vllm_orthrus.demo.run import demonstrate, serve
    from vllm_orthrus.demo.server import ServerError

    if not (options.example / "head").is_dir():
        print(f"{options.example} has no `head` folder. Run this at the top of the repository.", file=sys.stderr)
        return 2
    if options.serve:
        serve(options.example, options.port)
    try:
        identical = demonstrate(options.example, options.per_class)
    except ServerError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0 if identical else 1
