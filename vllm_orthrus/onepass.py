"""One pass: draft blocks for the outcomes that verification may have, computed inside that very verification.

The target's forward gets the rows of H hypotheses per request behind its own. In every layer the verification rows go
first and write their keys and values; the hypothesis rows then take the diffusion projections and see the prefix that
their hypothesis stands for, drafts included:

    ar, hy = attention(norm(hidden)[verification]), diffusion(norm(hidden)[hypotheses])     see verification.py
    hidden = mlp(norm(concat(ar, hy)))

Norms, MLPs and the embedding serve both kinds of rows in one product. A hypothesis that comes true is therefore exactly
the block a separate draft pass would have computed, and there is one full-depth forward per engine step.
"""

from typing import Any, NamedTuple

import torch

from vllm_orthrus.attention import BlockAttention, Blocks
from vllm_orthrus.hypothesis_state import HypothesisState
from vllm_orthrus.integration.runner import (
    CUDAGraphMode,
    DefaultModelState,
    InputBatch,
    VllmConfig,
    get_forward_context,
)
from vllm_orthrus.kernel_attention import KernelAttention
from vllm_orthrus.kernels.prepare_hypotheses import HypothesisBlocks, Verified, prepare_hypotheses
from vllm_orthrus.verification import BackendVerification, FusedVerification, OnePassAttention
from vllm_orthrus.view import DiffusionView


class HypothesisRows(NamedTuple):
    """Rows that ride along with a verification. Views of buffers that stay where they are."""

    input_ids: torch.Tensor  # [num_reqs * H * block]
    positions: torch.Tensor  # [num_reqs * H * block]
    blocks: Blocks
    hidden: torch.Tensor  # [num_reqs * H * block, hidden], filled by the forward


