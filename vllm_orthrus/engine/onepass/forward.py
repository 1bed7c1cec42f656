"""One pass: draft blocks for the outcomes that verification may have, computed inside that very verification.

The target's forward gets the rows of H hypotheses per request behind its own. In every layer the verification rows go
first and write their keys and values; the hypothesis rows then take the diffusion projections and see the prefix that
their hypothesis stands for, drafts included:

    ar, hy = attention(norm(hidden)[verification]), diffusion(norm(hidden)[hypotheses])     see verification.py
    hidden = mlp(norm(concat(ar, hy)))

Norms, MLPs and the embedding serve both kinds of rows in one product. A hypothesis that comes true is therefore exactly
the block a separate draft pass would have computed, and there is one full-depth forward per engine step.
"""

from collections.abc import Iterator
from typing import Any

import torch

from vllm_orthrus.engine.attention.blocks import BlockAttention
from vllm_orthrus.engine.attention.kernel import KernelAttention
from vllm_orthrus.engine.drafting import read_prompts
from vllm_orthrus.engine.onepass import joined
from vllm_orthrus.engine.onepass.logits import JoinedLogits
from vllm_orthrus.engine.onepass.memory import Memory
from vllm_orthrus.engine.onepass.rows import HypothesisBuffers, HypothesisRows
from vllm_orthrus.engine.onepass.verification import BackendVerification, FusedVerification, OnePassAttention
from vllm_orthrus.engine.settings import DraftShape
from vllm_orthrus.engine.view import DiffusionView
from vllm_orthrus.engine.vllm import CUDAGraphMode, DefaultModelState, InputBatch
from vllm_orthrus.engine.warmup import attend_to_nothing


