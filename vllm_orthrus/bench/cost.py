"""What steps take, and how well an engine foretells it: measured on batches that it did not time before it served."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from vllm_orthrus.bench import plots
from vllm_orthrus.bench.asked import prepare
from vllm_orthrus.bench.environment import environment
from vllm_orthrus.bench.files import write_csv, write_json
from vllm_orthrus.bench.offline import VARIABLES
from vllm_orthrus.bench.process import AnsweringProcess
from vllm_orthrus.bench.settings import check_options

COLUMNS = ("requests", "context", "drafting", "seconds", "foretold", "roofline", "timed_before")


def run_cost(asked: argparse.Namespace) -> int:
    out = prepare(asked, ("concurrency", "context"))
    check_options(asked.options)
    speculative = {"method": "orthrus"} | ({"model": asked.head} if asked.head else {})
    options = ["--model", asked.model, "--dtype", asked.dtype, "--speculative-config", json.dumps(speculative)]
    log = Path(tempfile.mkdtemp(prefix="vllm-orthrus-bench-")) / "engine.log"
    print(f"{asked.model}: vLLM's engine; its log is {log}", flush=True)
    process = AnsweringProcess("vllm_orthrus.bench.cost_engine", [*options, *asked.options], VARIABLES, log)
    with closing(process):
        steps = process.ask(sorted(asked.concurrency), sorted(asked.context))["steps"]
    said = {name: value for name, value in vars(asked).items() if name not in ("run", "command")}
    found = {"environment": environment() | {"asked": said}, "errors": errors(steps), "steps": steps}
    write_json(out, found)
    write_csv(out.with_suffix(".csv"), COLUMNS, steps)
    plots.draw_cost(steps, f"{asked.model}, {asked.dtype}", out.with_suffix(".png"))
    print(table(steps))
    for name, error in found["errors"].items():
        print(f"{name}: median {100 * error['median']:.0f} %, worst {100 * error['worst']:.0f} % of {error['steps']}")
    print(f"\n{out}, {out.with_suffix('.csv').name}, {out.with_suffix('.png').name}")
    return 0


def errors(steps: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Relative, of what was foretold; steps that the engine had timed before are another matter."""
    found = {}
    for name, before in (("foretold, and not timed before", False), ("timed before", True)):
        missed = [abs(one["foretold"] / one["seconds"] - 1) for one in steps if one["timed_before"] is before]
        if missed:
            found[name] = {"median": statistics.median(missed), "worst": max(missed), "steps": len(missed)}
    return found


def table(steps: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'requests':>9}{'context':>9}{'drafts':>8}{'ms':>9}{'foretold':>10}{'off by':>8}{'roofline':>10}"]
    for one in steps:
        off = one["foretold"] / one["seconds"] - 1
        mark = "" if one["timed_before"] else "  not timed before"
        lines.append(
            f"{one['requests']:>9}{one['context']:>9.0f}{one['drafting']:>8}{1e3 * one['seconds']:>9.1f}"
            f"{1e3 * one['foretold']:>10.1f}{100 * off:>7.0f}%{1e3 * one['roofline']:>10.1f}{mark}"
        )
    return "\n".join(lines)
