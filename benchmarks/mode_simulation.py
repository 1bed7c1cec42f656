"""What the policy of modes is worth on devices, loads and contexts that are not at hand.

    python -m benchmarks.mode_simulation [--quick | --lines] [--out FILE]

Each cell is a device by its roofline, a number of requests at a time, a length of context and a class of text; the
policy begins without knowing the text, with the roofline as its idea of the device, and with the steps timed that an
engine times before it serves. The machine itself differs from the roofline: its products are slower, its attention
faster, its launches longer. Fixed settings get what they give on average. Cells whose cache would not fit are left out.
Qwen3-8B in bf16 with a bf16 head; acceptance is the tiny trained model's. One process, no GPU, some minutes.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.evidence import FOLDER, Evidence, environment
from benchmarks.traces import FILE as TRACES
from vllm_orthrus.policy.clock import Step
from vllm_orthrus.policy.cost import Device, Mode, Model, step_seconds
from vllm_orthrus.policy.devices import find_device
from vllm_orthrus.policy.modes import ModePolicy
from vllm_orthrus.policy.plan import one_pass
from vllm_orthrus.policy.replay import Always, Text, World, read_traces, replay

DEVICES = ("H200", "H100", "A100", "RTX 4090", "RTX 5090")
REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (1024, 4096, 16384, 65536, 131072)
MODES = (0, 3, 7, 14, 15)
TIMED = ((1, 8192), (1, 48), (4, 48), (16, 48), (64, 48), (256, 48))  # requests and context
MODEL = Model()
NEVER_SLOWER, NEAR_BEST = 0.97, 0.95


class Cell(NamedTuple):
    device: str
    requests: int
    context: int
    kind: str


@dataclass
class Simulated(Evidence):
    cells: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


def mode_of(drafts: int, requests: int) -> Mode:
    """The largest rides along, as far as there are rows for it."""
    return one_pass(requests) if drafts == MODES[-1] else Mode(drafts, drafts)


def cells(devices: Iterable[str], requests: Iterable[int], contexts: Iterable[int], kinds: Iterable[str]) -> list[Cell]:
    kinds = list(kinds)
    return [
        Cell(device, count, context, kind)
        for device in devices
        for count in requests
        for context in contexts
        if fits(find_device(device), count, context)
        for kind in kinds
    ]


def fits(device: Device, requests: int, context: int) -> bool:
    return MODEL.resident_bytes + MODEL.bytes_per_position * context * requests <= 0.9 * device.capacity


class Fixed:
    """Tokens of a step with so many drafts always, by class; on any device the same."""

    def __init__(self, texts: dict[str, Text]) -> None:
        self.texts, self.known = texts, dict[tuple[str, Mode], float]()

    def tokens(self, kind: str, mode: Mode) -> float:
        if (kind, mode) not in self.known:
            even = World(Device("even", 1, 1, 1, 0, 1, 1), Model(0, 0, 0, 0, 0, 0, 0), lambda drafts, requests: mode, 0)
            self.known[kind, mode] = (
                replay(Always(mode.drafts), even, self.texts[kind], 16, 1, 3000).tokens_per_second / 16
            )
        return self.known[kind, mode]


def simulate(cell: Cell, fixed: Fixed, tokens: int = 24000) -> dict[str, Any]:
    """tokens: of all requests together, and at least 512 of each."""
    known = find_device(cell.device)
    real = known._replace(products=0.7 * known.products, attention=1.3 * known.attention, launch=1.5 * known.launch)
    world = World(real, MODEL, mode_of)

    def costs(drafts: int, requests: int, context: float) -> float:
        return step_seconds(known, MODEL, mode_of(drafts, requests), requests, context)

    policy = ModePolicy(MODES, costs, lambda requests: mode_of(MODES[-1], requests).hypotheses > 0)
    for requests, context in TIMED:
        for drafts in MODES:
            policy.clock.believe(
                Step(requests, context, drafts, drafts, world.seconds(drafts, drafts, requests, context))
            )
    rates = {}
    for drafts in MODES:
        mode = mode_of(drafts, cell.requests)
        step = step_seconds(real, MODEL, mode, cell.requests, cell.context) * (1 + world.noise / 2)
        rates[drafts] = cell.requests * fixed.tokens(cell.kind, mode) / step
    each = max(512, tokens // cell.requests)
    run = replay(policy, world, fixed.texts[cell.kind], cell.requests, cell.context, each)
    return cell._asdict() | {
        "plain": rates[0],
        "auto": run.tokens_per_second / rates[0],
        "fixed": {str(drafts): rate / rates[0] for drafts, rate in rates.items()},
        "of_best": run.tokens_per_second / max(rates.values()),
        "modes": {str(drafts): run.modes.count(drafts) / len(run.modes) for drafts in MODES},
    }


def summarise(found: list[dict[str, Any]]) -> dict[str, Any]:
    def of(name: str) -> dict[str, Any]:
        values = sorted(one[name] for one in found)
        return {"least": values[0], "median": statistics.median(values), "most": values[-1]}

    slow = [one for one in found if one["auto"] < NEVER_SLOWER]
    far = [one for one in found if one["of_best"] < NEAR_BEST]
    return {
        "cells": len(found),
        "times_plain": of("auto"),
        "of_best_fixed": of("of_best"),
        f"below_{NEVER_SLOWER}_of_plain": len(slow),
        f"below_{NEAR_BEST}_of_best_fixed": len(far),
    }


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Gain over concurrency at 4K of context, and over context at one request: lines by device, one panel by class."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as pyplot

    kinds = [("low-entropy text (log)", "log"), ("code", "code"), ("prose", "prose")]
    figure, rows = pyplot.subplots(2, len(kinds), figsize=(11, 6), sharey="row", layout="constrained")
    for axes, name, values, label in (
        (rows[0], "requests", {"context": 4096}, "requests at a time (context 4K)"),
        (rows[1], "context", {"requests": 1}, "tokens of context (one request)"),
    ):
        for axis, (title, kind) in zip(axes, kinds, strict=True):
            for device in DEVICES:
                mine = [
                    one
                    for one in found
                    if one["device"] == device
                    and one["kind"] == kind
                    and all(one[key] == value for key, value in values.items())
                ]
                if mine:
                    axis.plot(
                        [one[name] for one in mine], [one["auto"] for one in mine], marker="o", ms=3, label=device
                    )
            axis.axhline(1, color="grey", lw=1, ls="--")
            axis.set_xscale("log", base=2)
            ticks = REQUESTS if name == "requests" else CONTEXTS
            axis.set_xticks(ticks, [str(tick) if tick < 1024 else f"{tick // 1024}K" for tick in ticks])
            axis.set_xlabel(label)
            axis.set_title(title, fontsize=10)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("times plain decoding")
    rows[0][-1].legend(fontsize=8, title="by the roofline", title_fontsize=8)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="every other size and context, two classes")
    parser.add_argument("--lines", action="store_true", help="only what is drawn: one request, and contexts of 4K")
    parser.add_argument("--tokens", type=int, default=24000, help="of a cell")
    parser.add_argument("--out", type=Path, default=FOLDER / "mode-simulation.json")
    args = parser.parse_args()
    texts = read_traces(json.loads(TRACES.read_text())["text"])
    fixed, every = Fixed(texts), 2 if args.quick else 1
    kinds = ("log", "prose") if args.quick else tuple(texts)
    what = environment() | {
        "asked": f"--tokens {args.tokens}" + " --lines" * args.lines,
        "model": MODEL._asdict(),
        "devices": [find_device(name)._asdict() for name in DEVICES],
    }
    evidence = Simulated(args.out, what)
    wanted = cells(DEVICES, REQUESTS[::every], CONTEXTS[::every], kinds)
    if args.lines:
        wanted = [cell for cell in wanted if cell.requests == 1 or cell.context == 4096]
    for cell in tqdm(wanted, desc="cells"):
        evidence.cells.append(simulate(cell, fixed, args.tokens))
    evidence.summary = summarise(evidence.cells)
    evidence.write()
    if not args.quick:
        plot(evidence.cells, FOLDER.parents[1] / "docs" / "pictures" / "modes-by-device.svg")
    print(json.dumps(evidence.summary, indent=1))
    red = evidence.summary[f"below_{NEVER_SLOWER}_of_plain"] + evidence.summary[f"below_{NEAR_BEST}_of_best_fixed"]
    return int(bool(red))


if __name__ == "__main__":
    sys.exit(main())
