"""CUDA graphs by request count, replayed as closures."""

from typing import Any

import pytest
import torch

from tests.engine.closures import DraftClosures, ForwardClosures, OutcomeClosures, PiecewiseClosures
from tests.engine.conftest import Checkpoints, StartEngine, one_pass
from tests.engine.harness import Engine, prompts
from vllm_orthrus.graphs import MAX_GRAPH_ROWS
from vllm_orthrus.integration.runner import CUDAGraphMode


@pytest.mark.parametrize("max_num_reqs", [1, 3, 8, 20, 256])
def test_every_batch_has_the_smallest_graph_that_holds_it(max_num_reqs: int) -> None:
    graphs = DraftClosures(max_num_reqs, 32)
    graphs._graphs_captured = True
    captured = sorted(descriptor.num_reqs for descriptor in graphs._capture_descs[CUDAGraphMode.FULL])
    assert captured[-1] == min(max_num_reqs, MAX_GRAPH_ROWS // 32)
    assert len(set(captured)) == len(captured)
    for num_reqs in range(1, max_num_reqs + 1):
        if num_reqs > captured[-1]:
            assert graphs.dispatch(num_reqs, num_reqs * 32, 32, num_active_loras=0).cg_mode == CUDAGraphMode.NONE
            continue
        graph = graphs.dispatch(num_reqs, num_reqs * 32, 32, num_active_loras=0)
        assert graph.cg_mode == CUDAGraphMode.FULL
        assert graph.num_reqs == min(count for count in captured if count >= num_reqs)
        assert graph.num_tokens == graph.num_reqs * 32


def test_replayed_passes_draft_as_eager_ones(start: StartEngine, oracle_config: dict[str, Any]) -> None:
    if oracle_config["orthrus_attention"] == "write_through":
        pytest.skip("the CPU backend plans its work on the host for each batch, so its metadata cannot be replayed")
    engine = start(oracle_config | {"draft_sample_method": "probabilistic"}, max_num_seqs=8)
    speculator = engine.runner.speculator
    eager = engine.run(prompts(11), 24, temperature=0.9, seed=2)
    graphs = speculator.graphs = DraftClosures(8, speculator.block)
    speculator.capture()
    replayed = engine.run(prompts(11), 24, temperature=0.9, seed=2)
    assert 0 < replayed.counts.drafted == replayed.counts.accepted
    assert replayed.tokens == eager.tokens
    assert {2, 4, 8} & set(graphs.replayed), "no replay had rows to spare"


def test_batches_beyond_the_graphs_are_announced(
    start: StartEngine, oracle_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if oracle_config["orthrus_attention"] != "gather":
        pytest.skip("the same for every way to read the cache")
    engine = start(oracle_config, max_num_seqs=8)
    speculator, said = engine.runner.speculator, []
    monkeypatch.setattr("vllm_orthrus.speculator.logger.warning_once", lambda text, *values: said.append(text % values))
    monkeypatch.setattr("vllm_orthrus.graphs.MAX_GRAPH_ROWS", 4)
    graphs = speculator.graphs = DraftClosures(8, speculator.block)
    speculator.capture()
    for count in (3, 8):
        run = engine.run(prompts(count), 24)
        assert 0 < run.counts.drafted == run.counts.accepted
    assert set(graphs.replayed) == {4}
    assert said
    assert "8 requests exceeds the largest Orthrus CUDA graph (4 requests)" in said[0]


def test_replayed_verifications_carry_what_eager_ones_do(
    start: StartEngine, tiny: Checkpoints, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass with everything replayed: the forward with its hypotheses, and what takes up their outcome."""
    settings = {"num_speculative_tokens": 3, "orthrus_hypotheses": 2, "orthrus_rows": 80, "orthrus_attention": "kernel"}
    engine = start(one_pass(tiny.block_head, **settings), max_num_batched_tokens=512)
    speculator = engine.runner.speculator
    state, given = speculator.one_pass.state, prompts(3, shortest=12)
    drafted: list[tuple[int, ...]] = []
    choose = state.choose

    def remember(slot: Any, position: Any, anchor: Any, logits: Any, drafts: Any, temperature: Any) -> None:
        rows = torch.cat([position[:, None], anchor[:, None], drafts], dim=1)[slot >= 0]
        drafted.extend(tuple(row) for row in rows.tolist())
        choose(slot, position, anchor, logits, drafts, temperature)

    monkeypatch.setattr(state, "choose", remember)

    def run() -> tuple[list[list[int]], list[tuple[int, ...]], list[int]]:
        """What is said, drafted and counted by an engine that has learnt nothing yet."""
        drafted.clear()
        for part in (*state.calibration, state.counters):
            part.zero_()
        return engine.run(given, 16).tokens, sorted(drafted), state.counters.tolist()

    eager = run()
    assert eager[0] == plain.run(given, 16).tokens

    sizes = (4, 8, 16)  # 1, 2 or 4 requests
    forwards = ForwardClosures(engine, 8, sizes)
    forwards.install(monkeypatch)
    outcomes = speculator.outcome_graphs = OutcomeClosures(engine, 8, (*sizes, 32))
    speculator.graphs = DraftClosures(8, speculator.block)
    speculator.capture()
    assert sorted(graph.num_reqs for graph in outcomes.graphs) == [1, 2, 4], "8 requests have room for no hypothesis"
    assert run() == eager
    assert 4 in outcomes.replayed, "no replay had rows to spare"
    assert outcomes.replayed == forwards.replayed

    # A planted fault: rows that are prepared elsewhere than where they were captured.
    monkeypatch.setattr(speculator.one_pass, "input_ids", speculator.one_pass.input_ids.clone())
    astray = run()
    assert astray[0] == eager[0], "drafts never change the text"
    assert astray[1] != eager[1]


def test_graphs_of_single_pieces_carry_no_hypotheses(
    start: StartEngine, tiny: Checkpoints, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing breaks, whether or not the step before carried some."""
    engine = start(one_pass(tiny.block_head), max_num_batched_tokens=512)
    speculator, given = engine.runner.speculator, prompts(5, shortest=12)
    with monkeypatch.context() as patch:
        pieces = PiecewiseClosures(8, speculator.one_pass.verified)
        patch.setattr(engine.runner, "cudagraph_manager", pieces)
        run = engine.run(given, 20)
        assert run.tokens == plain.run(given, 20).tokens
        assert pieces.replayed
        assert int(speculator.one_pass.state.counters[0]) == 0
        assert speculator.draft_passes >= run.counts.steps

    dispatch, steps = engine.runner.cudagraph_manager.dispatch, [0]

    def in_turns(*arguments: Any, **named: Any) -> Any:
        steps[0] += 1
        return (pieces.dispatch if steps[0] % 3 else dispatch)(*arguments, **named)

    monkeypatch.setattr(engine.runner.cudagraph_manager, "dispatch", in_turns)
    monkeypatch.setattr(engine.runner.cudagraph_manager, "run_pw_graph", pieces.run_pw_graph)
    assert engine.run(given, 20).tokens == run.tokens
    assert int(speculator.one_pass.state.counters[0]) > 0