class OnePass:
    """The target's forward with hypothesis rows, and the decision which forwards have them."""

    def __init__(
        self,
        view: DiffusionView,
        shape: DraftShape,
        memory: Memory,
        buffers: HypothesisBuffers,
        logits: JoinedLogits,
        fused: bool,
    ) -> None:
        self.view, self.shape, self.memory, self.buffers = view, shape, memory, buffers
        self.logits, self.fused = logits, fused
        self.plain_forward = view.target.forward
        self.attention: OnePassAttention | None = None  # known once there is a cache
        # Decided before each forward, from how vLLM says it will run: a replayed graph runs no Python that could tell.
        self.mode: CUDAGraphMode | None = None
        self.capturing = False  # a graph of the whole forward
        self.captured: set[tuple[int, int]] = set()  # requests and tokens of the graphs that hold rows
        self.carried = False  # the forward that ran last had its batch's rows with it
        self._attach()

    def _attach(self) -> None:
        """Give this instance of the target the forward below, and a model state that feeds it."""
        target = self.view.target
        target.forward = lambda *inputs, **named: self.forward(*inputs, **named)
        state = type("OnePassModelState", (OnePassModelState,), {"one_pass": self})
        target.get_model_state_cls = lambda: state

    def bind(self, attention: BlockAttention, tables: list[torch.Tensor], join: bool, paired: frozenset[int]) -> None:
        """There is a cache now; until then, and without this call, the target's forward is as it was.

        join: both views' projections, in all layers; paired: numbers of requests for which they are one product.
        """
        self.buffers.tables = tables
        self.captured.clear()
        if self.fused:
            assert isinstance(attention, KernelAttention)
            self.attention = FusedVerification(attention, self.shape.most_carried, join, paired)
        else:
            self.attention = BackendVerification(attention, join, paired)

    # Before the forward

    def announce(self, mode: CUDAGraphMode, capturing: bool) -> None:
        """How the coming forward will run, or that a graph is about to be captured from it."""
        self.mode, self.capturing = mode, capturing

    def prepare(self, batch: InputBatch) -> HypothesisRows | None:
        """The rows for this batch, if all of it has hypotheses and its forward has room for them."""
        mode, self.mode, self.carried, self.logits.awaited = self.mode, None, False, None
        num_reqs, padded = batch.num_reqs, batch.num_reqs_after_padding
        replayed = mode == CUDAGraphMode.FULL and (padded, batch.num_tokens_after_padding) in self.captured
        # Graphs of a piece of the model are told apart by their number of tokens alone, so they have no room for rows.
        has_room = self.shape.num_hypotheses(padded) > 0 and (replayed or mode == CUDAGraphMode.NONE)
        known = self.memory.ready(batch.idx_mapping_np[:num_reqs]) and not read_prompts(batch).any()
        if self.attention is None or not has_room or not (known or replayed):
            return None
        self.attention.prepare(batch)
        if not known:
            self.buffers.empty_rows_for(padded)  # for a graph that holds places for rows all the same
            return None
        longest = int(batch.seq_lens_cpu_upper_bound.numpy()[:num_reqs].max())
        rows = self.buffers.rows_for(padded, longest)
        self.buffers.fill(rows, self.memory.remembered(), batch, num_reqs)
        self.logits.expect(rows, batch)
        self.carried = True
        return rows

    def dummy(self, num_reqs: int, num_tokens: int) -> HypothesisRows | None:
        """Rows without a hypothesis, to capture a graph with."""
        if self.attention is None or not self.attention.supports_graphs:
            return None
        if num_tokens != num_reqs * self.shape.verified or self.shape.num_hypotheses(num_reqs) == 0:
            return None
        self.attention.clear()
        return self.buffers.empty_rows_for(num_reqs)._replace(captured_for=(num_reqs, num_tokens))

    def warm_up(self, batch: InputBatch) -> Iterator[int]:
        """Launch what rows of hypotheses may; yields each number of requests, for what else depends on it."""
        assert self.attention is not None
        if self.attention.join:
            joined.warm_up(self.view.target.model.layers[0].self_attn, self.view.layers[0])
        for num_reqs in range(1, self.shape.most_carried + 1):
            self.attention.clear()
            rows = self.buffers.empty_rows_for(num_reqs)
            attend_to_nothing(self.attention.blocks, rows.blocks, self.attention.nothing(num_reqs))
            self.buffers.fill(rows, self.memory.remembered(), batch, 0)
            yield num_reqs

    # The forward

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        hypotheses: HypothesisRows | None = None,
    ) -> Any:
        # Inputs for a graph are made before it is said which kind it is.
        for_a_piece = hypotheses is not None and hypotheses.captured_for is not None and not self.capturing
        if hypotheses is None or for_a_piece:
            return self.plain_forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        if hypotheses.captured_for is not None:
            self.captured.add(hypotheses.captured_for)
        with self.view.fused():
            return self.forward_with_rows(input_ids, positions, inputs_embeds, hypotheses)

    def forward_with_rows(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
        hypotheses: HypothesisRows,
    ) -> torch.Tensor:
        assert self.attention is not None
        self.attention.begin(hypotheses.blocks)
        base, split = self.view.target.model, len(positions)
        embedded = base.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = torch.cat([embedded, base.embed_tokens(hypotheses.input_ids)])
        both, residual = (positions, hypotheses.positions), None
        for index, (layer, diffusion) in enumerate(zip(base.layers, self.view.layers, strict=True)):
            if residual is None:
                residual, hidden = hidden, layer.input_layernorm(hidden)
            else:
                hidden, residual = layer.input_layernorm(hidden, residual)
            attended = self.attention(index, layer.self_attn, diffusion, both, hidden)
            hidden, residual = layer.post_attention_layernorm(attended, residual)
            hidden = layer.mlp(hidden)
        hidden, _ = base.norm(hidden, residual)
        hypotheses.hidden.copy_(hidden[split:])
        verification: torch.Tensor = hidden[:split]
        return verification


class OnePassModelState(DefaultModelState):  # type: ignore[misc]
    """vLLM's hook for models with inputs of their own: here, the hypothesis rows."""

    one_pass: OnePass  # set on the subclass that `OnePass` makes

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: Any,
        slot_mappings: Any,
        attn_groups: Any,
        kv_cache_config: Any,
        for_capture: bool = False,
        **named: Any,
    ) -> dict[str, Any]:
        self.one_pass.announce(cudagraph_mode, for_capture)
        built: dict[str, Any] = super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            attn_groups,
            kv_cache_config,
            for_capture=for_capture,
            **named,
        )
        return built

    def prepare_inputs(self, input_batch: InputBatch, req_states: Any) -> dict[str, Any]:
        rows = self.one_pass.prepare(input_batch)
        return {**super().prepare_inputs(input_batch, req_states), "hypotheses": rows}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        rows = self.one_pass.dummy(num_reqs, num_tokens)
        return {**super().prepare_dummy_inputs(num_reqs, num_tokens), "hypotheses": rows}
