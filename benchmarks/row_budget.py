"""Would rows spent by gain beat hypotheses of equal width, and would blocks that see only part of a long context pay?

    python -m benchmarks.row_budget [--per-class 10] [--long-per-class 3] [--out FILE]

First: one pass at a few budgets of rows, with equal widths, with widths by rank, and filled by gain (`row_choice.py`),
on greedy answers of the tiny trained model; equal widths are the best in hindsight. Second: the same answers behind
other text, with blocks that see its first and last positions only. Tokens per forward are exact, time is the roofline's
for Qwen3-8B in bf16 with a bf16 head, one request. One thread, no GPU, some minutes.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.evidence import FOLDER, ROOT, Evidence, environment
from benchmarks.known_blocks import ALL, WIDTHS, Blocks, Sight, read_blocks
from benchmarks.replayed_pass import Foresight, Way, replay, tokens_per_forward, whole_blocks
from vllm_orthrus.policy.cost import Device, Forward, Mode, Model, forward_seconds, step_seconds
from vllm_orthrus.policy.devices import find_device
from vllm_orthrus.training.evaluate import Prompt, first_per_class, read_prompts
from vllm_orthrus.training.reference import Reference

TINY = ROOT / "examples" / "tiny-orthrus"
DEVICES = ("H200", "H100", "A100", "RTX 4090", "RTX 5090")
CONTEXTS = (1024, 4096, 16384)
LONG_CONTEXTS = (16384, 65536)
BUDGETS = (32, 64, 96, 128)
EQUAL = (4, 8, 16)
BY_RANK = {
    32: [(16, 8, 4, 4)],
    64: [(16, 16, 8, 8, 4, 4, 4, 4)],
    96: [(16, 16, 16, 8, 8, 8, 8, 4, 4, 4, 4)],
    128: [(16, 16, 16, 16, 8, 8, 8, 8, 8, 8, 4, 4, 4, 4)],
}
FORESIGHT: tuple[Foresight, ...] = ("fixed", "shared", "request", "foreseen", "told")
LIMIT, BEYOND = 128, 34  # tokens of an answer, and of what a step may lead to
MODEL = Model()
WORTH_BUILDING = 1.05

# Tokens of other text before a prompt, and what blocks see of it.
AHEAD: dict[int, list[Sight]] = {
    512: [ALL, Sight(16, 64), Sight(16, 256)],
    1024: [ALL, *(Sight(first, last) for last in (64, 256) for first in (0, 16, 64)), Sight(16, 128), Sight(16, 512)],
    1536: [ALL, Sight(16, 64), Sight(16, 256), Sight(16, 512)],
}
LONG_LIMIT = 64
RIDING = (1, 2, 3, 4, 6, 8)  # whole blocks, as an engine has them
SEEN = (1088, 2112, 4160)  # positions: windows of 1K, 2K and 4K, and the first 64


@dataclass
class Found(Evidence):
    ways: list[dict[str, Any]] = field(default_factory=list)
    time: list[dict[str, Any]] = field(default_factory=list)
    any_rows: list[dict[str, Any]] = field(default_factory=list)
    sights: list[dict[str, Any]] = field(default_factory=list)
    long_contexts: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


def ways() -> list[Way]:
    found = [Way(f"{count} x 16", 16 * count, (16,) * count) for count in (1, 3)]
    for rows in BUDGETS:
        for width in EQUAL:
            found.append(Way(f"{rows // width} x {width}", rows, (width,) * (rows // width)))
        found += [Way("+".join(map(str, widths)), rows, widths) for widths in BY_RANK[rows]]
        found += [Way(f"filled, {how}", rows, (), how) for how in FORESIGHT]
    return found


def sort_of(way: Way) -> str:
    if way.widths:
        return "equal" if len(set(way.widths)) == 1 else "by rank"
    return "told" if way.foresight == "told" else "filled"


def by_class(kinds: Sequence[str], measure: Callable[[list[int]], float]) -> dict[str, float]:
    """kinds: of each answer. measure: of some of them."""
    groups = {kind: [row for row, mine in enumerate(kinds) if mine == kind] for kind in dict.fromkeys(kinds)}
    return {kind: measure(rows) for kind, rows in groups.items()} | {"all": measure(list(range(len(kinds))))}


def tokens_of(blocks: Blocks, kinds: Sequence[str], way: Way) -> dict[str, float]:
    steps = replay(blocks, way)
    return by_class(kinds, lambda rows: tokens_per_forward([steps[row] for row in rows]))


def two_passes(blocks: Blocks, kinds: Sequence[str]) -> dict[str, float]:
    """Tokens of a cycle with whole blocks."""
    kept = whole_blocks(blocks)

    def cycles(row: int) -> list[int]:
        at, found = 0, []
        while at < int(blocks.ends[row]):
            found.append(int(kept[row, at]) + 1)
            at += found[-1]
        return found

    each = [cycles(row) for row in range(len(kinds))]
    return by_class(kinds, lambda rows: statistics.mean(length for row in rows for length in each[row]))


def seconds(device: Device, way: Way, context: float) -> float:
    """Of a step. Rows that widths leave over are not run."""
    rows, verified = sum(way.widths) or way.rows, way.drafts + 1
    return device.step + forward_seconds(device, MODEL, Forward(1, context, verified, rows, verified))


def compare(device: Device, context: int, found: Iterable[tuple[Way, dict[str, float]]], kind: str) -> dict[str, Any]:
    """Tokens per second of the best of each sort, and how much more that is than with equal widths."""
    best: dict[str, tuple[float, str]] = {}
    for way, tokens in found:
        rate = tokens[kind] / seconds(device, way, context)
        best[sort_of(way)] = max(best.get(sort_of(way), (0.0, "")), (rate, f"{way.name} ({way.rows})"))
    gains = {sort: best[sort][0] / best["equal"][0] for sort in best if sort != "equal"}
    return {sort: {"way": name, "tokens/s": rate} for sort, (rate, name) in best.items()} | {"gain": gains}


def decode(reference: Reference, texts: list[list[int]], kinds: Sequence[str], limit: int) -> list[list[int]]:
    """Class by class, as a batch goes on until its last answer has ended."""
    found: dict[int, list[int]] = {}
    for kind in tqdm(list(dict.fromkeys(kinds)), desc=f"answers to {max(map(len, texts))} tokens"):
        rows = [row for row, mine in enumerate(kinds) if mine == kind]
        runs = reference.generate([texts[row] for row in rows], limit + BEYOND)
        found |= {row: run.tokens for row, run in zip(rows, runs, strict=True)}
    return [found[row] for row in range(len(texts))]


def spend_rows(evidence: Found, blocks: Blocks, kinds: Sequence[str]) -> None:
    found = []
    for way in tqdm(ways(), desc="ways"):
        found.append((way, tokens_of(blocks, kinds, way)))
        evidence.ways.append(way._asdict() | {"sort": sort_of(way), "tokens/forward": found[-1][1]})
    cycle = two_passes(blocks, kinds)
    evidence.ways.append({"name": "two passes", "tokens/cycle": cycle})
    for device in map(find_device, DEVICES):
        for context in CONTEXTS:
            cell = {"device": device.name, "context": context}
            for rows in BUDGETS:
                mine = [(way, tokens) for way, tokens in found if way.rows == rows]
                for kind in cycle:
                    evidence.time.append(cell | {"rows": rows, "class": kind} | compare(device, context, mine, kind))
            for kind in cycle:
                others = {
                    "plain": 1 / step_seconds(device, MODEL, Mode(0), 1, context),
                    "two passes": cycle[kind] / step_seconds(device, MODEL, Mode(15, 16), 1, context),
                }
                one = compare(device, context, found, kind)
                best = max(*others.values(), one["equal"]["tokens/s"])
                over_all = {sort: max(1.0, one[sort]["tokens/s"] / best) for sort in one["gain"]}
                evidence.any_rows.append(
                    cell | {"class": kind} | one | {"tokens/s": others, "gain over all modes": over_all}
                )
        evidence.write()


def text_ahead(prompts: Sequence[Prompt], answers: Sequence[list[int]], length: int, seed: int) -> list[int]:
    """Of other prompts with their answers, as they would stand in a conversation."""
    order, text = list(range(len(prompts))), list[int]()
    random.Random(seed).shuffle(order)
    for index in order:
        text += [*prompts[index].tokens, *answers[index]]
        if len(text) >= length:
            return text[-length:]
    raise ValueError(f"{len(text)} tokens are not enough for {length}")


def narrow_sight(evidence: Found, reference: Reference, prompts: Sequence[Prompt], others: list[list[int]]) -> None:
    """prompts: some to be answered, behind those that come with `others`, their answers."""
    asked, stop = prompts[len(others) :], evidence.environment["stop"]
    kinds = [prompt.kind for prompt in asked]
    for ahead, sights in AHEAD.items():
        longer = [
            [*text_ahead(prompts[: len(others)], others, ahead, seed), *prompt.tokens]
            for seed, prompt in enumerate(asked)
        ]
        answers = decode(reference, longer, kinds, LONG_LIMIT)
        read = read_blocks(reference, longer, answers, LONG_LIMIT, stop, (16,), sights)
        for sight, blocks in zip(sights, read, strict=True):
            evidence.sights.append(
                {"ahead": ahead, **sight._asdict(), "two passes": two_passes(blocks, kinds)}
                | {f"{count} x 16": tokens_of(blocks, kinds, Way("", 16 * count, (16,) * count)) for count in (2, 4)}
            )
        evidence.write()


def long_contexts(evidence: Found) -> None:
    """Time on long contexts if as much were accepted as on short ones, with blocks that see so many positions."""
    tokens = {way["name"]: way["tokens/forward"] for way in evidence.ways if way.get("sort") == "equal"}
    cycle = evidence.ways[-1]["tokens/cycle"]
    for device in map(find_device, DEVICES):
        for context in LONG_CONTEXTS:
            for kind in cycle:
                plain = step_seconds(device, MODEL, Mode(0), 1, context)
                found = {}
                for seen in (context, *SEEN):
                    two = cycle[kind] / (
                        step_seconds(device, MODEL, Mode(15, 16), 1, context) - saved(device, context, seen, 16, 15)
                    )
                    ones = {
                        f"{count} x 16": tokens[f"{count} x 16"][kind]
                        / (
                            step_seconds(device, MODEL, Mode(15, 16, count), 1, context)
                            - saved(device, context, seen, 16 * count, 16)
                        )
                        for count in RIDING
                        if f"{count} x 16" in tokens
                    }
                    best = max(ones, key=lambda name: ones[name])
                    found[str(seen)] = {"two passes": two * plain, "one pass": ones[best] * plain, "best": best}
                evidence.long_contexts.append(
                    {"device": device.name, "context": context, "class": kind, "times plain, by positions seen": found}
                )


def saved(device: Device, context: float, seen: float, rows: int, predicting: int) -> float:
    """Parts of a forward add up, so that two draft passes differ by their attention alone."""
    whole, part = (forward_seconds(device, MODEL, Forward(1, long, 0, rows, predicting)) for long in (context, seen))
    return whole - part


def summarise(evidence: Found) -> dict[str, Any]:
    def spread(values: Iterable[float]) -> dict[str, float]:
        ordered = sorted(values)
        return {"least": ordered[0], "median": statistics.median(ordered), "most": ordered[-1]}

    sorts = ("by rank", "filled", "told")
    pooled = [one for one in evidence.time if one["class"] == "all"]
    free = [one for one in evidence.any_rows if one["class"] == "all"]
    found: dict[str, Any] = {
        "gain at equal rows": {
            sort: {rows: spread(one["gain"][sort] for one in pooled if one["rows"] == rows) for rows in BUDGETS}
            for sort in sorts
        },
        "gain at any rows": {sort: spread(one["gain"][sort] for one in free) for sort in sorts},
        "gain at any rows, each class": {
            sort: spread(one["gain"][sort] for one in evidence.any_rows if one["class"] != "all") for sort in sorts
        },
        "gain over all modes": {sort: spread(one["gain over all modes"][sort] for one in free) for sort in sorts},
    }
    found["worth building"] = found["gain at any rows"]["filled"]["median"] >= WORTH_BUILDING
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--long-per-class", type=int, default=3)
    parser.add_argument("--out", type=Path, default=FOLDER / "row-budget.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    prompts = first_per_class(read_prompts(TINY / "heldout.jsonl", tokenizer), args.per_class)
    reference = Reference.from_pretrained(TINY / "base", TINY / "head", torch.float32, "cpu")
    stop = [int(tokenizer.eos_token_id)]
    asked = f"--per-class {args.per_class} --long-per-class {args.long_per_class}"
    what = environment() | {"asked": asked, "model": MODEL._asdict(), "widths": WIDTHS, "stop": stop}
    evidence = Found(args.out, what | {"devices": [find_device(name)._asdict() for name in DEVICES]})

    texts = [prompt.tokens for prompt in prompts]
    answers = decode(reference, texts, [prompt.kind for prompt in prompts], LIMIT)
    [blocks] = read_blocks(reference, texts, answers, LIMIT, stop)
    spend_rows(evidence, blocks, [prompt.kind for prompt in prompts])
    long_contexts(evidence)
    evidence.summary = summarise(evidence)
    evidence.write()

    every = first_per_class(read_prompts(TINY / "heldout.jsonl", tokenizer), args.per_class + args.long_per_class)
    known = [tuple(text) for text in texts]
    behind = [prompt for prompt in every if tuple(prompt.tokens) not in known]
    ended = [answer[: int(end) + 1] for answer, end in zip(answers, blocks.ends, strict=True)]
    narrow_sight(evidence, reference, [*prompts, *behind], ended)
    print(json.dumps(evidence.summary, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
