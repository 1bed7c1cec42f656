"""Which batches have CUDA graphs and carry hypotheses: vLLM's graph managers are asked, docs/graphs.md is written.

python -m tests.rehearsal.graph_table
"""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.rehearsal.gpus import GPUS
from tests.rehearsal.machines import Ask, machines
from tests.rehearsal.qwen3 import Loaded, load, verification_graphs
from vllm_orthrus.policy.cost import Forward, Model, forward_seconds
from vllm_orthrus.policy.devices import find_device

PAGE = Path(__file__).parents[2] / "docs" / "graphs.md"
MOST_REQUESTS = 64
PROMPT = 64  # tokens that one request reads, in batches where one reads


class Graph(NamedTuple):
    mode: str
    requests: int | None  # with those that pad
    tokens: int


class Batch(NamedTuple):
    """What happens to a batch of so many requests."""

    requests: int
    verification: Graph
    hypotheses: int  # that ride along, for each request
    outcome: Graph | None  # that takes up what became of it
    drafts: Graph  # of a pass of their own
    reading: Graph  # the forward, if one of the requests reads its prompt
    fewer: list[tuple[Graph, Graph | None]]  # verification and draft pass of each mode of fewer drafts


class Serving(NamedTuple):
    """What a GPU's defaults are."""

    max_num_seqs: int
    at_once: int  # requests of one draft pass
    max_num_batched_tokens: int
    attention: str
    mode: str
    captured: list[int]
    block: int
    verified: int
    modes: list[int]
    graphs: dict[str, int]  # how many there are
    by_size: int  # that there would be, if vLLM's sizes were captured for every mode
    fixed: int  # that there would be for one mode
    batches: list[Batch]


def ask_managers() -> Serving:
    from vllm.v1.worker.gpu.dp_utils import dispatch_cg_and_sync_dp

    loaded = load()
    scheduler, speculator = loaded.config.scheduler_config, loaded.speculator
    shape, block = speculator.shape, speculator.shape.block
    verified, modes = shape.verified, list(shape.modes)
    target, drafts, outcomes = loaded.target_graphs, speculator.graphs, speculator.outcome_graphs

    def find(manager: Any, requests: int, tokens: int, each: int | None) -> Graph:
        found, _ = dispatch_cg_and_sync_dp(manager, requests, tokens, each, 1, 0, uniform_decode=each is not None)
        return Graph(found.cg_mode.name, found.num_reqs, found.num_tokens)

    def batch(n: int) -> Batch:
        verification = find(target, n, n * verified, verified)
        padded = verification.requests or n
        # Graphs of single pieces have no place for hypotheses; no graph at all is as good as a full one.
        hypotheses = 0 if verification.mode == "PIECEWISE" else shape.num_hypotheses(padded)
        outcome = outcomes.find(padded)
        drafting = min(n, speculator.draft_pass.at_once)

        def pass_of(width: int) -> Graph:
            return find(drafts, drafting, drafting * width, width)

        return Batch(
            n,
            verification,
            hypotheses,
            None if outcome is None else Graph(outcome.cg_mode.name, outcome.num_reqs, outcome.num_tokens),
            pass_of(block),
            find(target, n, (n - 1) * verified + PROMPT, None),
            [(find(target, n, n * (mode + 1), mode + 1), pass_of(mode) if mode else None) for mode in modes[:-1]],
        )

    def verifications(mode: int) -> int:
        return sum(graph.uniform_token_count == mode + 1 for graph in target.graphs)

    pieces = sum(graph.cg_mode.name == "PIECEWISE" for graph in target.graphs)
    graphs = {
        "pieces": pieces,
        **{f"{mode} drafts": verifications(mode) for mode in modes},
        "draft passes": len(drafts.graphs),
        "outcomes": len(outcomes.graphs),
    }
    widest = sum(graph.uniform_token_count == block for graph in drafts.graphs)
    return Serving(
        scheduler.max_num_seqs,
        speculator.draft_pass.at_once,
        scheduler.max_num_batched_tokens,
        loaded.attention[0].attn_backend.get_name(),
        loaded.mode.name,
        loaded.config.compilation_config.cudagraph_capture_sizes,
        block,
        verified,
        modes,
        graphs,
        pieces + by_size(loaded, modes) + len(drafts.graphs) + len(outcomes.graphs),
        pieces + verifications(modes[-1]) + widest + len(outcomes.graphs),
        [batch(n) for n in range(1, MOST_REQUESTS + 1)],
    )


