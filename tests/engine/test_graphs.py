"""CUDA graphs by request count, replayed as closures."""

from itertools import cycle
from typing import Any

import pytest
import torch

from tests.engine.closures import DraftClosures, ForwardClosures, OutcomeClosures, PiecewiseClosures
from tests.engine.conftest import Checkpoints, StartEngine, one_pass
from tests.engine.harness import Engine, prompts
from vllm_orthrus.engine.graphs import counts_of_requests
from vllm_orthrus.engine.twopass import TwoPasses
from vllm_orthrus.engine.vllm import CUDAGraphMode


@pytest.mark.parametrize("largest", [1, 3, 8, 20, 64])
def test_every_draft_pass_has_the_smallest_graph_that_holds_it(largest: int) -> None:
    graphs = DraftClosures(largest, 32)
    graphs._graphs_captured = True
    captured = sorted(descriptor.num_reqs for descriptor in graphs._capture_descs[CUDAGraphMode.FULL])
    assert captured[-1] == largest
    assert len(set(captured)) == len(captured)
    for num_reqs in range(1, largest + 1):
        graph = graphs.dispatch(num_reqs, num_reqs * 32, 32, num_active_loras=0)
        assert graph.cg_mode == CUDAGraphMode.FULL
        assert graph.num_reqs == min(count for count in captured if count >= num_reqs)
        assert graph.num_tokens == graph.num_reqs * 32


@pytest.mark.parametrize("rows", [1, 4, 8, 15, 16, 32])
def test_where_rows_are_dear_few_pad(rows: int) -> None:
    sizes = [1, 2, 4, *range(8, 129, 8)]
    counts = counts_of_requests(rows, 128, sizes)
    assert counts == sorted({*sizes, *counts})
    for requests in range(1, 129):
        padding = rows * (min(count for count in counts if count >= requests) - requests)
        if 64 < requests * rows <= 256:
            assert padding < max(rows, 16)
        elif 256 < requests * rows <= 512:
            assert padding < max(rows, 32)
        assert padding <= 7 * max(rows, 16)
    assert rows > 1 or counts == sizes, "plain decoding keeps the sizes that it has by itself"


def test_replayed_passes_draft_as_eager_ones(start: StartEngine, oracle_config: dict[str, Any]) -> None:
    if oracle_config["orthrus_attention"] == "write_through":
        pytest.skip("the CPU backend plans its work on the host for each batch, so its metadata cannot be replayed")
    engine = start(oracle_config | {"draft_sample_method": "probabilistic"}, max_num_seqs=8)
    speculator = engine.runner.speculator
    eager = engine.run(prompts(11), 24, temperature=0.9, seed=2)
    graphs = speculator.graphs = DraftClosures(8, speculator.shape.block)
    speculator.capture()
    replayed = engine.run(prompts(11), 24, temperature=0.9, seed=2)
    assert 0 < replayed.counts.drafted == replayed.counts.accepted
    assert replayed.tokens == eager.tokens
    assert {2, 4, 8} & set(graphs.replayed), "no replay had rows to spare"


def test_large_batches_draft_in_turns(start: StartEngine, oracle_config: dict[str, Any]) -> None:
    """Eight requests where a draft pass holds three: all drafts are right, and all come from graphs."""
    if oracle_config["orthrus_attention"] == "write_through":
        pytest.skip("the CPU backend plans its work on the host for each batch, so its metadata cannot be replayed")
    engine = start(oracle_config, max_num_seqs=8)
    speculator = engine.runner.speculator
    assert speculator.draft_pass.at_once == 8
    speculator.draft_pass.at_once = 3
    graphs = speculator.graphs = DraftClosures(3, speculator.shape.block)
    speculator.capture()
    run = engine.run(prompts(8), 24)
    assert 0 < run.counts.drafted == run.counts.accepted
    assert {2, 3} <= set(graphs.replayed) <= {1, 2, 3}


