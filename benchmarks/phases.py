"""The phases of engine-check: which engines each starts, what it asks of them, and what must be true of the answers.

    oracle    one-row blocks of a head that copies the base: every draft must be accepted
    rows      what a forward costs with more and more rows, beside plain decoding
    text      the tiny trained model says the same in all ways, in float32, and drafts as well as it does elsewhere
    wide      the same model in a large shape: real acceptance at a large model's cost
    steps     what a step costs in all ways, by requests and context

Each takes less than nine minutes, of which starting engines is the most: an engine answers everything that is asked of
its way of decoding before it goes. Judging is apart from running, and needs only what was written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.evidence import ROOT
from vllm_orthrus.bench.near_ties import BOUNDS, Close, parting, ties
from vllm_orthrus.heads import (
    WEIGHTS,
    BaseShape,
    HeadConfig,
    base_tensor_name,
    expected_tensors,
    save_head,
    write_json,
    write_tensors,
)
from vllm_orthrus.heads.widen import read_tensors, widen_base, widen_facts, widen_head

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
QWEN3_06B: dict[str, Any] = QWEN3_8B | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}

Speculative = dict[str, Any] | None
WAYS: dict[str, Speculative] = {
    "plain": None,
    "two passes": {"orthrus_passes": "two"},
    "one pass": {"orthrus_passes": "one"},
    "one pass, fused": {"orthrus_passes": "one", "orthrus_attention": "kernel", "orthrus_verification": "fused"},
}


class Scale(NamedTuple):
    """How large everything is. Tests make it small."""

    small: Mapping[str, Any] = QWEN3_06B
    large: Mapping[str, Any] = QWEN3_8B
    ways: tuple[str, ...] = tuple(WAYS)
    prompts: tuple[tuple[int, ...], ...] = ()  # of the tiny model
    length: int = 96
    stop: tuple[int, ...] = ()
    at_once: tuple[int, ...] = (1, 8)  # requests in the wide shape
    # Hypotheses and rows of a block: 112, 128, 144, 240 and 272 rows with those of the verification.
    rows: tuple[tuple[int, int], ...] = ((6, 16), (7, 16), (8, 16), (7, 32), (8, 32))
    rows_points: tuple[tuple[int, int], ...] = ((1, 2048), (1, 16384))
    points: tuple[tuple[int, int], ...] = ((1, 1024), (1, 16384), (1, 65536), (8, 1024), (8, 16384), (64, 1024))
    block: int = 32  # of the released heads
    drafts: int = 15  # with the anchor, sixteen verified rows
    steps: int = 40
    wide_dtype: str = "bfloat16"
    oracles: tuple[str, ...] = ("float32", "bfloat16")
    engine: Mapping[str, Any] = {}  # options for every engine


class Start(NamedTuple):
    """One engine and what is asked of it."""

    name: str
    way: str
    engine: dict[str, Any]
    ask: dict[str, Any]
    seconds: float  # that it may take, start and all


Findings = Mapping[str, Mapping[str, Any]]  # by name of the engine: what it told


class Verdict(NamedTuple):
    """What is wrong, and what is merely a near tie, by engine."""

    red: dict[str, list[str]]
    near_ties: dict[str, list[str]]


class Phase(NamedTuple):
    starts: Callable[[Scale, Path], list[Start]]  # the folder is where checkpoints will be
    prepare: Callable[[Scale, Path], None]  # writes them
    prepare_seconds: float
    judge: Callable[[Scale, Findings], Verdict]
    needs: tuple[str, ...] = ()  # phases that must not be red for the speeds of this one to mean anything


# Checkpoints


def write_facts(scale: Scale, folder: Path) -> None:
    """Configs of a base and of heads whose weights are made up as they are loaded."""
    configs = {"base": dict(scale.large)}
    for block in {scale.block, *(block for _, block in scale.rows)}:
        head = HeadConfig.for_base(scale.large, block, scale.large["vocab_size"] - 1, name=None)
        configs[f"head-{block}"] = head.to_json(torch.bfloat16)
    for name, config in configs.items():
        (folder / name).mkdir(parents=True)
        write_json(folder / name / "config.json", config)


def write_nothing(scale: Scale, folder: Path) -> None:
    """For phases whose checkpoints are in the repository."""


def write_random(folder: Path, shape: Mapping[str, Any], seed: int = 0) -> None:
    """Random weights, with attention strong enough that texts don't run in circles; the head copies the attention."""
    base = BaseShape.from_config(shape)
    generator = torch.Generator().manual_seed(seed)
    inner, hidden = shape["intermediate_size"], base.hidden_size
    sizes = {base_tensor_name(name): size for name, size in expected_tensors(base).items()}
    for layer in range(base.num_layers):
        sizes |= {
            f"model.layers.{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"model.layers.{layer}.mlp.up_proj.weight": (inner, hidden),
            f"model.layers.{layer}.mlp.down_proj.weight": (hidden, inner),
            f"model.layers.{layer}.input_layernorm.weight": (hidden,),
            f"model.layers.{layer}.post_attention_layernorm.weight": (hidden,),
        }
    sizes |= {"model.embed_tokens.weight": (base.vocab_size, hidden), "model.norm.weight": (hidden,)}

    def weight(name: str, size: tuple[int, ...]) -> torch.Tensor:
        if len(size) == 1:
            return torch.full(size, 2.0 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0)
        gain = 2.0 if "o_proj" in name else 1.0
        spread = 2 / hidden**0.5 if "embed" in name else gain / size[1] ** 0.5
        return torch.randn(size, generator=generator).mul_(spread)

    tensors = {name: weight(name, size) for name, size in sizes.items()}
    (folder / "base").mkdir(parents=True)
    write_json(folder / "base" / "config.json", dict(shape) | {"dtype": "float32", "tie_word_embeddings": True})
    write_tensors(folder / "base" / WEIGHTS, tensors)
    save_one_row(copy_attention(tensors, base), shape, folder / "head")


