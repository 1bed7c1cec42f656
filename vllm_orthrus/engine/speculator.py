"""The Orthrus loop on Model Runner V2.

vLLM runs the verification: the autoregressive view over `[anchor, d1..dK]`, then its rejection sampler, which yields
the accepted drafts and one bonus token. The bonus is the next anchor. This file does the other half:

    block  = [anchor, MASK, ..., MASK]           at positions p, p+1, ...
    hidden = diffusion view of the block         over the target's cache before p          draft_pass.py
    d1..dK = sampled from the first K rows       row i predicts position p+i+1             sampler.py

In one pass (`onepass/`) the blocks come with the verification's own forward, and a draft pass is run only behind
prompts and for batches that are too large.

Everything runs on the device: the host knows neither how many drafts were accepted nor where a block starts.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.logger import init_logger

from vllm_orthrus.engine.attention.blocks import CachedLayer
from vllm_orthrus.engine.attention.choice import choose_attention, workspace_for
from vllm_orthrus.engine.attention.write_through import WriteThroughAttention
from vllm_orthrus.engine.cascades import Cascades
from vllm_orthrus.engine.draft_pass import DraftPass
from vllm_orthrus.engine.draft_rows import DraftRows
from vllm_orthrus.engine.drafting import Drafting, HostInts, Sampled, Turn, read_prompts
from vllm_orthrus.engine.graphs import BlockGraphs, OutcomeGraphs
from vllm_orthrus.engine.load import load_view
from vllm_orthrus.engine.onepass.drafting import OnePassDrafting
from vllm_orthrus.engine.rotation import rotate_nothing
from vllm_orthrus.engine.sampler import DraftSampler
from vllm_orthrus.engine.settings import DraftShape
from vllm_orthrus.engine.skew import refuse_others
from vllm_orthrus.engine.twopass import TwoPasses
from vllm_orthrus.engine.view import DiffusionView
from vllm_orthrus.engine.vllm import (
    BlockTables,
    CUDAGraphMode,
    DraftModelSpeculator,
    InputBatch,
    KVCacheConfig,
    VllmConfig,
    async_tensor_h2d,
)
from vllm_orthrus.engine.warmup import attend_to_nothing
from vllm_orthrus.kernels.forms import runs_triton

logger = init_logger("vllm.orthrus")


class OrthrusSpeculator(DraftModelSpeculator):  # type: ignore[misc]
    model: DiffusionView
    draft_pass: DraftPass
    drafting: Drafting

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        refuse_others(vllm_config.speculative_config.orthrus_versions)
        super().__init__(vllm_config, device)
        self.shape = DraftShape.of(vllm_config)
        self.num_query_per_req = self.shape.block  # bounds vLLM's profile run
        self.rows = DraftRows(self.shape, vllm_config.model_config, device)
        self.sampler = DraftSampler(self, self.shape, self.rows)
        self.cascades = Cascades(self.speculative_config, self.shape.max_num_reqs, device)
        self.workspace: torch.Tensor | None = None
        self.warm = False  # every form of our kernels that a step may launch has been launched
        # vLLM measures graph memory with a throw-away cache first, and then clears attributes of this type here.
        self.graphs: BlockGraphs | None = None
        self.outcome_graphs: OutcomeGraphs | None = None

    def draft_logits_spec(self, vllm_config: VllmConfig) -> tuple[torch.dtype, float]:
        """What is kept of the distributions that drafts are drawn from: a selector's are over its candidates only."""
        dtype, fill = super().draft_logits_spec(vllm_config)
        return dtype, float("-inf") if vllm_config.speculative_config.has_selector else fill

    # Setting up, in the order in which vLLM calls

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        config = self.speculative_config
        view = load_view(self.vllm_config, target_model, self.device)
        if view.selector is not None:
            self.sampler.select_by(view.selector)
        if config.orthrus_passes == "one":
            self.drafting = OnePassDrafting(view, self.shape, self.rows, self.sampler, self.vllm_config, self.device)
        else:
            self.drafting = self._two_passes(view)
        self.draft_pass = DraftPass(view, self.shape, self.rows, self.vllm_config, self._keep)
        self.workspace = workspace_for(config, self.shape, view.target_attention()[0], self.device)
        view.keep(self.drafting.lasting())
        if self.sampler.written is not None:
            view.keep([("sampler.written", self.sampler.written)])
        return view

    def _two_passes(self, view: DiffusionView) -> Drafting:
        return TwoPasses(view, self.shape, self.sampler, self.use_local_argmax_reduction)

    def _keep(self, num_reqs: int, hidden: torch.Tensor) -> None:
        self.drafting.keep(num_reqs, hidden)

    def set_attn(
        self,
        model_state: Any,
        kv_cache_config: KVCacheConfig,
        block_tables: BlockTables,
        target_input_buffers: Any,
        target_attn_groups: Any,
    ) -> None:
        # Nothing here may hold on to a cache: it is bound later, and on GPUs twice.
        self.block_tables = block_tables
        group_of = {
            name: group for group, spec in enumerate(kv_cache_config.kv_cache_groups) for name in spec.layer_names
        }
        layers = [
            CachedLayer(attn, group_of[attn.layer_name], block_tables.block_sizes[group_of[attn.layer_name]])
            for attn in self.model.target_attention()
        ]

        def write_through() -> WriteThroughAttention:
            room, block = self.rows.capacity, self.shape.block
            return WriteThroughAttention(layers, self.vllm_config, kv_cache_config, room, block, self.device)

        attention = choose_attention(self.speculative_config, layers, self.workspace, write_through, self.device)
        self.attn_groups = list(attention.groups)
        self.draft_pass.bind(attention, block_tables)
        if isinstance(self.drafting, OnePassDrafting):
            if isinstance(attention, WriteThroughAttention):
                logger.info("Orthrus drafts in a pass of its own: slots behind a request have room for one block only.")
                self.drafting = self._two_passes(self.model)
            else:
                self.drafting.bind(attention, layers, block_tables)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        if isinstance(self.drafting, OnePassDrafting) and cudagraph_mode == CUDAGraphMode.PIECEWISE:
            logger.info("Orthrus drafts in a pass of its own: graphs of a model's pieces have no room for hypotheses.")
            self.drafting = self._two_passes(self.model)
        self.graphs = self.draft_pass.make_graphs(cudagraph_mode, self.device)
        if isinstance(self.drafting, OnePassDrafting):
            drafts_have_graphs = bool(self.graphs.cudagraph_mode)
            self.outcome_graphs = self.drafting.make_graphs(cudagraph_mode, drafts_have_graphs, self.device)

    def capture(self) -> None:
        assert self.graphs is not None
        self.draft_pass.capture(self.graphs)
        if isinstance(self.drafting, OnePassDrafting) and self.outcome_graphs is not None:
            self.drafting.capture(self.outcome_graphs)

    # One step

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: Any,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,  # [max_num_reqs], by slot
        seeds: torch.Tensor,  # [max_num_reqs], by slot
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        num_reqs = input_batch.num_reqs
        slots, reading = input_batch.idx_mapping_np[:num_reqs], read_prompts(input_batch)
        drafts: torch.Tensor = self.draft_tokens[:num_reqs]  # [num_reqs, K]
        wanted = self.shape.drafts if num_speculative_tokens is None else num_speculative_tokens
        if wanted == 0:
            self.drafting.forget(slots, reading)
            return drafts
        self.temperature.copy_(temperature)
        self.seeds.copy_(seeds)
        if dummy_run:
            self._propose_nothing(num_reqs, None if is_profile else self.graphs)
            return drafts

        sampled = Sampled(num_sampled, num_rejected, last_sampled, next_prefill_tokens)
        if not self.warm and not self.drafting.carried and runs_triton(self.device):
            self._warm_up(input_batch, sampled)
        if self.drafting.take_up(input_batch, sampled, self.outcome_graphs):
            drafts.copy_(self.sampler.drafts[:num_reqs])
            if wanted < self.shape.drafts:  # vLLM takes the first, whose verification carries no blocks
                self.drafting.forget(slots, reading)
            return drafts

        self.drafting.forget(slots, reading)
        drafts.fill_(-1)  # "no draft", for requests that are still reading their prompt
        drafting = _past_prompt(input_batch)
        for first in range(0, len(drafting), self.draft_pass.at_once):
            turn = drafting[first : first + self.draft_pass.at_once]
            rows = async_tensor_h2d(turn, self.device)  # [n], rows of the batch
            self.rows.prepare(rows, input_batch, sampled)
            longest = int(input_batch.seq_lens_cpu_upper_bound.numpy()[turn].max())
            self.draft_pass.run(len(turn), longest, self.graphs, wanted)
            self.drafting.finish(len(turn), Turn(slots[turn], len(drafting), wanted))
            drafts[rows] = self.sampler.drafts[: len(turn)]
        return drafts

    def _propose_nothing(self, num_reqs: int, graphs: BlockGraphs | None) -> None:
        """As much work as for so many requests, for vLLM's profile and dummy runs."""
        self.rows.clear()
        nobody = np.zeros(0, dtype=np.int64)
        for first in range(0, num_reqs, self.draft_pass.at_once):
            n = min(self.draft_pass.at_once, num_reqs - first)
            self.draft_pass.run(n, 0, graphs)
            self.drafting.finish(n, Turn(nobody, num_reqs, self.shape.drafts))

    def _warm_up(self, input_batch: InputBatch, sampled: Sampled) -> None:
        """In the first step, which vLLM makes up before it serves: its tensors have the types of all others."""
        nobody = async_tensor_h2d(np.zeros(0, dtype=np.int64), self.device)
        self.rows.prepare(nobody, input_batch, sampled)
        for num_reqs in range(1, self.draft_pass.at_once + 1):
            for width in self.draft_pass.widths:
                attend_to_nothing(self.draft_pass.attention, self.rows.blocks(num_reqs, 0, width))
        rotate_nothing(self.model.layers[0], self.model.target.model.layers[0].self_attn.rotary_emb)
        self.sampler.warm_up(self.model, self.draft_pass.widths)
        self.drafting.warm_up(input_batch)
        self.warm = True

    def compute_draft_logits(self, hidden_states: torch.Tensor, spec_step_idx: int) -> torch.Tensor:
        """vLLM's sampler asks for them, and was given them: one pass needs the same logits once more."""
        return hidden_states

    def counts(self) -> dict[str, int] | None:
        """What one-pass drafting and cascades counted since the start; the device's part may be a few steps old."""
        drafted, cascaded = self.drafting.counts(), self.cascades.counts()
        return drafted if not cascaded else (drafted or {}) | cascaded


def _past_prompt(batch: InputBatch) -> HostInts:
    """The rows of the batch whose prompt this step finished or an earlier one did; the host knows this exactly."""
    scheduled = batch.num_scheduled_tokens[: batch.num_reqs]
    computed = batch.num_computed_tokens_np[: batch.num_reqs] + scheduled
    return np.flatnonzero(computed >= batch.prefill_len_np[: batch.num_reqs])
