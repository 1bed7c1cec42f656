"""Which batches have CUDA graphs and carry hypotheses: vLLM's graph managers are asked, docs/graphs.md is written.

python -m tests.rehearsal.graph_table
"""

from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from tests.rehearsal.gpus import GPUS
from tests.rehearsal.machines import Ask, machines
from tests.rehearsal.qwen3 import load

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
    batches: list[Batch]


def ask_managers() -> Serving:
    from vllm.v1.worker.gpu.dp_utils import dispatch_cg_and_sync_dp

    loaded = load()
    scheduler, speculator = loaded.config.scheduler_config, loaded.speculator
    shape, block = speculator.shape, speculator.shape.block
    verified = shape.verified

    def find(manager: Any, requests: int, tokens: int, each: int | None) -> Graph:
        found, _ = dispatch_cg_and_sync_dp(manager, requests, tokens, each, 1, 0, uniform_decode=each is not None)
        return Graph(found.cg_mode.name, found.num_reqs, found.num_tokens)

    def batch(n: int) -> Batch:
        verification = find(loaded.target_graphs, n, n * verified, verified)
        padded = verification.requests or n
        # Graphs of single pieces have no place for hypotheses; no graph at all is as good as a full one.
        hypotheses = 0 if verification.mode == "PIECEWISE" else shape.num_hypotheses(padded)
        outcome = speculator.outcome_graphs.find(padded)
        drafting = min(n, speculator.draft_pass.at_once)
        return Batch(
            n,
            verification,
            hypotheses,
            None if outcome is None else Graph(outcome.cg_mode.name, outcome.num_reqs, outcome.num_tokens),
            find(speculator.graphs, drafting, drafting * block, block),
            find(loaded.target_graphs, n, (n - 1) * verified + PROMPT, None),
        )

    return Serving(
        scheduler.max_num_seqs,
        speculator.draft_pass.at_once,
        scheduler.max_num_batched_tokens,
        loaded.attention[0].attn_backend.get_name(),
        loaded.mode.name,
        loaded.config.compilation_config.cudagraph_capture_sizes,
        block,
        verified,
        [batch(n) for n in range(1, MOST_REQUESTS + 1)],
    )


def page(ask: Ask) -> str:
    found: dict[str, Serving] = {gpu: ask(gpu, ask_managers) for gpu in GPUS}
    one = next(iter(found.values()))
    alike: dict[str, list[str]] = {}
    for gpu, serving in found.items():
        alike.setdefault(batches_table(serving), []).append(gpu)
    tables = "\n".join(f"**{', '.join(gpus)}**\n\n{table}" for table, gpus in alike.items())
    return f"""# Which batches have CUDA graphs

What vLLM's own graph managers answer for Qwen3-8B and its released head under `vllm serve`, with every other setting
at its default: {one.verified} verified rows per request, blocks of {one.block}. Platform class, configuration, model,
speculator and managers are real; only what a device would answer (name, capability, memory) is stated. Not shown:
whether a capture succeeds, and how fast anything is.

`python -m tests.rehearsal.graph_table` wrote this page on a machine without a GPU. A test asks again and compares, with
every supported vLLM.

{serving_table(found)}
Larger batches draft in turns. Scheduling is asynchronous.

## By number of requests

*Full*: one graph replays the forward. *Pieces*: all but attention is replayed, and no hypotheses ride. *None*: compiled
code without a graph. Where hypotheses ride, a graph takes up the outcome as well; where they don't, and behind prompts,
drafts come from a pass of their own.

{tables}"""


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
