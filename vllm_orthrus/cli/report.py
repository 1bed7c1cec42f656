"""`vllm-orthrus report`: the curves of a training run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("report", help="draw the curves of a training run")
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="the `output` folder of a training run")
    parser.add_argument("--output", type=Path, help="the picture to write (default: RUN/report.png)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from vllm_orthrus.training.report import draw_report

    picture = options.output or options.run_folder / "report.png"
    draw_report(options.run_folder, picture)
    print(picture)
    return 0
