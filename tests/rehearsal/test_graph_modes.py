"""Which graphs there are, by what the target's attention backend supports and what was asked for."""

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from tests.rehearsal.machines import Ask
from tests.rehearsal.qwen3 import configure, load, resolve, verification_graphs
from vllm_orthrus.engine.costs import who_rides


class Handed(NamedTuple):
    mode: str  # that vLLM hands to its own manager and to the speculator
    fewer: int  # graphs of verifications of fewer drafts than the most
    drafts: int  # graphs of draft passes
    outcomes: int  # graphs that take up an outcome
    drafting: str


def handed(support: str, asked: str | None) -> Handed:
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport

    options = {} if asked is None else {"compilation_config": {"cudagraph_mode": CUDAGraphMode[asked]}}
    backend = SimpleNamespace(min_cg_support=AttentionCGSupport[support], min_cg_attn_backend="a backend")
    mode = resolve(configure(**options), backend, None)
    speculator = load().speculator
    kept = speculator.graphs, speculator.outcome_graphs, speculator.drafting
    try:
        speculator.outcome_graphs = None
        speculator.init_cudagraph_manager(mode)
        drafts, outcomes = (
            sum(map(len, manager._capture_descs.values())) if manager is not None else 0
            for manager in (speculator.graphs, speculator.outcome_graphs)
        )
        drafting = type(speculator.drafting).__name__
    finally:
        speculator.graphs, speculator.outcome_graphs, speculator.drafting = kept
    planned = verification_graphs(speculator.vllm_config, mode)
    fewer = sum(graph.uniform_token_count not in (None, speculator.shape.verified) for graph in planned)
    return Handed(mode.name, fewer, drafts, outcomes, drafting)


@pytest.mark.parametrize(
    ("support", "asked", "mode"),
    [
        ("ALWAYS", None, "FULL_AND_PIECEWISE"),
        ("UNIFORM_BATCH", None, "FULL_AND_PIECEWISE"),
        ("UNIFORM_SINGLE_TOKEN_DECODE", None, "PIECEWISE"),
        ("NEVER", None, "PIECEWISE"),
        ("ALWAYS", "FULL", "FULL"),
        ("UNIFORM_BATCH", "FULL", "FULL_AND_PIECEWISE"),
        ("ALWAYS", "FULL_DECODE_ONLY", "FULL_DECODE_ONLY"),
        ("UNIFORM_SINGLE_TOKEN_DECODE", "FULL_DECODE_ONLY", "PIECEWISE"),
        ("ALWAYS", "PIECEWISE", "PIECEWISE"),
        ("ALWAYS", "NONE", "NONE"),
    ],
)
def test_mode_that_is_handed_to_the_speculator(support: str, asked: str | None, mode: str, ask: Ask) -> None:
    found = ask("H200", handed, support, asked)
    assert found.mode == mode
    assert found.drafting == ("TwoPasses" if mode == "PIECEWISE" else "OnePassDrafting"), "pieces have no room"
    if mode.startswith("FULL"):
        assert (found.drafts, found.outcomes) == (134, 4), "docs/graphs.md has them by width"
        assert found.fewer == (0 if mode == "FULL" else 51 + 25 + 24 + 25), "in one that serves any batch they are"
    else:
        assert found.outcomes == 0, "no verification has a graph that could carry hypotheses"
        assert found.drafts == (0 if mode == "NONE" else 134), "our passes are captured by themselves"
        assert found.fewer == 0


class Carrying(NamedTuple):
    planned: set[tuple[int, int]]  # requests and rows of each, of graphs of whole verifications
    carrying: set[tuple[int, int]]  # those that are captured with places for hypotheses
    largest: dict[int, int]  # by rows of each, the most requests


def carrying(most_requests: int | None) -> Carrying:
    loaded = load()
    one = loaded.speculator.drafting.one_pass
    config = loaded.config if most_requests is None else configure(max_num_seqs=most_requests)
    planned = {(graph.num_reqs, graph.num_tokens) for graph in verification_graphs(config, loaded.mode)}
    found = {(requests, tokens // requests) for requests, tokens in planned if one.dummy(requests, tokens) is not None}
    rows = [(requests, tokens // requests) for requests, tokens in planned]
    return Carrying(set(rows), found, {each: requests for requests, each in sorted(rows)})


@pytest.mark.parametrize("gpu", ["H200", "RTX 4090"])
def test_only_verifications_of_the_most_drafts_carry_hypotheses(gpu: str, ask: Ask) -> None:
    found = ask(gpu, carrying, None)
    assert found.carrying == {(requests, 16) for requests in range(1, 5)}
    # As many rows as these have, in graphs of another number of requests.
    assert {(2, 8), (8, 4), (4, 8), (16, 4), (32, 1), (64, 1)} <= found.planned - found.carrying
    assert found.largest == {1: 512 if gpu == "H200" else 256, 4: 128, 8: 64, 15: 34, 16: 32}


@pytest.mark.parametrize("most_requests", [1, 3])
def test_every_mode_has_graphs_for_few_requests_as_well(most_requests: int, ask: Ask) -> None:
    """vLLM's own table would have room for as many modes as requests."""
    found = ask("RTX 4090", carrying, most_requests)
    assert found.largest == dict.fromkeys((1, 4, 8, 15, 16), most_requests)


def registered(layers: int, ranks: int) -> int:
    """Entries of vLLM's own all-reduce when all is captured, those of its trial captures among them."""
    loaded = load()
    speculator, config = loaded.speculator, loaded.speculator.vllm_config
    kept = speculator.graphs, speculator.outcome_graphs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config.parallel_config, "tensor_parallel_size", ranks)
        patch.setattr(config.model_config.hf_text_config, "num_hidden_layers", layers)
        try:
            speculator.init_cudagraph_manager(loaded.mode)
            drafts = sum(map(len, speculator.graphs._capture_descs.values()))
            outcomes = sum(map(len, speculator.outcome_graphs._capture_descs.values()))
        finally:
            speculator.graphs, speculator.outcome_graphs = kept
        whole = len(verification_graphs(config, loaded.mode))
    pieces = sum(graph.cg_mode.name == "PIECEWISE" for graph in loaded.target_graphs.graphs)
    tried_whole = 2
    return (2 * layers + 1) * (whole + tried_whole + 2 * (pieces + drafts)) + 2 * outcomes


@pytest.mark.parametrize(("layers", "ranks"), [(36, 2), (64, 2), (80, 4)])
def test_room_of_vllms_all_reduce(layers: int, ranks: int, ask: Ask) -> None:
    """Beyond it an engine does not start: "Rank data buffer is overflowed"."""
    found, alone = ask("H200", registered, layers, ranks), ask("H200", registered, layers, 1)
    assert found <= 65536
    if alone <= 65536:
        assert found == alone, "graphs that there is room for are all captured"


def riding(**options: Any) -> list[bool]:
    return list(map(who_rides(configure(**options)), (1, 4, 5)))


def test_nothing_rides_with_graphs_of_pieces(ask: Ask) -> None:
    """And the policy knows: it would take drafts of a pass of their own for cheap."""
    assert ask("H200", riding) == [True, True, False]
    assert ask("H200", partial(riding, compilation_config={"cudagraph_mode": "PIECEWISE"})) == [False] * 3
    assert ask("H200", partial(riding, enforce_eager=True)) == [True, True, False]
