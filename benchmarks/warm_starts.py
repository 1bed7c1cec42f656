"""Tokens per cycle of requests whose prompts this engine did not read just before, each beside a cold run.

    python -m benchmarks.warm_starts [--questions N] [--out FILE]

    cold           every prompt is read, and drafted behind
    prefix hits    all of it but its last page lies in the cache, from requests before
    preempted      requests are stopped for want of pages, and start anew with what they had said
    handed over    another engine, without drafts, has read the prompts, and a connector brings its pages

A drafter that keeps a cache of its own begins with nothing behind the last two, or reads the prompt a second time. The
diffusion view reads the target's cache and has none. Greedy, float32, the tiny trained model with all its drafts, every
case in engines and a process of its own. In one pass a request that starts anew begins with a draft pass, whose block
is exact, and so may keep a little more. Exit status 1: a text has changed, a case didn't happen, or tokens per cycle
are over 1 % below the cold run's. Some minutes of one core.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.evidence import FOLDER, ROOT, Evidence, environment
from tests.engine.subprocesses import result_of

CASES = ("cold", "prefix hits", "preempted", "handed over")
ANSWER, PAGE, LENGTH = 64, 32, 320
AT_ONCE = 8
# For 6 of 8 requests that have said all, and for all 8 before that.
FEW_PAGES = 6 * (LENGTH + ANSWER) // PAGE + 4
WITHIN = 0.01
ASK = """
import json, sys
from benchmarks.warm_starts import ask

print("RESULT" + json.dumps(ask(*map(json.loads, sys.argv[1:]))))
"""


@dataclass
class Found(Evidence):
    points: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


def ask(case: str, passes: str | None, count: int, store: str) -> dict[str, Any]:
    """In this process. passes: None without drafts. Says what was drafted, and that the case has happened."""
    from benchmarks.shared_prefixes import prompts
    from tests.engine.harness import Engine
    from tests.engine.trained import OPTIONS, TINY, trained_head

    cached = case in ("prefix hits", "preempted")
    options: dict[str, Any] = {"max_num_seqs": AT_ONCE, "enable_prefix_caching": cached}
    options["max_num_batched_tokens"] = AT_ONCE * LENGTH  # the connector stores whole prompts, not pieces
    if case == "preempted":
        options["num_gpu_blocks_override"] = FEW_PAGES
    if case == "handed over":
        where = {"kv_connector_extra_config": {"shared_storage_path": store}}
        options["kv_transfer_config"] = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"} | where
    speculative = None if passes is None else trained_head(passes)
    engine = Engine(TINY / "base", speculative, **OPTIONS | options)
    given = prompts(engine, 0, count)
    if case == "prefix hits":
        engine.run(given, 1)
    run = engine.run(given, 1 if speculative is None else ANSWER)
    engine.close()
    steps, _, accepted = run.counts
    return {
        "tokens": run.tokens,
        "tokens_per_cycle": 1 + accepted / steps if steps else 1.0,
        "not_read": run.cached_tokens / (count * LENGTH),
        "preemptions": run.preemptions,
    }


def in_a_process(*asked: Any) -> dict[str, Any]:
    """`ask`, where nothing else has a connector."""
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = result_of(Path(folder), ASK, *asked)
        return found


def happened(point: dict[str, Any]) -> bool:
    case, not_read = point["case"], point["not_read"]
    if case == "preempted":
        return bool(point["preemptions"] > 0)
    return bool(not_read == 0 if case == "cold" else not_read >= 1 - 2 * PAGE / LENGTH)


def summarise(points: list[dict[str, Any]]) -> dict[str, Any]:
    cold = {point["passes"]: point["tokens_per_cycle"] for point in points if point["case"] == "cold"}
    apart = [point["tokens_per_cycle"] / cold[point["passes"]] - 1 for point in points]
    return {
        "least": min(apart),
        "most": max(apart),
        "same_text_everywhere": all(point["same_text"] for point in points),
        "did_not_happen": [f"{point['case']}, {point['passes']}" for point in points if not happened(point)],
    }


def plot(points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as pyplot

    matplotlib.rcParams["svg.hashsalt"] = "orthrus"  # the same picture from the same figures
    figure, axis = pyplot.subplots(figsize=(6.4, 2.8), layout="constrained")
    for at, passes in enumerate(("two", "one")):
        mine = [point for point in points if point["passes"] == passes]
        places = [place + 0.38 * (at - 0.5) for place in range(len(mine))]
        rates = [point["tokens_per_cycle"] for point in mine]
        bars = axis.bar(places, rates, 0.36, label="two passes" if passes == "two" else "one pass")
        axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=1)
    axis.set_xticks(range(len(CASES)), CASES)
    axis.set_ylabel("tokens per cycle")
    axis.margins(y=0.15)
    axis.legend(fontsize=8, loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--out", type=Path, default=FOLDER / "warm-starts.json")
    args = parser.parse_args()
    evidence = Found(args.out, environment() | {"asked": f"--questions {args.questions}"})
    with tempfile.TemporaryDirectory() as store:
        in_a_process("handed over", None, args.questions, store)
        said: dict[str, Any] = {}
        for passes, case in tqdm([(passes, case) for passes in ("two", "one") for case in CASES]):
            found = in_a_process(case, passes, args.questions, store)
            tokens = found.pop("tokens")
            same = tokens == said.setdefault("first", tokens)
            evidence.points.append({"case": case, "passes": passes, "same_text": same, **found})
            evidence.write()
    evidence.summary = summarise(evidence.points)
    evidence.write()
    plot(evidence.points, ROOT / "docs" / "pictures" / "warm-starts.svg")
    print(json.dumps(evidence.summary, indent=1))
    wrong = evidence.summary["did_not_happen"] or not evidence.summary["same_text_everywhere"]
    return int(bool(wrong) or evidence.summary["least"] < -WITHIN)


if __name__ == "__main__":
    sys.exit(main())