def copy_attention(base: Mapping[str, torch.Tensor], shape: BaseShape) -> dict[str, torch.Tensor]:
    """The tensors of a head that is the base's attention over again."""
    return {name: base[base_tensor_name(name)] for name in expected_tensors(shape)}


def save_one_row(head: dict[str, torch.Tensor], config: Mapping[str, Any], folder: Path) -> None:
    save_head(folder, head, HeadConfig.for_base(config, 1, config["vocab_size"] - 1, name=None))


def write_oracles(scale: Scale, folder: Path) -> None:
    if "float32" in scale.oracles:
        write_random(folder / "float32", scale.small)
    if "bfloat16" in scale.oracles:
        widening = widen_base(TINY / "base", scale.small, folder / "bfloat16" / "base", torch.bfloat16)
        trained = read_tensors(TINY / "base" / WEIGHTS)
        head = widening.head(copy_attention(trained, widening.old.base))
        save_one_row(head, widening.config, folder / "bfloat16" / "head")


def write_wide(scale: Scale, folder: Path) -> None:
    dtype = getattr(torch, scale.wide_dtype)
    widening = widen_facts(TINY / "base", scale.large, folder / "base", dtype)
    widen_head(TINY / "head", widening, folder / "head")


# What is started


def drafting(head: Path, **settings: Any) -> dict[str, Any]:
    return {"method": "orthrus", "model": str(head), **settings}


def speculating(way: str, head: Path, **settings: Any) -> dict[str, Any]:
    """The engine option that makes it decode this way."""
    chosen = WAYS[way]
    return {} if chosen is None else {"speculative_config": drafting(head, **chosen, **settings)}


def answering(scale: Scale, at_once: tuple[int, ...], close: bool, stop: bool = True) -> dict[str, Any]:
    prompts = [list(prompt) for prompt in scale.prompts]
    stops = list(scale.stop) if stop else []
    return {"prompts": prompts, "length": scale.length, "stop": stops, "at_once": list(at_once), "close": close}


