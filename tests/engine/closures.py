"""CUDA graphs without a GPU: captured passes are kept as closures, and called again where a graph would be replayed.

What this shows is what a graph demands of a pass: that it reads and writes only buffers that stay where they are, that
it needs none of the Python around it, and that rows no request fills do no harm.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engine.harness import Engine
from vllm_orthrus.engine.graphs import BlockGraphs, OutcomeGraphs, plan_modes
from vllm_orthrus.engine.vllm import (
    BatchExecutionDescriptor,
    CudaGraphManager,
    CUDAGraphMode,
    set_forward_context,
)


class Closures(CudaGraphManager):  # type: ignore[misc]
    """Everything of the manager that needs no device."""

    def __init__(self, max_num_reqs: int, rows_per_request: int, capture_sizes: tuple[int, ...] = (1,)) -> None:
        self.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        self.compilation_config = SimpleNamespace(
            cudagraph_capture_sizes=list(capture_sizes), max_cudagraph_capture_size=max(capture_sizes)
        )
        self.vllm_config = SimpleNamespace(
            speculative_config=None, parallel_config=SimpleNamespace(tensor_parallel_size=1)
        )
        self.max_num_reqs, self.decode_query_len = max_num_reqs, rows_per_request
        self.varlen_decode, self.lora_capture_cases, self.ubatch_runner = False, [0], None
        self._lora_dispatch_map: dict[int, int] = {}
        self._candidates: dict[Any, Any] = {}
        self._capture_descs: dict[Any, Any] = {}
        self._graphs_captured = False
        self.replayed: list[int] = []
        self.rows_replayed: set[int | None] = set()  # of each request
        self._init_candidates()

    def capture(self, create_forward: Any, description: str) -> None:
        self.graphs = {
            descriptor: create_forward(descriptor, False) for descriptor in self._capture_descs[CUDAGraphMode.FULL]
        }
        self._graphs_captured = True

    def run_fullgraph(self, descriptor: BatchExecutionDescriptor) -> None:
        self.replayed.append(descriptor.num_reqs)
        self.rows_replayed.add(descriptor.uniform_token_count)
        self.graphs[descriptor](CUDAGraphMode.FULL)


class DraftClosures(Closures, BlockGraphs):
    """Draft passes."""

    def __init__(self, largest: int, *widths: int) -> None:
        self.widths, self.largest = widths, largest
        super().__init__(largest, max(widths))


class OutcomeClosures(Closures, OutcomeGraphs):
    """What takes up an outcome."""

    def __init__(self, engine: Engine, max_num_reqs: int, capture_sizes: tuple[int, ...]) -> None:
        self.shape = engine.runner.speculator.shape
        super().__init__(max_num_reqs, self.shape.verified, capture_sizes)


class PiecewiseClosures(Closures):
    """The target in graphs of single pieces, which are told apart by their number of tokens alone."""

    use_breakable_cg = False

    def dispatch(self, num_reqs: int, num_tokens: int, *rest: Any, **named: Any) -> BatchExecutionDescriptor:
        return BatchExecutionDescriptor(CUDAGraphMode.PIECEWISE, num_tokens, num_reqs=None)

    def run_pw_graph(self, model: Any, inputs: dict[str, Any]) -> Any:
        self.replayed.append(len(inputs["input_ids"]))
        return model(**inputs)


class ForwardClosures(Closures):
    """The target's forward: with hypotheses, if it verifies as many drafts as there are, and without.

    Of its own step a replay takes the attention metadata alone: on a GPU these lie in buffers, too, but the CPU backend
    plans its work on the host.
    """

    def __init__(self, engine: Engine, max_num_reqs: int, capture_sizes: tuple[int, ...]) -> None:
        self.runner = engine.runner
        self.one = self.runner.speculator.drafting.one_pass
        super().__init__(max_num_reqs, self.one.shape.verified, capture_sizes)
        plan_modes(self, self.one.shape.modes)
        self.use_breakable_cg = False
        self.hidden = torch.zeros(max(capture_sizes), self.one.buffers.hidden.shape[1])

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runner, state = self.runner, self.runner.model_state
        prepare_attn = state.prepare_attn

        def remember(batch: Any, mode: Any, tables: Any, slots: Any, *rest: Any, **named: Any) -> Any:
            self.slots = slots
            self.metadata = prepare_attn(batch, mode, tables, slots, *rest, **named)
            return self.metadata

        def prepare(descriptor: BatchExecutionDescriptor, warmup: bool) -> Any:
            tokens = descriptor.num_tokens
            rows = state.prepare_dummy_inputs(descriptor.num_reqs, tokens)["hypotheses"]
            assert (rows is None) == (descriptor.uniform_token_count < self.one.shape.verified)
            ids, positions = runner.input_buffers.input_ids[:tokens], runner.input_buffers.positions[:tokens]
            if rows is not None:
                self.one.captured.add(
                    rows.captured_for
                )  # as a forward does that is captured; a CPU cannot run one here

            def replay(mode: CUDAGraphMode) -> None:
                slots = dict.fromkeys(self.metadata, self.slots[0, :tokens])
                with set_forward_context(self.metadata, runner.vllm_config, tokens, slot_mapping=slots):
                    # Past `OnePass.forward`, of which a replay runs nothing.
                    if rows is None:
                        self.hidden[:tokens] = self.one.plain_forward(ids, positions)
                    else:
                        self.hidden[:tokens] = self.one.forward_with_rows(ids, positions, None, rows)

            return replay

        monkeypatch.setattr(state, "prepare_attn", remember)
        self.capture(prepare, "")
        monkeypatch.setattr(runner, "cudagraph_manager", self)

    def run_fullgraph(self, descriptor: BatchExecutionDescriptor) -> torch.Tensor:
        super().run_fullgraph(descriptor)
        return self.hidden[: descriptor.num_tokens]