def test_replayed_verifications_carry_what_eager_ones_do(
    start: StartEngine, tiny: Checkpoints, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass with everything replayed: the forward with its hypotheses, and what takes up their outcome."""
    settings = {"num_speculative_tokens": 3, "orthrus_hypotheses": 2, "orthrus_rows": 80, "orthrus_attention": "kernel"}
    engine = start(one_pass(tiny.block_head, **settings), max_num_batched_tokens=512)
    speculator = engine.runner.speculator
    state, given = speculator.drafting.memory, prompts(3, shortest=12)
    drafted: list[tuple[int, ...]] = []
    choose = state.choose

    def remember(new: Any, logits: Any) -> None:
        rows = torch.cat([new.anchor_position[:, None], new.anchor[:, None], new.tokens], dim=1)[new.slot >= 0]
        drafted.extend(tuple(row) for row in rows.tolist())
        choose(new, logits)

    monkeypatch.setattr(state, "choose", remember)

    def run() -> tuple[list[list[int]], list[tuple[int, ...]], list[int]]:
        """What is said, drafted and counted by an engine that has learnt nothing yet."""
        drafted.clear()
        for part in (*state.slots.calibration, state.counters):
            part.zero_()
        return engine.run(given, 16).tokens, sorted(drafted), state.counters.tolist()

    eager = run()
    assert eager[0] == plain.run(given, 16).tokens

    sizes = (4, 8, 16)  # 1, 2 or 4 requests
    forwards = ForwardClosures(engine, 8, sizes)
    forwards.install(monkeypatch)
    outcomes = speculator.outcome_graphs = OutcomeClosures(engine, 8, (*sizes, 32))
    speculator.graphs = DraftClosures(8, speculator.shape.block)
    speculator.capture()
    assert sorted(graph.num_reqs for graph in outcomes.graphs) == [1, 2, 4], "8 requests have room for no hypothesis"
    assert run() == eager
    assert 4 in outcomes.replayed, "no replay had rows to spare"
    assert outcomes.replayed == forwards.replayed

    # A planted fault: rows that are prepared elsewhere than where they were captured.
    buffers = speculator.drafting.buffers
    monkeypatch.setattr(buffers, "input_ids", buffers.input_ids.clone())
    astray = run()
    assert astray[0] == eager[0], "drafts never change the text"
    assert astray[1] != eager[1]


def test_every_mode_has_graphs(
    start: StartEngine, tiny: Checkpoints, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the number of drafts changing: every step is replayed, and is what it would be without graphs."""
    modes = [0, 1, 2, 3]
    settings = {"num_speculative_tokens": 3, "orthrus_hypotheses": 2, "orthrus_rows": 80, "orthrus_attention": "kernel"}
    engine = start(one_pass(tiny.block_head, **settings, orthrus_modes=modes), max_num_batched_tokens=512)
    speculator, given = engine.runner.speculator, prompts(3, shortest=12)
    state, one = speculator.drafting.memory, speculator.drafting.one_pass
    policy = engine.llm.llm_engine.engine_core.engine_core.scheduler.dynamic_sd_lookup.policy
    drafted: list[list[int]] = []
    propose = speculator.propose

    def remember(*arguments: Any, **named: Any) -> Any:
        drafts, wanted = propose(*arguments, **named), named["num_speculative_tokens"]
        drafted.extend(drafts[:, :wanted].tolist())
        return drafts

    def run() -> tuple[list[list[int]], list[list[int]], list[int]]:
        """What is said, drafted and counted by an engine that has learnt nothing yet."""
        drafted.clear()
        for part in (*state.slots.calibration, state.counters):
            part.zero_()
        turns = cycle([3, 3, 1, 3, 0, 2, 3, 3, 2, 0, 1, 1])
        monkeypatch.setattr(policy, "choose", lambda requests, context: next(turns))
        return engine.run(given, 20).tokens, drafted.copy(), state.counters.tolist()

    monkeypatch.setattr(speculator, "propose", remember)
    eager = run()
    assert eager[0] == plain.run(given, 20).tokens
    assert eager[2][0] > 0

    sizes = (1, 2, 4, 8, 16)
    forwards = ForwardClosures(engine, 8, sizes)
    forwards.install(monkeypatch)
    outcomes = speculator.outcome_graphs = OutcomeClosures(engine, 8, sizes)
    drafts = speculator.graphs = DraftClosures(8, *speculator.shape.widths)
    speculator.capture()
    # Sixteen rows are four requests with three drafts, or eight with one: these have no blocks beside them.
    assert one.captured == {(1, 4), (2, 8), (4, 16)}
    assert run() == eager
    assert forwards.rows_replayed == {1, 2, 3, 4}
    assert drafts.rows_replayed == set(speculator.shape.widths) == {1, 2, 8}
    assert outcomes.rows_replayed == {4}
    assert 4 in forwards.replayed, "no replay had rows to spare"


class Pools:
    """What a CPU lacks to make a graph manager, though not to ask it."""

    @staticmethod
    def get_global_graph_pool() -> None:
        return None


def drafts_with_graphs(speculator: Any, mode: CUDAGraphMode) -> list[int]:
    """For how many requests drafts would be captured beside a target with graphs of this mode."""
    speculator.init_cudagraph_manager(mode)
    descriptors = speculator.graphs._capture_descs.get(CUDAGraphMode.FULL, [])
    assert bool(speculator.graphs.needs_capture()) == bool(descriptors)
    return sorted(descriptor.num_reqs for descriptor in descriptors)


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.v1.worker.gpu.cudagraph_utils.current_platform", Pools())


@pytest.mark.usefixtures("pools")
def test_drafts_have_graphs_whatever_the_target_has(start: StartEngine, tiny: Checkpoints) -> None:
    """A target whose attention allows no graph of a whole verification has graphs of pieces; our kernel allows more."""
    engine = start(one_pass(tiny.block_head, orthrus_attention="kernel"), max_num_seqs=4)
    speculator = engine.runner.speculator
    speculator.vllm_config.compilation_config.cudagraph_capture_sizes = [6, 12, 24]
    speculator.vllm_config.compilation_config.max_cudagraph_capture_size = 24
    for mode in (CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.FULL_DECODE_ONLY):
        assert drafts_with_graphs(speculator, mode) == [1, 2, 4], mode
        assert speculator.outcome_graphs.needs_capture()
    assert drafts_with_graphs(speculator, CUDAGraphMode.PIECEWISE) == [1, 2, 4]
    assert isinstance(speculator.drafting, TwoPasses), "only whole verifications carry hypotheses"
    assert drafts_with_graphs(speculator, CUDAGraphMode.NONE) == []


@pytest.mark.usefixtures("pools")
def test_writing_through_has_graphs_as_far_as_its_backend_plans_them(
    start: StartEngine, tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention reserves room for split prefixes up to the size of the target's largest graph, and not beyond."""
    engine = start(one_pass(tiny.block_head, orthrus_attention="write_through", orthrus_passes="two"))
    speculator = engine.runner.speculator
    monkeypatch.setattr(speculator.draft_pass.attention, "supports_graphs", True)
    for largest, captured in ((24, [1, 2, 3]), (64, [1, 2, 4, 8]), (4, [])):
        speculator.vllm_config.compilation_config.cudagraph_capture_sizes = [largest]
        speculator.vllm_config.compilation_config.max_cudagraph_capture_size = largest
        assert drafts_with_graphs(speculator, CUDAGraphMode.FULL_AND_PIECEWISE) == captured
        assert 8 * speculator.draft_pass.at_once <= largest or not captured


def test_replays_that_run_no_python_carry_no_hypotheses(
    start: StartEngine, tiny: Checkpoints, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs of pieces that need no compiler replay the whole forward, as one with hypotheses would, without any."""
    engine = start(one_pass(tiny.block_head, orthrus_attention="kernel"), max_num_batched_tokens=512, max_num_seqs=2)
    speculator, given = engine.runner.speculator, prompts(2, shortest=12)

    class Breakable(PiecewiseClosures):
        use_breakable_cg = True

        def run_pw_graph(self, model: Any, inputs: dict[str, Any]) -> Any:
            self.replayed.append(len(inputs["input_ids"]))
            return speculator.drafting.one_pass.plain_forward(inputs["input_ids"], inputs["positions"])

    pieces = Breakable(2, 6)
    monkeypatch.setattr(engine.runner, "cudagraph_manager", pieces)
    run = engine.run(given, 8)
    assert run.tokens == plain.run(given, 8).tokens
    assert 12 in pieces.replayed, "no batch had the shape of one that could carry hypotheses"
    assert int(speculator.drafting.memory.counters[0]) == 0
    assert speculator.drafting.draft_passes >= run.counts.steps


def test_graphs_of_single_pieces_carry_no_hypotheses(
    start: StartEngine, tiny: Checkpoints, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing breaks, whether or not the step before carried some."""
    engine = start(one_pass(tiny.block_head), max_num_batched_tokens=512)
    speculator, given = engine.runner.speculator, prompts(5, shortest=12)
    with monkeypatch.context() as patch:
        pieces = PiecewiseClosures(8, speculator.shape.verified)
        patch.setattr(engine.runner, "cudagraph_manager", pieces)
        run = engine.run(given, 20)
        assert run.tokens == plain.run(given, 20).tokens
        assert pieces.replayed
        assert int(speculator.drafting.memory.counters[0]) == 0
        assert speculator.drafting.draft_passes >= run.counts.steps

    dispatch, steps = engine.runner.cudagraph_manager.dispatch, [0]

    def in_turns(*arguments: Any, **named: Any) -> Any:
        steps[0] += 1
        return (pieces.dispatch if steps[0] % 3 else dispatch)(*arguments, **named)

    monkeypatch.setattr(engine.runner.cudagraph_manager, "dispatch", in_turns)
    monkeypatch.setattr(engine.runner.cudagraph_manager, "run_pw_graph", pieces.run_pw_graph)
    assert engine.run(given, 20).tokens == run.tokens
    assert int(speculator.drafting.memory.counters[0]) > 0