def stepping(scale: Scale, shape: Mapping[str, Any], points: tuple[tuple[int, int], ...]) -> tuple[dict[str, Any], Any]:
    """Engine options for a shape without weights that holds these points, and what to ask."""
    room = (scale.steps + 24) * (scale.drafts + 1)  # that all steps accept everything
    tokens = max(requests * (context + room) for requests, context in points)
    per_token = (
        4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    )  # keys, values; 2 bytes
    options = {
        "load_format": "dummy",
        "max_model_len": max(context for _, context in points) + room,
        "max_num_seqs": max(requests for requests, _ in points),
        # Also spares vLLM the capturing of every graph twice, once to see how much memory they take.
        "kv_cache_memory_bytes": int(1.05 * tokens * per_token) + (64 << 20),
    }
    return options, {"points": [list(point) for point in points], "steps": scale.steps}


def start_oracles(scale: Scale, folder: Path) -> list[Start]:
    starts = []
    for dtype in scale.oracles:
        engine = {
            "model": str(folder / dtype / "base"),
            "dtype": dtype,
            "max_model_len": 1024,
            "max_num_seqs": 16,
            "speculative_config": drafting(folder / dtype / "head", orthrus_passes="two", num_speculative_tokens=1),
        }
        starts.append(Start(dtype, "two passes", engine, answering(scale, (16,), close=True, stop=False), 75))
    return starts


def start_rows(scale: Scale, folder: Path) -> list[Start]:
    options, ask = stepping(scale, scale.large, scale.rows_points)
    plain = Start("plain", "plain", {"model": str(folder / "base"), **options}, ask, 75)
    starts = [plain]
    for hypotheses, block in scale.rows:
        rows = scale.drafts + 1 + hypotheses * block
        settings = {"orthrus_hypotheses": hypotheses, "orthrus_rows": rows, "num_speculative_tokens": scale.drafts}
        engine = plain.engine | speculating("one pass", folder / f"head-{block}", **settings)
        starts.append(Start(f"{rows} rows", "one pass", engine, ask, 85))
    return starts


