"""What a selector gives over its head alone, by class of prompt, in plain PyTorch.

    python -m benchmarks.selector [--per-class N] [--hypotheses H] [--out FILE]

The tiny trained model and all held-out prompts, blocks of 16 rows, 15 drafts:

    two passes, T = 0            tokens per cycle, the bonus included; and without cycles that were accepted whole
    two passes, T = 0.8          drafts drawn from what rows say, or from what the selector makes of it
    one pass, T = 0              tokens per forward, hits, and misses by cause

Cycles that are accepted whole are left out once because some of the gain lies in text that repeats itself. Half an hour
of one core. Exit status 1: a greedy text has changed.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.evidence import FOLDER, Evidence, environment
from vllm_orthrus.training.evaluate import Prompt, Setting, decode, first_per_class, read_prompts
from vllm_orthrus.training.reference import Generation, Reference, tokens_per_cycle
from vllm_orthrus.training.simulator import OnePass, Run, figures

TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny-orthrus"
LOW_ENTROPY = ("arithmetic", "counting", "json", "log")
LENGTH, RESAMPLES = 128, 400


@dataclass
class Found(Evidence):
    settings: dict[str, Any] = field(default_factory=dict)
    two_passes: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # by temperature and class
    one_pass: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # by head and class


def groups(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """Prompts by class, those that follow rules together, and all."""
    found: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        together = ["low-entropy"] if prompt.kind in LOW_ENTROPY else []
        for kind in (prompt.kind, *together, "all"):
            found.setdefault(kind, []).append(index)
    return found


def cycles(generations: Sequence[Generation], indices: Sequence[int]) -> list[Any]:
    return [cycle for index in indices for cycle in generations[index].cycles]


def gain_within(alone: Sequence[Generation], selected: Sequence[Generation], indices: Sequence[int]) -> list[float]:
    """95 % of resamplings of the prompts."""
    draw, gains = random.Random(0), []
    for _ in range(RESAMPLES):
        some = draw.choices(indices, k=len(indices))
        gains.append(tokens_per_cycle(cycles(selected, some)) / tokens_per_cycle(cycles(alone, some)) - 1)
    gains.sort()
    return [gains[RESAMPLES // 40], gains[-RESAMPLES // 40]]


def compare(
    alone: Sequence[Generation], selected: Sequence[Generation], of: dict[str, list[int]]
) -> dict[str, dict[str, float]]:
    found = {}
    for kind, indices in of.items():
        pair = [cycles(generations, indices) for generations in (alone, selected)]
        rates = [tokens_per_cycle(each) for each in pair]
        unfinished = [tokens_per_cycle([cycle for cycle in each if cycle.accepted < cycle.proposed]) for each in pair]
        least, most = gain_within(alone, selected, indices)
        found[kind] = {
            "alone": round(rates[0], 3),
            "selector": round(rates[1], 3),
            "gain": round(rates[1] / rates[0] - 1, 4),
            "gain_least": round(least, 4),
            "gain_most": round(most, 4),
            "gain_without_whole_blocks": round(unfinished[1] / unfinished[0] - 1, 4),
        }
    return found


def in_one_pass(
    reference: Reference, prompts: Sequence[Prompt], hypotheses: int, stop: list[int], batch: int = 32
) -> list[Run]:
    simulator, done = OnePass(reference, hypotheses), list[Run]()
    for start in tqdm(range(0, len(prompts), batch), "one pass", leave=False):
        done += simulator.generate([prompt.tokens for prompt in prompts[start : start + batch]], LENGTH, stop)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-class", type=int, help="held-out prompts of each class (default: all)")
    parser.add_argument("--hypotheses", type=int, default=8)
    parser.add_argument("--selector", default=str(TINY / "selector"))
    parser.add_argument("--out", type=Path, default=FOLDER / "selector-tiny.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    stop = [tokenizer.eos_token_id]
    prompts = first_per_class(read_prompts(TINY / "heldout.jsonl", tokenizer), args.per_class)
    of = groups(prompts)
    heads = {
        name: Reference.from_pretrained(TINY / "base", TINY / "head", selector=chosen)
        for name, chosen in (("alone", "off"), ("selector", args.selector))
    }
    told = {"prompts": len(prompts), "tokens": LENGTH, "drafts": 15, "hypotheses": args.hypotheses}
    found, changed = Found(args.out, environment(), told), 0
    for temperature in (0.0, 0.8):
        setting = Setting(LENGTH, temperature, batch=32)
        runs = {name: decode(reference, prompts, stop, setting, True) for name, reference in heads.items()}
        if temperature == 0:
            texts = [[generation.tokens for generation in run] for run in runs.values()]
            changed = sum(a != b for a, b in zip(*texts, strict=True))
        found.two_passes[str(temperature)] = compare(runs["alone"], runs["selector"], of)
        found.write()
        print(f"\nT = {temperature}, tokens per cycle", *_rows(found.two_passes[str(temperature)]), sep="\n")
    for name, reference in heads.items():
        foreseen = in_one_pass(reference, prompts, args.hypotheses, stop)
        rates = {kind: figures([foreseen[index] for index in indices]) for kind, indices in of.items()}
        found.one_pass[name] = {
            kind: {key: round(value, 4) for key, value in rate._asdict().items()} for kind, rate in rates.items()
        }
        found.write()
        print(f"\none pass, {name}", *_rows(found.one_pass[name]), sep="\n")
    print(f"\n{changed} greedy texts changed")
    return int(changed > 0)


def _rows(table: dict[str, dict[str, float]]) -> list[str]:
    return [
        f"{kind:<12}" + "  ".join(f"{name} {value:g}" for name, value in row.items()) for kind, row in table.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