def by_size(loaded: Loaded, modes: list[int]) -> int:
    """Graphs of whole verifications that vLLM plans for a table with these numbers of drafts."""
    with pytest.MonkeyPatch.context() as patch:
        table = [(size, size, mode) for size, mode in enumerate(modes, start=1)]
        patch.setattr(loaded.config.speculative_config, "orthrus_modes", None)
        patch.setattr(loaded.config.speculative_config, "num_speculative_tokens_per_batch_size", table)
        return len(verification_graphs(loaded.config, loaded.mode))


def page(ask: Ask) -> str:
    found: dict[str, Serving] = {gpu: ask(gpu, ask_managers) for gpu in GPUS}
    one = next(iter(found.values()))

    def tables(table: Callable[[Serving], str]) -> str:
        alike: dict[str, list[str]] = {}
        for gpu, serving in found.items():
            alike.setdefault(table(serving), []).append(gpu)
        return "\n".join(f"**{', '.join(gpus)}**\n\n{text}" for text, gpus in alike.items())

    return f"""# Which batches have CUDA graphs

What vLLM's own graph managers answer for Qwen3-8B and its released head under `vllm serve`, with every other setting
at its default: {one.verified} verified rows per request, blocks of {one.block}. Platform class, configuration, model,
speculator and managers are real; only what a device would answer (name, capability, memory) is stated. Not shown:
whether a capture succeeds, and how fast anything is.

`python -m tests.rehearsal.graph_table` wrote this page on a machine without a GPU. A test asks again and compares, with
every supported vLLM.

{serving_table(found)}
Larger batches draft in turns. Scheduling is asynchronous.

## With the most drafts, in one pass

*Full*: one graph replays the forward. *Pieces*: all but attention is replayed, and no hypotheses ride. *None*: compiled
code without a graph. Where hypotheses ride, a graph takes up the outcome as well; where they don't, and behind prompts,
drafts come from a pass of their own.

{tables(batches_table)}
## With fewer drafts, in two passes

Each step may make {one.modes[-1]} drafts or fewer (`orthrus_modes`). These verifications have graphs of their own, and
draft passes have them too, whose blocks have a row for each draft. No hypotheses ride.

{tables(fewer_table)}
## How many there are

vLLM's sizes, {len(one.captured)} here, count tokens. Of verifications of fewer drafts than the most they count
requests, so that plain decoding has the graphs that it has by itself. *By size*: what there would be if vLLM planned
them for a table of these numbers of drafts. *Fixed*: with `orthrus_modes: []`. Where rows take their time, there are
more between vLLM's sizes, as requests that only fill a graph are computed like others. How long a capture of all
takes, and the memory it keeps, was not measured yet. Behind tensor parallelism vLLM's own all-reduce has room for
65,536 entries of graphs, which targets of more than 58 layers could overflow: with those, verifications of fewer drafts
and draft passes have graphs for 1, 2, 4, 8, ... requests, unless `--disable-custom-all-reduce` does without entries.

{graphs_table(found)}
By the roofline of `vllm_orthrus/policy/cost.py`, milliseconds of a cycle of two passes with {one.modes[-1]} drafts at
2K of context: its drafts padded to vLLM's sizes, as they are here, and not at all.

{padding_table(one)}"""


