"""`vllm-orthrus widen`: a small trained model at a large one's cost."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "widen",
        help="put a small trained base and head into a large shape that says the same, to measure time with",
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("head", type=Path)
    parser.add_argument("folder", type=Path, help="gets base/ and head/, and selector/ if one is named")
    parser.add_argument("--like", required=True, help="Qwen3-0.6B to Qwen3-32B, or LAYERSxHIDDEN")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--selector", type=Path, help="one that lies beside the head; a head's own goes with it")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import shutil

    import torch

    from vllm_orthrus.heads import HeadError
    from vllm_orthrus.heads.widen import read_config, shape_like, widen_base, widen_head, widen_selector

    if options.folder.exists():
        raise HeadError(f"{options.folder} is there already. Name a folder that is not.")
    shape = shape_like(options.like, read_config(options.base))
    widening = widen_base(options.base, shape, options.folder / "base", getattr(torch, options.dtype))
    widen_head(options.head, widening, options.folder / "head")
    if options.selector is not None:
        widen_selector(options.selector, widening, options.folder / "selector")
    for file in options.base.glob("*token*"):
        shutil.copy(file, options.folder / "base")
    size = sum(file.stat().st_size for file in options.folder.rglob("*.safetensors"))
    print(f"{options.folder}: {options.base} as large as {options.like}, {size / 2**30:.1f} GiB with its head")
    return 0
