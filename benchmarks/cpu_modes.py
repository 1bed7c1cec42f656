"""Seconds, not tokens per forward: plain decoding, drafting in fixed ways, and whatever "auto" makes of it, on a CPU.

    python -m benchmarks.cpu_modes [--out FILE] [--rounds 5] [--tokens 128] [--at-once 1 4] [--dtype float32]

The tiny trained model and its head, widened to a size at which a forward costs what a small real model's does, so that
acceptance and time are both real. The baseline is stock vLLM: without the plugin, on the model runner that it picks.
First all say the same in float32 with the tiny model itself, or nothing is timed. Then engines take turns, prompt by
prompt; what is compared are ratios of tokens per second to the baseline's on the same prompts. Answers end where the
model ends them, as what it says past that is no text of any class; third-party text goes on and on.

Processors without products in bfloat16 multiply more than one row many times slower than one: there drafts pay in
float32 alone.

A class is called faster or slower only if all its rounds agree on that.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.cpu_step import TINY
from benchmarks.evidence import ROOT, Evidence, default_path, environment
from vllm_orthrus.bench.environment import cpu_name
from vllm_orthrus.bench.process import AnsweringProcess, answer, questions
from vllm_orthrus.heads.widen import read_config, shape_like, widen_base, widen_head, widen_selector
from vllm_orthrus.training.samples import encode_prompt

STOCK = "plain"
WAYS: dict[str, tuple[dict[str, str], dict[str, Any] | None]] = {
    STOCK: ({"VLLM_PLUGINS": "none"}, None),  # no plugin has this name, so none is loaded
    "two passes": ({}, {"orthrus_passes": "two"}),
    "one pass": ({}, {"orthrus_passes": "one"}),
    "auto": ({}, {}),
    "auto, selector": ({}, {"orthrus_selector": "selector"}),  # the folder beside the head
}
LOW_ENTROPY = ("arithmetic", "counting", "json", "log")
WORDS = "third-party text"


@dataclass
class ModesEvidence(Evidence):
    red: list[str] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)  # seconds and tokens of each turn
    summary: dict[str, Any] = field(default_factory=dict)


def begin(way: str, folder: Path, dtype: str, most: int) -> AnsweringProcess:
    """It is ready when it has answered for the first time."""
    variables, speculative = WAYS[way]
    task = {"folder": str(folder), "dtype": dtype, "speculative": speculative, "most": most}
    return AnsweringProcess("benchmarks.cpu_modes", task, variables, folder=ROOT)


def serve(task: dict[str, Any]) -> None:
    """Be the process of an engine."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    folder = Path(task["folder"])
    options: dict[str, Any] = {"model": str(folder / "base"), "dtype": task["dtype"], "skip_tokenizer_init": True}
    if task["speculative"] is not None:
        asked = dict(task["speculative"])
        if "orthrus_selector" in asked:
            asked["orthrus_selector"] = str(folder / asked["orthrus_selector"])
        options["speculative_config"] = {"method": "orthrus", "model": str(folder / "head"), **asked}
    sizes = {"max_model_len": 1024, "max_num_seqs": task["most"], "kv_cache_memory_bytes": 1 << 30}
    sizes["max_num_batched_tokens"] = 128  # vLLM first reads that many, to see what memory it takes
    engine = LLM(**options, **sizes, enable_prefix_caching=False).llm_engine
    number, end = 0, read_config(folder / "base")["eos_token_id"]
    for prompts, tokens, ends in questions():
        stop: dict[str, Any] = {"stop_token_ids": [end]} if ends else {"ignore_eos": True}
        params = SamplingParams(temperature=0, max_tokens=tokens, detokenize=False, **stop)
        said: dict[str, list[int]] = {}
        for prompt in prompts:
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
            said[str(number)] = []
            number += 1
        engine.step()  # prompts are read, which no way does differently
        started, steps = time.perf_counter(), 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                said[output.request_id] = list(output.outputs[0].token_ids)
            steps += 1
        seconds = time.perf_counter() - started
        answer({"seconds": seconds, "steps": steps, "said": list(said.values())})


