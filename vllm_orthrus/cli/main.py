"""`vllm-orthrus COMMAND ...`. Each command lives in a module of its own and imports what it needs when it runs."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from vllm_orthrus import __version__
from vllm_orthrus.errors import UserError

COMMANDS = ("train", "answers", "report", "head", "doctor", "demo", "simulate", "plan", "widen", "bench")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser("vllm-orthrus", description="Orthrus heads for stock vLLM.")
    found.add_argument("--version", action="version", version=f"vllm-orthrus {__version__}")
    subparsers = found.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"vllm_orthrus.cli.{name}").add_parser(subparsers)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    for chatty in ("httpx", "httpx2", "datasets"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        status: int = options.run(options)
    except UserError as error:
        print(f"vllm-orthrus {options.command}: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
