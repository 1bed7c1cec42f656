"""CUDA graphs by request count, without a GPU: captured passes are kept as closures and replayed later.

What this checks is what a graph demands of the draft pass: that it reads and writes only buffers that stay where they
are, and that rows no request fills do no harm.
"""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.conftest import StartEngine
from tests.engine.harness import prompts
from vllm_orthrus.graphs import MAX_GRAPH_ROWS, BlockGraphs
from vllm_orthrus.integration.runner import BatchExecutionDescriptor, CUDAGraphMode


class ReplayedClosures(BlockGraphs):
    """Everything of the manager that needs no device."""

    def __init__(self, max_num_reqs: int, block: int) -> None:
        self.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        self.compilation_config = SimpleNamespace(cudagraph_capture_sizes=[1])
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_active_seqs=None))
        self.max_num_reqs, self.decode_query_len = max_num_reqs, block
        self._lora_dispatch_map: dict[int, int] = {}
        self._candidates: dict[Any, Any] = {}
        self._capture_descs: dict[Any, Any] = {}
        self._graphs_captured = False
        self.replayed: list[int] = []
        self._init_candidates()

    def capture(self, create_forward: Any, description: str) -> None:
        self.graphs = {
            descriptor: create_forward(descriptor, False) for descriptor in self._capture_descs[CUDAGraphMode.FULL]
        }
        self._graphs_captured = True

    def run_fullgraph(self, descriptor: BatchExecutionDescriptor) -> None:
        self.replayed.append(descriptor.num_reqs)
        self.graphs[descriptor](CUDAGraphMode.FULL)


@pytest.mark.parametrize("max_num_reqs", [1, 3, 8, 20, 256])
def test_every_batch_has_the_smallest_graph_that_holds_it(max_num_reqs: int) -> None:
    graphs = ReplayedClosures(max_num_reqs, block=32)
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
    graphs = speculator.graphs = ReplayedClosures(8, speculator.block)
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
    graphs = speculator.graphs = ReplayedClosures(8, speculator.block)
    speculator.capture()
    for count in (3, 8):
        run = engine.run(prompts(count), 24)
        assert 0 < run.counts.drafted == run.counts.accepted
    assert set(graphs.replayed) == {4}
    assert said
    assert "8 requests exceeds the largest Orthrus CUDA graph (4 requests)" in said[0]