def asked_prompts(rounds: int) -> dict[str, list[list[int]]]:
    """By class, held out from training; and, as text that the base has never seen anything like, licences and code."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    found: dict[str, list[list[int]]] = {}
    for line in (TINY / "heldout.jsonl").read_text().splitlines():
        prompt = json.loads(line)
        found.setdefault(prompt["class"], []).append(encode_prompt(tokenizer, prompt["prompt"]))
    files = [Path(torch.__file__).parent / "functional.py", Path(json.__file__), Path(argparse.__file__)]
    pieces = [text[at : at + 300] for text in (file.read_text() for file in files) for at in range(0, 9000, 900)]
    found[WORDS] = [tokenizer(piece)["input_ids"][:96] for piece in pieces]
    choose = random.Random(0)
    return {kind: choose.sample(prompts, min(rounds, len(prompts))) for kind, prompts in found.items()}


def differences(ways: Iterable[str], prompts: dict[str, list[list[int]]], tokens: int) -> list[str]:
    """Which of these ways do not say what stock vLLM says, in float32 and with the tiny model itself."""
    said = {}
    for way in ways:
        engine = begin(way, TINY, "float32", 8)
        engine.ready()
        said[way] = [engine.ask(some[:1], tokens, True)["said"] for some in prompts.values()]
        engine.close()
    return [f"{way}: says something else than stock vLLM" for way in said if said[way] != said[STOCK]]


def widened(like: str, dtype: str) -> Path:
    """Made once: what vLLM compiles and times for a model it finds again by the model's folder."""
    folder = ROOT / "runs" / f"tiny-orthrus-as-{like}-{dtype}"
    if not (folder / "selector").exists():
        unfinished = folder.with_name(f"{folder.name}-unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        larger = shape_like(like, read_config(TINY / "base"))
        widening = widen_base(TINY / "base", larger, unfinished / "base", getattr(torch, dtype))
        widen_head(TINY / "head", widening, unfinished / "head")
        widen_selector(TINY / "selector", widening, unfinished / "selector")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    return folder


def measure(evidence: ModesEvidence, folder: Path, prompts: dict[str, list[list[int]]], args: Any) -> None:
    engines: dict[str, AnsweringProcess] = {}
    for way in args.ways:  # one by one: an engine that starts times its steps
        engines[way] = begin(way, folder, args.dtype, max(args.at_once))
        engines[way].ready()
    for engine in engines.values():
        engine.ask([prompts["counting"][0]], 48, True)  # compiles and allocates
    turns = [(n, kind, at) for n in args.at_once for at in range(args.rounds) for kind in prompts]
    for n, kind, at in tqdm(turns, desc="turns"):
        some = [prompts[kind][(at + which) % len(prompts[kind])] for which in range(n)]
        for way, engine in engines.items():
            found = engine.ask(some, args.tokens, kind != WORDS)
            said = sum(map(len, found.pop("said"))) - n  # the first token comes of the prompt
            evidence.rounds.append({"way": way, "at_once": n, "class": kind, "round": at, "tokens": said, **found})
        evidence.write()
    for engine in engines.values():
        engine.close()


def summarise(evidence: ModesEvidence) -> None:
    rate = {
        (one["way"], one["at_once"], one["class"], one["round"]): one["tokens"] / one["seconds"]
        for one in evidence.rounds
    }
    for n in sorted({one["at_once"] for one in evidence.rounds}):
        mine = [one for one in evidence.rounds if one["at_once"] == n]
        kinds = list(dict.fromkeys(one["class"] for one in mine))
        for way in dict.fromkeys(one["way"] for one in mine):
            found = evidence.summary.setdefault(str(n), {}).setdefault(way, {})
            for kind in kinds:
                ratios = [
                    rate[way, n, kind, one["round"]] / rate[STOCK, n, kind, one["round"]]
                    for one in mine
                    if one["way"] == way and one["class"] == kind
                ]
                found[kind] = {
                    "times_plain": statistics.median(ratios),
                    "least": min(ratios),
                    "most": max(ratios),
                    "ms_per_token": 1e3 * _seconds_per_token(mine, way, [kind]),
                    "agree": min(ratios) > 1 or max(ratios) < 1,
                }
            for name, pooled in (("low-entropy", LOW_ENTROPY), ("all", kinds)):
                plain, this = (_seconds_per_token(mine, one, pooled) for one in (STOCK, way))
                found[name] = {"times_plain": plain / this, "ms_per_token": 1e3 * this}
    evidence.write()


def _seconds_per_token(rounds: list[dict[str, Any]], way: str, kinds: Any) -> float:
    some = [one for one in rounds if one["way"] == way and one["class"] in kinds]
    return float(sum(one["seconds"] for one in some) / sum(one["tokens"] for one in some))


def plot(summary: dict[str, Any], what: str, path: Path) -> None:
    """Times plain decoding by class, from the least of the rounds to the most: a row for each size of the batch."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "orthrus"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(summary), 1, figsize=(9, 2.2 * len(summary)), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, (n, ways) in zip(axes[:, 0], summary.items(), strict=True):
        mine = [way for way in ways if way != STOCK]
        for at, way in enumerate(mine):
            kinds = list(ways[way])
            places = [place + 0.8 * (at + 0.5) / len(mine) - 0.4 for place in range(len(kinds))]
            times = [ways[way][kind]["times_plain"] for kind in kinds]
            bars = axis.bar(places, times, 0.8 / len(mine), label=way)
            axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
            for place, found in zip(places, ways[way].values(), strict=True):
                if "least" in found:
                    axis.plot([place, place], [found["least"], found["most"]], color="black", lw=0.8)
        axis.axhline(1, color="grey", lw=1, ls="--")
        axis.set_ylabel(f"{n} at once\ntimes plain", fontsize=8)
        axis.set_xticks(range(len(kinds)), kinds, fontsize=8)
    axes[0, 0].legend(fontsize=8, ncols=3, loc="upper right")
    figure.suptitle(what, fontsize=9)
    figure.savefig(path)
    plt.close(figure)


def print_table(summary: dict[str, Any]) -> None:
    for n, ways in summary.items():
        kinds = list(ways[STOCK])
        print(f"\n{n} at once    " + "".join(f"{kind[:12]:>14}" for kind in kinds))
        for way, found in ways.items():
            cells = (f"{found[kind]['ms_per_token']:6.1f} {found[kind]['times_plain']:5.2f}x" for kind in kinds)
            print(f"{way:<14}" + "".join(f"{cell:>14}" for cell in cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--like", default="28x1280", help="as for `vllm-orthrus widen`")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(json.loads(args.serve))
        return 0
    asked = {"rounds": args.rounds, "tokens": args.tokens, "like": args.like, "dtype": args.dtype}
    evidence = ModesEvidence(args.out or default_path(f"cpu-modes-{args.dtype}", cpu_name()), environment() | asked)
    prompts = asked_prompts(args.rounds)
    evidence.red = differences(dict.fromkeys([STOCK, *args.ways]), prompts, 48)
    evidence.write()
    if not evidence.red:
        measure(evidence, widened(args.like, args.dtype), prompts, args)
        evidence.environment["load_after"] = os.getloadavg()
        summarise(evidence)
        print_table(evidence.summary)
        what = f"tokens per second against stock vLLM: {args.like}, {args.dtype}, {evidence.environment['cores']} cores"
        plot(evidence.summary, what, evidence.path.with_suffix(".svg"))
    for problem in evidence.red:
        print("RED", problem)
    return int(bool(evidence.red))


if __name__ == "__main__":
    sys.exit(main())