def start_text(scale: Scale, folder: Path) -> list[Start]:
    options = {"model": str(TINY / "base"), "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 16}
    ask = answering(scale, (64,), close=False)
    return [
        Start(way, way, options | speculating(way, TINY / "head"), ask | {"close": way == "plain"}, 75)
        for way in scale.ways
    ]


def start_wide(scale: Scale, folder: Path) -> list[Start]:
    options = {
        "model": str(folder / "base"),
        "dtype": scale.wide_dtype,
        "max_model_len": 1024,
        "max_num_seqs": max(scale.at_once),
        "kv_cache_memory_bytes": 4 << 30,
        "load_format": "widened",
        "model_loader_extra_config": {"trained": str(TINY / "base")},
    }
    return [
        Start(
            way,
            way,
            options | speculating(way, folder / "head"),
            answering(scale, scale.at_once, close=way == "plain"),
            115,
        )
        for way in scale.ways
    ]


def start_steps(scale: Scale, folder: Path) -> list[Start]:
    options, ask = stepping(scale, scale.large, scale.points)
    head = folder / f"head-{scale.block}"
    return [
        Start(way, way, {"model": str(folder / "base"), **options} | speculating(way, head), ask, 120)
        for way in scale.ways
    ]


# What must be true


def close_places(answers: Mapping[str, Any], which: int) -> Close:
    """What the engine told as lists: [place, token, deficit, token, deficit, ...]."""
    return {
        int(place): dict(zip(map(int, rest[::2]), rest[1::2], strict=True)) for place, *rest in answers["close"][which]
    }


def without_graphs(found: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with an engine that a GPU was to replay in one piece."""
    started = found["started"]
    if started["eager"]:
        return
    if not started["cudagraph_mode"].startswith("FULL"):
        yield f"ran in graph mode {started['cudagraph_mode']}, not FULL"
    if started["passes"] is not None and not started["draft_graphs"]:
        yield "no draft pass has a graph"


def judge_oracles(scale: Scale, findings: Findings) -> Verdict:
    """Rejected drafts may be no more than there are places where another token ties with the best."""
    red: dict[str, list[str]] = {}
    near: dict[str, list[str]] = {}
    for name, found in findings.items():
        problems = red.setdefault(name, [*without_graphs(found)])
        for answers in found.get("answers", []):
            counted = answers["counted"]
            drafted = counted["vllm:spec_decode_num_draft_tokens"]
            rejected = drafted - counted["vllm:spec_decode_num_accepted_tokens"]
            texts = range(len(answers["tokens"]))
            tied = sum(ties(close_places(answers, which), BOUNDS[name]) for which in texts)
            said = f"{rejected:.0f} of {drafted:.0f} drafts were rejected, where {tied} places are near ties"
            if drafted == 0 or rejected > tied:
                problems.append(said)
            elif rejected:
                near.setdefault(name, []).append(said)
            variety = [len(set(tokens)) / len(tokens) for tokens in answers["tokens"]]
            if sum(variety) < 0.1 * len(variety):
                problems.append("texts are too monotonous to prove anything")
    return Verdict(red, near)


def judge_text(scale: Scale, findings: Findings) -> Verdict:
    return judge_texts(findings, BOUNDS["float32"])


def judge_wide(scale: Scale, findings: Findings) -> Verdict:
    return judge_texts(findings, BOUNDS[scale.wide_dtype])


def judge_texts(findings: Findings, bound: float) -> Verdict:
    red: dict[str, list[str]] = {}
    near: dict[str, list[str]] = {}
    plain = {answers["at_once"]: answers for answers in findings.get("plain", {}).get("answers", [])}
    for way, found in findings.items():
        problems = red.setdefault(way, [*without_graphs(found)])
        if way == "plain":
            continue
        for answers in found.get("answers", []):
            said, at_once = answers["tokens"], answers["at_once"]
            if at_once not in plain:
                problems.append(f"{at_once} at once: there is no plain text to compare with")
                continue
            texts = zip(plain[at_once]["tokens"], said, strict=True)
            for which, (wanted, other) in enumerate(texts):
                parted = parting(wanted, close_places(plain[at_once], which), other)
                if parted is not None:
                    within = parted.within(bound)
                    (near.setdefault(way, []) if within else problems).append(
                        f"{at_once} at once: text {which} parts {parted}"
                    )
            problems += drafts_badly(way, answers["counted"])
    return Verdict(red, near)


def drafts_badly(way: str, counted: Mapping[str, float]) -> Iterator[str]:
    """The head's own figures are known: 3.9 tokens per cycle on these prompts."""
    cycles = counted["vllm:spec_decode_num_drafts"]
    per_cycle = 1 + counted["vllm:spec_decode_num_accepted_tokens"] / cycles if cycles else 0
    if per_cycle < (3.0 if way == "two passes" else 2.5):
        yield f"{per_cycle:.2f} tokens per cycle, so drafts are not what they should be"
    if way.startswith("one pass") and not counted.get("vllm:orthrus_hits", 0):
        yield "no outcome was foreseen, so hypotheses did not ride along"


def judge_rows(scale: Scale, findings: Findings) -> Verdict:
    """Every forward must have had the rows that its time is given for."""
    red: dict[str, list[str]] = {}
    for name, found in findings.items():
        problems = red.setdefault(name, [*without_graphs(found)])
        for step in found.get("steps", []):
            if name != "plain" and "skipped" not in step and f"{step['rows'] or 0:.0f} rows" != name:
                problems.append(f"{step['requests']} x {step['context']}: {step['rows']} rows took part")
    return Verdict(red, {})


def judge_steps(scale: Scale, findings: Findings) -> Verdict:
    return Verdict({way: [*without_graphs(found)] for way, found in findings.items()}, {})


PHASES = {
    "oracle": Phase(start_oracles, write_oracles, 40, judge_oracles),
    "rows": Phase(start_rows, write_facts, 1, judge_rows, needs=("oracle",)),
    "text": Phase(start_text, write_nothing, 0, judge_text),
    "wide": Phase(start_wide, write_wide, 30, judge_wide, needs=("oracle", "text")),
    "steps": Phase(start_steps, write_facts, 1, judge_steps, needs=("oracle", "text")),
}