def serving_table(found: dict[str, Serving]) -> str:
    names = [
        "GPU",
        "`max_num_seqs`",
        "of these in one draft pass",
        "`max_num_batched_tokens`",
        "attention",
        "graphs",
        "up to",
    ]
    rows = [
        [
            gpu,
            serving.max_num_seqs,
            serving.at_once,
            serving.max_num_batched_tokens,
            serving.attention,
            serving.mode,
            f"{max(serving.captured)} tokens",
        ]
        for gpu, serving in found.items()
    ]
    return markdown(names, rows)


def batches_table(serving: Serving) -> str:
    names = ["requests", "verification", "hypotheses each", "rows of its forward", "outcome", "draft pass"]
    names.append(f"verification, one reading {PROMPT} tokens instead")

    def cells(batch: Batch) -> list[Any]:
        exact = batch.verification.requests == batch.requests
        return [
            describe(batch.verification, "" if exact else f", of {batch.verification.requests}"),
            batch.hypotheses,
            "-" if batch.outcome is None else describe(batch.outcome),
            describe(batch.drafts, f", of {batch.drafts.requests}"),
            describe(batch.reading),
        ]

    rows = []
    for (verification, hypotheses, *others), several in groupby(serving.batches, cells):
        same = list(several)
        rows_of = [
            batch.verification.tokens + (batch.verification.requests or 0) * hypotheses * serving.block
            for batch in (same[0], same[-1])
        ]
        requests = span(same[0].requests, same[-1].requests)
        rows.append([requests, verification, hypotheses, span(*rows_of), *others])
    return markdown(names, rows)


def fewer_table(serving: Serving) -> str:
    names = ["requests"]
    for mode in serving.modes[:-1]:
        names += [f"verification of {mode}", f"draft pass of {mode}"] if mode else ["plain decoding"]

    def cells(batch: Batch) -> list[str]:
        graphs = [graph for pair in batch.fewer for graph in pair if graph is not None]
        return [describe(graph, f", of {graph.requests}") for graph in graphs]

    rows = []
    for same, several in groupby(serving.batches, cells):
        numbers = [batch.requests for batch in several]
        rows.append([span(numbers[0], numbers[-1]), *same])
    return markdown(names, rows)


def graphs_table(found: dict[str, Serving]) -> str:
    kinds = list(next(iter(found.values())).graphs)
    rows = [
        [gpu, *serving.graphs.values(), sum(serving.graphs.values()), serving.by_size, serving.fixed]
        for gpu, serving in found.items()
    ]
    return markdown(["GPU", *kinds, "together", "by size", "fixed"], rows)


def padding_table(serving: Serving) -> str:
    """What the draft pass is padded to counts; attention has nothing to do for such rows, and no part in that."""
    rows: list[list[Any]] = []
    for gpu in ("H200", "A100", "RTX 4090"):
        device, model = find_device(gpu), Model()
        for requests in (5, 9, 12, 17, 20):
            ours = serving.batches[requests - 1].drafts.requests or requests
            padded = [next(size for size in (1, 2, 4, *range(8, 72, 8)) if size >= requests), ours, requests]
            seconds = [
                device.step
                + forward_seconds(device, model, Forward(requests, 2048, verified=serving.verified))
                + forward_seconds(
                    device, model, Forward(count, 2048 * requests / count, 0, serving.block, serving.verified)
                )
                for count in padded
            ]
            rows.append([gpu, requests, *(f"{1000 * one:.1f}" for one in seconds), f"{seconds[0] / seconds[1]:.2f}"])
    return markdown(["GPU", "requests", "vLLM's sizes", "here", "not padded", "times as fast"], rows)


def describe(graph: Graph, more: str = "") -> str:
    return {"FULL": "full", "PIECEWISE": "pieces", "NONE": "none"}[graph.mode] + (more if graph.mode == "FULL" else "")


def span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def markdown(names: list[str], rows: list[list[Any]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


if __name__ == "__main__":
    with machines() as ask:
        PAGE.write_text(page(ask))