class OnePass:
    """The target's forward with hypothesis rows, and the buffers that those rows live in."""

    def __init__(self, view: DiffusionView, vllm_config: VllmConfig, max_num_reqs: int, device: torch.device) -> None:
        config = vllm_config.speculative_config
        self.view = view
        self.fused, self.max_num_reqs = config.orthrus_verification == "fused", max_num_reqs
        self.block, self.verified = config.orthrus_block_size, config.num_speculative_tokens + 1
        self.most_hypotheses = config.orthrus_hypotheses
        self.most_rows = min(config.orthrus_rows, vllm_config.scheduler_config.max_num_batched_tokens)
        self.mask_token_id, self.max_model_len = config.orthrus_mask_token_id, vllm_config.model_config.max_model_len
        self.state = HypothesisState(vllm_config, max_num_reqs, device)
        self.plain_forward = view.target.forward
        self.attention: OnePassAttention | None = None  # known once there is a cache
        self.tables: list[torch.Tensor] = []

        most = self.block * max(count * self.num_hypotheses(count) for count in range(1, max_num_reqs + 1))
        hidden_size = vllm_config.model_config.get_hidden_size()
        self.input_ids = torch.zeros(most, dtype=torch.int64, device=device)
        self.positions = torch.zeros(most, dtype=torch.int64, device=device)
        self.prefix_lengths = torch.full((most // self.block,), -1, dtype=torch.int32, device=device)
        dtype = vllm_config.model_config.dtype
        self.hidden = torch.zeros(most, hidden_size, dtype=dtype, device=device)
        # Blocks from a pass of their own, for requests that have no verification yet.
        self.drafted = torch.zeros(max_num_reqs, self.block, hidden_size, dtype=dtype, device=device)
        # About the forward that ran last. A replayed graph runs no Python and leaves the second and third alone.
        self.prepared = False
        self.ran_in_python = False
        self.ran_with_rows = False
        self._attach()

    def _attach(self) -> None:
        """Give this instance of the target the forward below, and a model state that feeds it."""
        target = self.view.target
        target.forward = lambda *inputs, **named: self.forward(*inputs, **named)
        state = type("OnePassModelState", (OnePassModelState,), {"one_pass": self})
        target.get_model_state_cls = lambda: state

    def bind(self, attention: BlockAttention, tables: list[torch.Tensor]) -> None:
        """There is a cache now; until then, and without this call, the target's forward is as it was."""
        self.tables = tables
        if self.fused:
            assert isinstance(attention, KernelAttention)
            self.attention = FusedVerification(attention, self.max_num_reqs)
        else:
            self.attention = BackendVerification(attention)

    def num_hypotheses(self, num_reqs: int) -> int:
        """How many blocks per request ride along with the verification of this many requests."""
        left = self.most_rows // num_reqs - self.verified
        return int(min(max(0, left // self.block), self.most_hypotheses))

    def prepare(self, batch: InputBatch) -> HypothesisRows | None:
        """The rows for this batch, if it only decodes."""
        self.prepared = self.ran_in_python = self.ran_with_rows = False
        num_reqs, padded = batch.num_reqs, batch.num_reqs_after_padding
        count = self.num_hypotheses(padded)
        if self.attention is None or count == 0:
            return None
        self.attention.prepare(batch)
        longest = int(batch.seq_lens_cpu_upper_bound[:num_reqs].max())
        views = self.views(padded, longest)
        computed, prompt = batch.num_computed_tokens_np[:num_reqs], batch.prefill_len_np[:num_reqs]
        if not (computed >= prompt).all():
            views.blocks.prefix_lengths.fill_(-1)  # for a graph that holds places for rows all the same
            return None
        prepare_hypotheses(
            num_reqs,
            self.state.remembered(),
            Verified(batch.idx_mapping, batch.query_start_loc, batch.positions),
            HypothesisBlocks(
                views.input_ids.view(padded, count, self.block),
                views.positions.view(padded, count, self.block),
                views.blocks.prefix_lengths,
            ),
            self.mask_token_id,
            self.max_model_len,
        )
        self.prepared = True
        return views

    def dummy(self, num_reqs: int, num_tokens: int) -> HypothesisRows | None:
        """Rows without a hypothesis, to capture a graph with."""
        if self.attention is None or not self._in_graph(num_reqs, num_tokens):
            return None
        self.attention.clear()
        views = self.views(num_reqs)
        views.blocks.prefix_lengths.fill_(-1)
        return views

    def _in_graph(self, num_reqs: int, num_tokens: int) -> bool:
        """Whether a graph of this shape was captured with rows."""
        uniform = num_tokens == num_reqs * self.verified
        return (
            uniform
            and self.num_hypotheses(num_reqs) > 0
            and self.attention is not None
            and self.attention.supports_graphs
        )

    def views(self, num_reqs: int, longest: int = 0) -> HypothesisRows:
        """The rows of this many requests, whatever stands in them."""
        count = self.num_hypotheses(num_reqs)
        blocks = num_reqs * count
        rows = blocks * self.block
        return HypothesisRows(
            self.input_ids[:rows],
            self.positions[:rows],
            Blocks(
                self.positions[:rows].view(num_reqs, -1),
                self.prefix_lengths[:blocks].view(num_reqs, count),
                [table[:num_reqs] for table in self.tables],
                longest,
            ),
            self.hidden[:rows],
        )

    def carried(self, batch: InputBatch) -> bool:
        """Whether the rows that were prepared for this batch took part in its forward."""
        in_graph = self._in_graph(batch.num_reqs_after_padding, batch.num_tokens_after_padding)
        return self.prepared and (self.ran_with_rows if self.ran_in_python else in_graph)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        hypotheses: HypothesisRows | None = None,
    ) -> Any:
        context = get_forward_context()
        self.ran_in_python = True
        # Graphs of a piece of the model are told apart by their number of tokens alone, so they have no place for rows.
        # A run without a cache only measures memory, and rows fit into the batch's own limit.
        self.ran_with_rows = (
            hypotheses is not None
            and context.cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE
            and context.attn_metadata is not None
        )
        if not self.ran_with_rows:
            return self.plain_forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        assert hypotheses is not None
        with self.view.fused():
            return self._forward_with_rows(input_ids, positions, inputs_embeds, hypotheses)

    def _forward_with_rows(
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

    def prepare_inputs(self, input_batch: InputBatch, req_states: Any) -> dict[str, Any]:
        rows = self.one_pass.prepare(input_batch)
        return {**super().prepare_inputs(input_batch, req_states), "hypotheses": rows}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        rows = self.one_pass.dummy(num_reqs, num_tokens)
        return {**super().prepare_dummy_inputs(num_reqs, num_tokens), "hypotheses": rows}
