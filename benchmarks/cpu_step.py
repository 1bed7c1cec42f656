"""What a step costs on a CPU: stock vLLM, its Model Runner V2, and drafting in two passes and in one.

    python -m benchmarks.cpu_step [--out FILE] [--rounds 7] [--tokens 64]

The tiny trained model in examples/, one request at a time. In float32 all must say the same, or nothing is timed. Then
the engines take turns in bfloat16, one round each, so that whatever else the machine does falls on all of them. What is
compared are medians of rounds, each the median of its decoding steps. Beside it stand the quietest round and the
processor's time, of all threads: where they are far apart, the machine was busy, and the times say little.
"""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.evidence import ROOT, Evidence, default_path, environment
from vllm_orthrus.bench.environment import cpu_name
from vllm_orthrus.bench.process import AnsweringProcess, answer, questions

TINY = ROOT / "examples" / "tiny-orthrus"
STOCK, V2 = "stock vLLM, Model Runner V1", "Model Runner V2"
WAYS: dict[str, tuple[dict[str, str], dict[str, Any] | None]] = {
    STOCK: ({"VLLM_PLUGINS": "none"}, None),  # no plugin has this name, so none is loaded
    V2: ({"VLLM_USE_V2_MODEL_RUNNER": "1"}, None),
    "two passes": ({}, {"orthrus_passes": "two"}),
    "one pass": ({}, {"orthrus_passes": "one"}),
}
LIMITS = {"two passes": 15.0, "one pass": 18.0}  # milliseconds of a step, on two cores of 2.8 GHz without other work
V2_LIMIT = 1.5  # times the step of stock vLLM


@dataclass
class StepEvidence(Evidence):
    red: list[str] = field(default_factory=list)
    rounds: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    summary: dict[str, dict[str, float]] = field(default_factory=dict)


def start(way: str, dtype: str) -> AnsweringProcess:
    variables, speculative = WAYS[way]
    task = {"dtype": dtype, "speculative": speculative}
    engine = AnsweringProcess("benchmarks.cpu_step", task, variables, folder=ROOT)
    engine.ready()
    return engine


def serve(task: dict[str, Any]) -> None:
    """Be the process of an engine."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"model": str(TINY / "base"), "dtype": task["dtype"], "enforce_eager": True}
    if task["speculative"] is not None:
        options["speculative_config"] = {"method": "orthrus", "model": str(TINY / "head"), **task["speculative"]}
    sizes = {"max_model_len": 1024, "max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20}
    engine = LLM(**options, **sizes, enable_prefix_caching=False).llm_engine
    for request, (prompt, tokens) in enumerate(questions()):
        engine.add_request(str(request), prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
        times, busy, said = [], [], []
        while engine.has_unfinished_requests():
            start, worked = time.perf_counter(), time.process_time()
            outputs = engine.step()
            times.append(time.perf_counter() - start)
            busy.append(time.process_time() - worked)
            said = list(outputs[0].outputs[0].token_ids) if outputs else said
        # The first step reads the prompt.
        found = {"step": statistics.median(times[1:]) * 1e3, "processor": statistics.median(busy[1:]) * 1e3}
        answer(found | {"said": said, "steps": len(times) - 1})


def prompts(count: int) -> list[str]:
    lines = (TINY / "heldout.jsonl").read_text().splitlines()
    return [str(json.loads(line)["prompt"]) for line in lines[:: max(1, len(lines) // count)][:count]]


def differences(tokens: int) -> list[str]:
    """Which ways do not say what stock vLLM says, in float32."""
    said: dict[str, list[list[int]]] = {}
    for way in WAYS:
        engine = start(way, "float32")
        said[way] = [engine.ask(prompt, tokens)["said"] for prompt in prompts(4)]
        engine.close()
    return [f"{way}: says something else than stock vLLM" for way in WAYS if said[way] != said[STOCK]]


def measure(evidence: StepEvidence, rounds: int, tokens: int) -> None:
    engines = {way: start(way, "bfloat16") for way in WAYS}
    asked = prompts(rounds)
    for engine in engines.values():
        engine.ask(asked[0], tokens)  # compiles and allocates
    for prompt in asked:
        for way, engine in engines.items():
            found = engine.ask(prompt, tokens)
            per_step = (tokens - 1) / found["steps"]
            measured = {"step": found["step"], "processor": found["processor"], "tokens_per_step": per_step}
            evidence.rounds.setdefault(way, []).append(measured)
        evidence.write()
    for engine in engines.values():
        engine.close()


def summarise(evidence: StepEvidence) -> None:
    for way, found in evidence.rounds.items():
        steps = [each["step"] for each in found]
        against = [mine["step"] / stock["step"] for mine, stock in zip(found, evidence.rounds[STOCK], strict=True)]
        evidence.summary[way] = {
            "step_ms": statistics.median(steps),
            "quietest_step_ms": min(steps),
            "processor_ms": statistics.median(each["processor"] for each in found),
            "to_stock_step": statistics.median(against),
            "tokens_per_step": statistics.median(each["tokens_per_step"] for each in found),
        }
    evidence.red += [
        f"{way}: {evidence.summary[way]['step_ms']:.1f} ms a step, more than {limit}"
        for way, limit in LIMITS.items()
        if evidence.summary[way]["step_ms"] > limit
    ]
    if evidence.summary[V2]["to_stock_step"] > V2_LIMIT:
        evidence.red.append(f"{V2}: {evidence.summary[V2]['to_stock_step']:.2f} times a step of stock vLLM")
    evidence.write()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(json.loads(args.serve))
        return 0
    out = args.out or default_path("cpu-step", cpu_name())
    evidence = StepEvidence(out, environment() | {"rounds": args.rounds, "tokens": args.tokens})
    evidence.red = differences(args.tokens)
    evidence.write()
    if not evidence.red:
        measure(evidence, args.rounds, args.tokens)
        evidence.environment["load_after"] = os.getloadavg()
        summarise(evidence)
        for way, found in evidence.summary.items():
            print(
                f"{way:<28} {found['step_ms']:6.1f} ms a step (quietest {found['quietest_step_ms']:.1f}, "
                f"processor {found['processor_ms']:.1f}), "
                f"{found['to_stock_step']:.2f} of stock, {found['tokens_per_step']:.1f} tokens"
            )
    for problem in evidence.red:
        print("RED", problem)
    return int(bool(evidence.red))


if __name__ == "__main__":
    sys.exit(main())
