"""The whole engine on a GPU: first whether it drafts as it must, then what a step costs.

    python -m benchmarks.engine_check [--out FILE] [--minutes 9]

Needs vLLM and this package. Right means: the tiny trained model in examples/ says the same in one pass, in two and
without drafts, in float32, and accepts as many drafts as it does elsewhere. Only then are steps timed, at the shape of
Qwen3-8B with random weights: plain, two passes, one pass, one pass with fused verification, and how they compare.
Everything is written after each engine, so what there was no time for costs nothing else.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence import ROOT, Evidence, default_path
from benchmarks.gpu_check import environment
from vllm_orthrus.heads import HeadConfig, write_json

TINY = ROOT / "examples" / "tiny-orthrus"
QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
BLOCK = 32
POINTS = [(1, 1024), (1, 16384), (1, 65536), (8, 1024), (8, 16384), (64, 1024)]

Speculative = dict[str, Any] | None
WAYS: dict[str, Speculative] = {
    "plain": None,
    "two passes": {"orthrus_passes": "two"},
    "one pass": {"orthrus_passes": "one"},
    "one pass, fused": {"orthrus_passes": "one", "orthrus_attention": "kernel", "orthrus_verification": "fused"},
}


@dataclass
class EngineEvidence(Evidence):
    correctness: dict[str, Any] = field(default_factory=dict)
    red: list[str] = field(default_factory=list)
    seconds_per_step: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def run_engine(task: dict[str, Any], timeout: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.engine_run", json.dumps(task)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return found
    raise RuntimeError((done.stderr or done.stdout)[-2000:])


def each_way(evidence: EngineEvidence, deadline: float, what: str) -> Iterator[tuple[str, Speculative, float]]:
    for way, speculative in WAYS.items():
        left = deadline - time.monotonic()
        if left < 30:
            evidence.failed[f"{what}, {way}"] = "no time left"
            evidence.write()
            continue
        yield way, speculative, left


def check(evidence: EngineEvidence, deadline: float, per_class: int, length: int) -> bool:
    """Whether all ways say the same, and draft as well as the head can."""
    from transformers import AutoTokenizer

    from vllm_orthrus.training.evaluate import read_prompts

    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    taken: dict[str, list[list[int]]] = {}
    for prompt in read_prompts(TINY / "heldout.jsonl", tokenizer):
        taken.setdefault(prompt.kind, []).append(prompt.tokens)
    prompts = [tokens for of_kind in taken.values() for tokens in of_kind[:per_class]]
    options = {"model": str(TINY / "base"), "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 16}
    said: dict[str, list[list[int]]] = {}
    for way, speculative, left in each_way(evidence, deadline, "correctness"):
        engine = options | ({} if speculative is None else {"speculative_config": drafting(TINY / "head", speculative)})
        task = {"engine": engine, "prompts": prompts, "length": length, "stop": [tokenizer.eos_token_id]}
        try:
            found = run_engine(task, left)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            evidence.failed[f"correctness, {way}"] = str(error)
            evidence.red.append(f"{way}: did not run")
            evidence.write()
            continue
        said[way] = found.pop("tokens")
        evidence.correctness[way] = found | {"prompts": len(prompts)}
        evidence.red += judge(way, found, said)
        evidence.write()
        print(f"{way}: {found['counted']}, graphs {found['cudagraph_mode']}", flush=True)
    return not evidence.red and len(said) == len(WAYS)


def judge(way: str, found: dict[str, Any], said: dict[str, list[list[int]]]) -> list[str]:
    """What is wrong with an answer. The head's own figures are known: 3.9 tokens per cycle on these prompts."""
    if way == "plain":
        return []
    problems, counted = [], found["counted"]
    different = sum(mine != plain for mine, plain in zip(said[way], said.get("plain", []), strict=True))
    if different:
        problems.append(f"{way}: {different} of {len(said[way])} texts differ from plain decoding")
    cycles = counted["vllm:spec_decode_num_drafts"]
    per_cycle = 1 + counted["vllm:spec_decode_num_accepted_tokens"] / cycles
    if per_cycle < (3.0 if way == "two passes" else 2.5):
        problems.append(f"{way}: {per_cycle:.2f} tokens per cycle, so drafts are not what they should be")
    if way.startswith("one pass") and not counted.get("vllm:orthrus_hits", 0):
        problems.append(f"{way}: no outcome was foreseen, so hypotheses did not ride along")
    return problems


def drafting(head: Path, speculative: dict[str, Any]) -> dict[str, Any]:
    return {"method": "orthrus", "model": str(head), **speculative}


def measure(evidence: EngineEvidence, deadline: float, shape: dict[str, Any], points: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base, head = Path(folder) / "base", Path(folder) / "head"
        block = HeadConfig.for_base(shape, BLOCK, mask_token_id=shape["vocab_size"] - 1, name=None)
        for place, config in ((base, shape), (head, block.to_json(torch.bfloat16))):
            place.mkdir()
            write_json(place / "config.json", config)
        options = {
            "model": str(base),
            "load_format": "dummy",
            "max_model_len": max(context for _, context in points) + 1024,
            "max_num_seqs": max(requests for requests, _ in points),
        }
        for way, speculative, left in each_way(evidence, deadline, "speed"):
            engine = options | ({} if speculative is None else {"speculative_config": drafting(head, speculative)})
            try:
                found = run_engine({"engine": engine, "points": points, "steps": 40}, left)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                evidence.failed[f"speed, {way}"] = str(error)
                evidence.write()
                continue
            evidence.seconds_per_step[way] = found
            evidence.write()
            show(way, found, evidence.seconds_per_step.get("plain"))


def show(way: str, found: dict[str, Any], plain: dict[str, Any] | None) -> None:
    reference = {(step["requests"], step["context"]): step["mean"] for step in plain["steps"]} if plain else {}
    for step in found["steps"]:
        base = reference.get((step["requests"], step["context"]))
        ratio = f"{step['mean'] / base:.2f} of plain" if base else ""
        print(
            f"{way}, {step['requests']} x {step['context']}: {1e3 * step['mean']:.2f} ms per step {ratio}", flush=True
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: benchmarks/evidence/engine_check-GPU.json")
    parser.add_argument("--minutes", type=float, default=9.0, help="start nothing that could not end by then")
    parser.add_argument("--per-class", type=int, default=8, help="prompts of each class to compare")
    parser.add_argument("--length", type=int, default=96, help="tokens of each answer to compare")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("engine-check needs a GPU that this PyTorch can use, and found none; nothing was checked or measured.")
        return 2
    deadline = time.monotonic() + 60 * options.minutes
    facts = environment()
    evidence = EngineEvidence(options.out or default_path("engine_check", facts["gpu"]), facts)
    right = check(evidence, deadline, options.per_class, options.length)
    if right:
        measure(evidence, deadline, QWEN3_8B, POINTS)
    else:
        print("Not as it must be, so nothing is timed:", *evidence.red, *evidence.failed.values(), sep="\n  ")
    evidence.write()
    print(f"written to {evidence.path}")
    return 0 if right and not evidence.failed else 1


if __name__ == "__main__":
    raise SystemExit(main())
