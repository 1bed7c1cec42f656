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
    parser.add_argument(
        "--selector-only", action="store_true", help="train a selector for a head that stays as it is (--head)"
    )
    parser.add_argument("--head", help="the head that --selector-only is for, or else to start from: `head.initial`")
    parser.add_argument("--base", help="instead of the file's `base`")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from vllm_orthrus.training.config import TrainConfig
    from vllm_orthrus.training.trainer import Trainer

    given = {"base": options.base, "head.initial": options.head, "train": "selector" if options.selector_only else None}
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    trainer = Trainer(TrainConfig.read(options.config, [*overrides, *options.set]), options.resume)
    made = trainer.run()
    if trainer.main:
        print(f"{made.name} written to {made}; curves: vllm-orthrus report {made.parent}")
    return 0
