"""Should requests that decode carry hypotheses while another's prompt is read beside them?

    python -m benchmarks.mixed_batches [--out FILE]

    step     = device + forward(prompt's rows, verifications, blocks) + draft pass, if there is one
    apart    no blocks in the forward, and a draft pass for all whose prompt is read: as the engine has it
    carried  the blocks of who decodes in the forward, and a draft pass for those alone whose prompt ended
    waiting  the same without draft pass: whose prompt ended verifies nothing in its next step, where its block rides
    between  carried where no prompt ends, so that there is no draft pass at all; apart elsewhere
    plain    nothing drafts where no prompt ends, and what decodes verifies one row in the next step; apart elsewhere

Forwards take what the roofline of `policy/cost.py` says, for Qwen3-8B in bf16 with a bf16 head. They run from the host
where prompts are read, which is said to cost nothing: an upper bound for whatever carries. A draft pass gives the exact
block of everybody; of a block that rode, the traces of the tiny model say how often it was the exact one, and what was
accepted where it wasn't. Requests walk through its answers, and a new one begins where one ends: a prompt of so many
tokens, of which a step reads as many as its budget leaves. One process, no GPU, some minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from benchmarks.evidence import FOLDER, environment
from benchmarks.mode_simulation import Simulated
from benchmarks.traces import FILE as TRACES
from vllm_orthrus.policy.cost import (
    Device,
    Forward,
    Mode,
    Model,
    Part,
    blocks_beside,
    forward_seconds,
    joins,
    launches,
    part_seconds,
    projections,
    step_seconds,
    vocabulary,
)
from vllm_orthrus.policy.devices import find_device
from vllm_orthrus.policy.plan import fits
from vllm_orthrus.policy.replay import Text, read_traces

Way = Literal["apart", "carried", "waiting", "between", "plain"]
WAYS: tuple[Way, ...] = ("apart", "carried", "waiting", "between", "plain")
DEVICES = ("H200", "H100", "A100", "RTX 4090", "RTX 5090")
REQUESTS = (2, 3, 4)  # one alone has nobody beside it, and more than four draft in two passes
PROMPTS = (64, 512, 2048, 16384)  # tokens that no cache has
BUDGETS = {"H200": 8192, "H100": 8192}  # tokens of a step, as `vllm serve` has them by default; elsewhere 2,048
DRAFTS, BLOCK, ROWS, HYPOTHESES = 15, 16, 192, 4  # of an engine with default settings
MODEL = Model()
SEEDS = 4


class Beside(NamedTuple):
    """A forward that reads a prompt."""

    rows: int  # of prompts
    before: int  # positions in front of them
    decoding: int  # requests
    context: float  # of each
    verified: int  # rows of each
    blocks: int  # of each


def seconds_beside(device: Device, one: Beside) -> float:
    verified, drafted = one.decoding * one.verified, one.decoding * one.blocks * BLOCK
    logits = Forward(max(1, one.decoding), 0, one.verified, one.blocks * BLOCK, one.verified * (one.blocks > 0))
    joined = joins(device, MODEL, logits)
    scores = 4.0 * MODEL.layers * MODEL.heads * MODEL.head_dim
    cached, own = MODEL.bytes_per_position * one.context * one.decoding, one.before + one.rows / 2
    read = [
        Part(MODEL.mlp * MODEL.weight_bytes, 2 * MODEL.mlp * (one.rows + verified + drafted), 0.0),
        Part(MODEL.bytes_per_position * own, 0.0, scores * own * one.rows),
        *(Part(cached, 0.0, scores * one.context * rows) for rows in (verified, drafted) if rows),
        *projections(MODEL, Forward(1, 0, one.rows + verified, drafted), paired=False),
        *vocabulary(MODEL, logits, joined),
    ]
    return sum(part_seconds(device, part) for part in read) + launches(MODEL, logits, joined) * device.launch


def blocks_for(requests: int) -> int:
    return blocks_beside(requests, ROWS, DRAFTS + 1, BLOCK, HYPOTHESES) if requests else 0


@dataclass
class Request:
    answer: list[int]  # at each place, drafts that a pass of their own would have accepted
    unread: int
    place: int = 0
    drafts: Literal["none", "exact", "rode"] = "none"  # where those to be verified come from
    beside: int = 0  # blocks that rode beside theirs


class Ran(NamedTuple):
    tokens_per_second: float
    mixed: float  # share of steps
    draft_passes: float  # for each token


class Engine:
    def __init__(self, device: Device, text: Text, requests: int, prompt: int, way: Way, seed: int = 0) -> None:
        self.device, self.text, self.prompt, self.way = device, text, prompt, way
        self.draw, self.budget = random.Random(seed), BUDGETS.get(device.name, 2048)
        coming = itertools.cycle(self.draw.sample(text.answers, len(text.answers)))
        self.coming: Iterator[list[int]] = coming
        # In the midst of their answers, so that they don't end together.
        self.running = [
            Request(answer, 0, self.draw.randrange(len(answer)), "exact")
            for answer in itertools.islice(coming, requests)
        ]

    def run(self, tokens: int) -> Ran:
        seconds, said, steps, mixed, passes = 0.0, 0, 0, 0, 0
        while said < tokens:
            reading = [one for one in self.running if one.unread]
            decoding = [one for one in self.running if not one.unread]
            said += sum(self.verify(one) for one in decoding)
            context = self.prompt + sum(one.place for one in decoding) / max(1, len(decoding))
            if reading:
                spent, drafted = self.read(reading, decoding, context)
            else:
                spent, drafted = self.decode(decoding, context)
            seconds, steps, mixed, passes = seconds + spent, steps + 1, mixed + bool(reading), passes + drafted
            for at, one in enumerate(self.running):
                if one.place >= len(one.answer):
                    self.running[at] = Request(next(self.coming), self.prompt)
        return Ran(said / seconds, mixed / steps, passes / said)

    def verify(self, one: Request) -> int:
        """Tokens of its step."""
        accepted = 0
        if one.drafts == "exact":
            accepted = one.answer[one.place]
        elif one.drafts == "rode":
            hit = self.draw.random() < self.text.hits[one.beside]
            accepted = one.answer[one.place] if hit else self.draw.choice(self.text.tails[one.beside])
        one.place += accepted + 1
        return accepted + 1

    def decode(self, decoding: list[Request], context: float) -> tuple[float, int]:
        """Seconds, and requests in a draft pass."""
        count, blocks = len(decoding), blocks_for(len(decoding))
        if self.way == "plain" and decoding[0].drafts == "none":  # and so have all
            for one in decoding:
                one.drafts = "exact"
            forwards = Forward(count, context, 1), Forward(count, context, 0, BLOCK, DRAFTS)
            return self.device.step + sum(forward_seconds(self.device, MODEL, each) for each in forwards), count
        for one in decoding:
            one.drafts, one.beside = "rode", blocks
        return step_seconds(self.device, MODEL, Mode(DRAFTS, BLOCK, blocks), count, context), 0

    def read(self, reading: list[Request], decoding: list[Request], context: float) -> tuple[float, int]:
        room, rows, before = self.budget - len(decoding) * (DRAFTS + 1), 0, 0
        ended = []
        for one in reading:
            taken = min(one.unread, room - rows)
            before, rows, one.unread = before + self.prompt - one.unread, rows + taken, one.unread - taken
            if taken and not one.unread:
                ended.append(one)
        way = self.way
        if way in ("between", "plain") and ended:
            way = "apart"
        blocks = 0 if way in ("apart", "plain") else blocks_for(len(decoding))
        verified = 1 if self.way == "plain" and decoding and decoding[0].drafts == "none" else DRAFTS + 1
        beside = Beside(rows, before, len(decoding), context, verified, blocks)
        seconds = self.device.step + seconds_beside(self.device, beside)
        drafting = {"apart": decoding + ended, "carried": ended}.get(way, [])
        if drafting:
            seconds += forward_seconds(self.device, MODEL, Forward(len(drafting), context, 0, BLOCK, DRAFTS))
        for one in decoding:
            one.drafts, one.beside = "exact" if way == "apart" else "rode" if blocks else "none", blocks
        for one in ended:
            one.drafts = "none" if way == "waiting" else "exact"
        return seconds, len(drafting)


class Cell(NamedTuple):
    device: str
    requests: int
    prompt: int
    kind: str


def simulate(cell: Cell, texts: dict[str, Text], tokens: int) -> dict[str, Any]:
    """Every way from the same starts."""
    device, text = find_device(cell.device), texts[cell.kind]

    def runs(way: Way) -> list[Ran]:
        return [
            Engine(device, text, cell.requests, cell.prompt, way, seed).run(tokens // SEEDS) for seed in range(SEEDS)
        ]

    ran = {way: runs(way) for way in WAYS}
    rates = {way: statistics.harmonic_mean(one.tokens_per_second for one in of) for way, of in ran.items()}
    return cell._asdict() | {
        "mixed": statistics.mean(one.mixed for one in ran["apart"]),
        "tokens_per_second": rates["apart"],
        "times_apart": {way: rate / rates["apart"] for way, rate in rates.items() if way != "apart"},
    }


def cells(kinds: Iterable[str]) -> list[Cell]:
    """Those whose cache fits beside the weights."""
    wanted = itertools.starmap(Cell, itertools.product(DEVICES, REQUESTS, PROMPTS, kinds))
    return [one for one in wanted if fits(find_device(one.device), MODEL, one.requests, one.prompt)]


def summarise(found: list[dict[str, Any]]) -> dict[str, Any]:
    summary = {}
    for way in WAYS[1:]:
        times = sorted(one["times_apart"][way] for one in found)
        summary[way] = {"least": times[0], "median": statistics.median(times), "most": times[-1]}
    return summary


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    """Of all classes, least and most of any device: shares of steps that read, and how many times as fast as apart."""
    yield f"| prompt | requests | steps that read | {' | '.join(WAYS[1:])} |"
    yield "|---" * (3 + len(WAYS[1:])) + "|"
    for prompt, requests in itertools.product(PROMPTS, REQUESTS):
        mine = [one for one in found if (one["prompt"], one["requests"]) == (prompt, requests)]
        by_device = [[one for one in mine if one["device"] == device] for device in DEVICES]
        by_device = [of for of in by_device if of]
        shares = [statistics.mean(one["mixed"] for one in of) for of in by_device]
        cells = [span(f"{share:.0%}" for share in sorted(shares))]
        for way in WAYS[1:]:
            times = sorted(statistics.mean(one["times_apart"][way] for one in of) for of in by_device)
            cells.append(span(f"{time:.2f}" for time in times))
        yield f"| {prompt:,} | {requests} | {' | '.join(cells)} |"


def span(ordered: Iterable[str]) -> str:
    first, *_, last = ordered
    return first if first == last else f"{first} - {last}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=12000, help="of a cell")
    parser.add_argument("--out", type=Path, default=FOLDER / "mixed-batches.json")
    args = parser.parse_args()
    texts = read_traces(json.loads(TRACES.read_text())["text"])
    what = environment() | {
        "asked": f"--tokens {args.tokens}",
        "model": MODEL._asdict(),
        "devices": [find_device(name)._asdict() for name in DEVICES],
        "budgets": BUDGETS,
    }
    evidence = Simulated(args.out, what)
    for cell in tqdm(cells(texts), desc="cells", leave=False):
        evidence.cells.append(simulate(cell, texts, args.tokens))
    evidence.summary = summarise(evidence.cells)
    evidence.write()
    print("\n".join(table(evidence.cells)))
    print(json.dumps(evidence.summary, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
