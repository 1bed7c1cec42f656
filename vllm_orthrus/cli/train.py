"""`vllm-orthrus train`: a head for a base that has none."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a head for a frozen base",
        description="Train an Orthrus head. On several GPUs: accelerate launch -m vllm_orthrus.cli.main train ...",
    )
    parser.add_argument("--config", type=Path, required=True, help="a YAML file; see examples/tiny-orthrus/train.yaml")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in `output`")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, as in run.max_steps=100"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from vllm_orthrus.training.config import TrainConfig
    from vllm_orthrus.training.trainer import Trainer

    trainer = Trainer(TrainConfig.read(options.config, options.set), options.resume)
    head = trainer.run()
    if trainer.main:
        print(f"head written to {head}; curves: vllm-orthrus report {head.parent}")
    return 0
