"""Tokens per cycle with a head as it was trained, and with one in fp8, by class of prompt.

    python -m benchmarks.quantized_head [--passes two one] [--each N] [--dtype D] [--out FILE]

The tiny trained model in the engine, greedy, all drafts in every step, and three heads:

    as trained
    fp8                      weights rounded; what GPUs below compute capability 8.9 compute, and CPUs
    fp8, and its inputs      rounded row by row, as those from 8.9 on do before a product

Exit status 1: fp8 changed a text, or tokens per cycle of a class by more than 3 %. One process, some minutes; in one
pass many, where there is no GPU.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.evidence import FOLDER, Evidence, environment
from tests.engine.harness import Engine
from tests.engine.trained import OPTIONS, TINY, chat, tokens_per_cycle, trained_head
from vllm_orthrus.heads.quantize import dequantize, quantize

LENGTH, WITHIN = 128, 0.03
HEADS = ("as trained", "fp8", "fp8, and its inputs")


@dataclass
class Found(Evidence):
    settings: dict[str, Any] = field(default_factory=dict)
    tokens_per_cycle: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # by passes, class and head


def round_inputs(engine: Engine) -> None:
    """Of the projections, each row to eight bits with a scale of its own."""

    def rounded(module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        (x,) = inputs
        return (dequantize(quantize(x)).to(x.dtype),)

    for layer in engine.runner.speculator.model.layers:
        for projection in (layer.qkv_proj, layer.o_proj):
            projection.register_forward_pre_hook(rounded)


def ask(passes: str, head: str, classes: Mapping[str, list[str]], dtype: str) -> dict[str, tuple[Any, float]]:
    """What is said, and tokens per cycle."""
    settings = {} if head == "as trained" else {"orthrus_head_quantization": "fp8"}
    engine = Engine(TINY / "base", trained_head(passes, **settings), **OPTIONS, dtype=dtype)
    if head == "fp8, and its inputs":
        round_inputs(engine)
    found = {}
    for kind, texts in classes.items():
        run = engine.run([chat(engine, text) for text in texts], LENGTH)
        found[kind] = run.tokens, tokens_per_cycle(run)
    engine.close()
    return found


def by_class(each: int) -> dict[str, list[str]]:
    """So many questions of every class, as far as there are."""
    import json

    lines = [json.loads(line) for line in (TINY / "heldout.jsonl").read_text().splitlines()]
    classes: dict[str, list[str]] = {}
    for line in lines:
        classes.setdefault(line["class"], []).append(line["prompt"])
    return {kind: texts[:each] for kind, texts in classes.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", nargs="+", choices=("two", "one"), default=["two"])
    parser.add_argument("--each", type=int, default=40, help="questions of each class")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=FOLDER / "quantized-head-tiny.json")
    args = parser.parse_args()
    classes, wrong = by_class(args.each), []
    found = Found(args.out, environment(), {"each": args.each, "dtype": args.dtype, "tokens": LENGTH})
    for passes in tqdm(args.passes, desc="passes"):
        runs = {head: ask(passes, head, classes, args.dtype) for head in tqdm(HEADS, desc="heads", leave=False)}
        rates = {kind: {head: round(runs[head][kind][1], 4) for head in HEADS} for kind in classes}
        found.tokens_per_cycle[passes] = rates
        found.write()
        print(
            f"\n{passes} {'passes' if passes == 'two' else 'pass'}\n{'class':<14}" + "".join(f"{h:>24}" for h in HEADS)
        )
        for kind, rate in rates.items():
            before = rate["as trained"]
            changes = "".join(f"{rate[head]:>15.3f} ({rate[head] / before - 1:+.1%})" for head in HEADS[1:])
            print(f"{kind:<14}{before:>24.3f}{changes}")
            wrong += [f"{passes}, {kind}, {h}" for h in HEADS if abs(rate[h] / before - 1) > WITHIN]
            if args.dtype == "float32":
                wrong += [f"{passes}, {kind}: the text" for h in HEADS if runs[h][kind][0] != runs[HEADS[0]][kind][0]]
    print("\n" + ("; ".join(wrong) or f"all within {WITHIN:.0%}"))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
