"""The Orthrus loop on Model Runner V2.

vLLM runs the verification: the autoregressive view over `[anchor, d1..dK]`, then its rejection sampler, which yields
the accepted drafts and one bonus token. The bonus is the next anchor. This file does the other half:

    block  = [anchor, MASK, ..., MASK]           at positions p, p+1, ...
    hidden = diffusion view of the block         over the target's cache before p
    d1..dK = sampled from the first K rows       row i predicts position p+i+1

In one pass (`onepass.py`) the blocks come with the verification's own forward, and this file takes up the one that came
true; it drafts in a pass of its own only behind prompts and for batches that are too large.

Everything runs on the device: the host knows neither how many drafts were accepted nor where a block starts.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.logger import init_logger

from vllm_orthrus.engine.attention.blocks import BlockAttention, BlocksAlone, CachedLayer, ForwardInputs
from vllm_orthrus.engine.attention.gather import GatherAttention, ungatherable
from vllm_orthrus.engine.attention.kernel import KernelAttention, make_workspace, unreadable
from vllm_orthrus.engine.attention.write_through import CheckedAttention, WriteThroughAttention
from vllm_orthrus.engine.draft_rows import DraftRows
from vllm_orthrus.engine.graphs import BlockGraphs, OutcomeGraphs
from vllm_orthrus.engine.onepass.counters import LateCounts
from vllm_orthrus.engine.onepass.forward import OnePass
from vllm_orthrus.engine.onepass.memory import HypothesisState
from vllm_orthrus.engine.onepass.verification import refuse_unfusable
from vllm_orthrus.engine.settings import DraftShape
from vllm_orthrus.engine.view import DiffusionView
from vllm_orthrus.engine.vllm import (
    BatchExecutionDescriptor,
    BlockTables,
    CUDAGraphMode,
    DraftModelSpeculator,
    InputBatch,
    KVCacheConfig,
    VllmConfig,
    async_tensor_h2d,
    initialize_single_dummy_weight,
    process_weights_after_loading,
    set_current_vllm_config,
    set_default_torch_dtype,
    set_forward_context,
)
from vllm_orthrus.engine.warmup import attend_to_nothing
from vllm_orthrus.heads import BaseShape, open_head
from vllm_orthrus.kernels.forms import runs_triton

logger = init_logger("vllm.orthrus")


class OrthrusSpeculator(DraftModelSpeculator):  # type: ignore[misc]
    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.shape = DraftShape.of(vllm_config)
        self.block = self.shape.block
        self.num_query_per_req = self.block  # bounds vLLM's profile run

        # What a captured draft pass reads and writes, at fixed addresses.
        self.rows = DraftRows(self.shape, vllm_config.model_config, device)
        room, drafts = self.rows.capacity, self.shape.drafts
        self.drafts = torch.zeros(room, drafts, dtype=torch.int64, device=device)
        self.workspace: torch.Tensor | None = None  # of our kernel, made before vLLM measures what memory is left

        self.one_pass: OnePass | None = None
        self.drafted: torch.Tensor | None = None  # one pass: hidden states of a draft pass [room, block, hidden]
        self.counted: LateCounts | None = None
        self.draft_passes = 0  # of requests, beside a one-pass forward; the host knows them exactly
        # By slot: whether what one-pass drafting remembers is up to date.
        self.current = np.zeros(self.max_num_reqs, dtype=bool)
        self.logits: torch.Tensor | None = None  # of the rows being sampled, if they are known already

        # What a graph that takes up an outcome reads beside that. Nothing sampled: no request.
        self.num_sampled = torch.zeros(room, dtype=torch.int64, device=device)
        self.num_rejected = torch.zeros(room, dtype=torch.int64, device=device)

        self.at_once = self.shape.at_once  # requests of one draft pass; larger batches draft in turns
        self.every_row = torch.arange(room, device=device)
        self.draft_columns = torch.arange(drafts, dtype=torch.int32, device=device).repeat(room)
        self.attention: BlockAttention | None = None
        self.warm = False  # every form of our kernels that a step may launch has been launched
        # vLLM measures graph memory with a throw-away cache first and then clears attributes of this type.
        self.graphs: BlockGraphs | None = None
        self.outcome_graphs: OutcomeGraphs | None = None

    # Setting up, in the order in which vLLM calls

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        config = self.speculative_config
        model_config = self.vllm_config.model_config
        shape = BaseShape.from_config(model_config.hf_text_config)
        with set_current_vllm_config(self.vllm_config), set_default_torch_dtype(self.dtype), self.device:
            view = DiffusionView(shape, target_model)
        if self.vllm_config.load_config.load_format == "dummy":
            for parameter in view.parameters():
                initialize_single_dummy_weight(parameter)
        else:
            head = open_head(config.model, config.revision, config.head_cache)
            view.load_weights(head.tensors())
        size = sum(parameter.nbytes for parameter in view.parameters())
        # Linear layers prepare their kernels' layouts here, which vLLM's loader does only for models it built.
        process_weights_after_loading(view, model_config, self.device)
        logger.info(
            "Orthrus head %s: %.2f GiB on this rank, all else is the target's. Blocks of %d rows give %d drafts.",
            config.model,
            size / 2**30,
            self.block,
            self.num_speculative_steps,
        )
        if config.orthrus_passes == "one":
            fused = config.orthrus_verification == "fused"
            self.one_pass = OnePass(view, self.shape, model_config, fused, self.device)
            self.counted = LateCounts(HypothesisState.COUNTERS, self.one_pass.state.counters)
            blocks = (self.rows.capacity, self.block, model_config.get_hidden_size())
            self.drafted = torch.zeros(blocks, dtype=self.dtype, device=self.device)
        if config.orthrus_attention == "kernel" or (config.orthrus_attention == "auto" and runs_triton(self.device)):
            self.workspace = make_workspace(view.target.model.layers[0].self_attn.attn, self._passes(), self.device)
        return view.eval()

    def _passes(self) -> Iterator[tuple[int, int]]:
        """Requests, and rows of each, in every pass that our kernel may attend in."""
        shape = self.shape
        for num_reqs in range(1, shape.at_once + 1):
            yield num_reqs, shape.block
        if self.one_pass is not None:
            verified = shape.verified if self.one_pass.fused else 0
            for num_reqs in range(1, shape.most_carried + 1):
                yield num_reqs, verified + shape.block * shape.num_hypotheses(num_reqs)

    def set_attn(
        self,
        model_state: Any,
        kv_cache_config: KVCacheConfig,
        block_tables: BlockTables,
        target_input_buffers: Any,
        target_attn_groups: Any,
    ) -> None:
        # Nothing here may hold on to a cache: it is bound later, and on GPUs twice.
        self.attn_groups: list[Any] = []
        self.block_tables = block_tables
        group_of = {
            name: group for group, spec in enumerate(kv_cache_config.kv_cache_groups) for name in spec.layer_names
        }
        layers = [
            CachedLayer(attn, group_of[attn.layer_name], block_tables.block_sizes[group_of[attn.layer_name]])
            for attn in self._target_attention()
        ]
        self.attention = self._choose_attention(layers, kv_cache_config)
        self.rows.bind(block_tables, isinstance(self.attention, KernelAttention))
        if self.one_pass is not None:
            self._bind_one_pass(self.one_pass, layers)

    def _bind_one_pass(self, one_pass: OnePass, layers: list[CachedLayer]) -> None:
        if one_pass.fused:
            refuse_unfusable(self.vllm_config, layers)
        if isinstance(self.attention, WriteThroughAttention):
            logger.info("Orthrus drafts in a pass of its own: slots behind a request have room for one block only.")
            self.one_pass = self.drafted = None
            return
        beside: BlockAttention
        if isinstance(self.attention, KernelAttention):
            beside = KernelAttention(layers, self.attention.workspace, self.shape.verified if one_pass.fused else 0)
        else:
            beside = GatherAttention(layers)
        one_pass.bind(beside, self.block_tables.input_block_tables)

    def _choose_attention(self, layers: list[CachedLayer], kv_cache_config: KVCacheConfig) -> BlockAttention:
        config = self.speculative_config
        wanted: str = config.orthrus_attention
        if wanted == "auto":
            wanted = "kernel" if runs_triton(self.device) else "gather"
        reads = {"kernel": unreadable, "gather": ungatherable}.get(wanted)
        problem = None if reads is None else next(filter(None, map(reads, layers)), None)
        if problem is not None and config.orthrus_attention != "auto":
            raise ValueError(
                f"orthrus_attention={wanted!r} cannot read this cache: {problem}. Leave orthrus_attention at 'auto'."
            )
        if problem is not None:
            logger.info("Orthrus drafts through the target's own attention layers: %s.", problem)
            wanted = "write_through"
        if wanted == "write_through" or config.orthrus_check_attention:
            room = self.rows.capacity
            through = WriteThroughAttention(layers, self.vllm_config, kv_cache_config, room, self.block, self.device)
            self.attn_groups = through.groups
        if wanted == "write_through":
            return through
        path: BlockAttention
        if wanted == "kernel":
            assert self.workspace is not None
            path = KernelAttention(layers, self.workspace)
        else:
            path = GatherAttention(layers)
        return CheckedAttention(path, through) if config.orthrus_check_attention else path

    def _target_attention(self) -> list[Any]:
        return [layer.self_attn.attn for layer in self.model.target.model.layers]

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        assert self.attention is not None
        # A target that has graphs of its pieces only says nothing of our passes, which are captured by themselves.
        most = self.attention.most_graph_rows
        ours = cudagraph_mode != CUDAGraphMode.NONE and self.attention.supports_graphs
        if ours and most is not None:
            ours = most >= self.block
            self.at_once = min(self.shape.at_once, most // self.block) or self.shape.at_once
        mode = CUDAGraphMode.FULL_DECODE_ONLY if ours else CUDAGraphMode.NONE
        self.graphs = BlockGraphs(self.vllm_config, self.device, mode, self.block, self.at_once)
        if self.one_pass is not None:
            carried = ours and cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
            mode = CUDAGraphMode.FULL_DECODE_ONLY if carried else CUDAGraphMode.NONE
            self.outcome_graphs = OutcomeGraphs(self.vllm_config, self.device, mode, self.shape)

    def capture(self) -> None:
        assert self.graphs is not None and self.attention is not None
        attention = self.attention
        self.rows.clear()

        def prepare(descriptor: BatchExecutionDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            context = attention.begin(self.rows.blocks(descriptor.num_reqs, self.rows.max_model_len), capturing=True)
            return lambda mode: self._draft(descriptor.num_reqs, attention, context)

        self.graphs.capture(prepare, "Capturing Orthrus drafts")
        captured = sorted(descriptor.num_reqs for descriptor in self.graphs.graphs)
        logger.info("Orthrus drafts have CUDA graphs for these numbers of requests: %s.", captured)
        if self.outcome_graphs is not None:
            self._capture_outcomes(self.outcome_graphs)

    def _capture_outcomes(self, graphs: OutcomeGraphs) -> None:
        self.num_sampled.zero_()

        def prepare(descriptor: BatchExecutionDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            return lambda mode: self._take_up(descriptor.num_reqs)

        graphs.capture(prepare, "Capturing Orthrus outcomes")

    # One step

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: Any,
        num_sampled: torch.Tensor,  # [num_reqs]
        num_rejected: torch.Tensor,  # [num_reqs]
        last_sampled: torch.Tensor,  # [max_num_reqs, 1], by slot
        next_prefill_tokens: torch.Tensor,  # [lookahead, max_num_reqs], by slot
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
        drafts: torch.Tensor = self.draft_tokens[:num_reqs]  # [num_reqs, K]
        if num_speculative_tokens == 0:
            self.current[input_batch.idx_mapping_np[:num_reqs]] = False
            return drafts
        self.temperature.copy_(temperature)
        self.seeds.copy_(seeds)
        if dummy_run:
            self.rows.clear()
            for first in range(0, num_reqs, self.at_once):
                n = min(self.at_once, num_reqs - first)
                self._run(n, longest=0, eager=is_profile)
                self._finish(n, num_reqs, np.ones(n, dtype=bool))
            return drafts

        slots = input_batch.idx_mapping_np[:num_reqs]
        carried = self.one_pass is not None and self.one_pass.carried
        sampled = (num_sampled, num_rejected, last_sampled, next_prefill_tokens)
        if not self.warm and not carried and runs_triton(self.device):
            self._warm_up(input_batch, *sampled)
        if carried and self.current[slots].all():
            self.rows.prepare(self.every_row[:num_reqs], input_batch, *sampled)
            self._stage(num_reqs, num_sampled, num_rejected)
            self._run_outcome(input_batch.num_reqs_after_padding)
            drafts.copy_(self.drafts[:num_reqs])
            return drafts

        self.current[slots] = False
        drafts.fill_(-1)  # "no draft", for requests that are still reading their prompt
        drafting = _past_prompt(input_batch)
        if len(drafting) == 0:
            return drafts
        self.draft_passes += len(drafting)
        for first in range(0, len(drafting), self.at_once):
            turn = drafting[first : first + self.at_once]
            rows = async_tensor_h2d(turn, self.device)  # [n], rows of the batch
            self.rows.prepare(rows, input_batch, *sampled)
            longest = int(input_batch.seq_lens_cpu_upper_bound.numpy()[turn].max())
            self._run(len(turn), longest, eager=False)
            reading = input_batch.num_computed_tokens_np[turn] < input_batch.prefill_len_np[turn]
            if self._finish(len(turn), len(drafting), reading):
                self.current[:] = False  # of all that may have been up to date, only these are now
                self.current[slots[turn]] = True
            drafts[rows] = self.drafts[: len(turn)]
        return drafts

    def _warm_up(self, input_batch: InputBatch, *sampled: torch.Tensor) -> None:
        """In the first step, which vLLM makes up before it serves: its tensors have the types of all others."""
        assert self.attention is not None
        self.rows.prepare(self.every_row[:0], input_batch, *sampled)
        for num_reqs in range(1, self.at_once + 1):
            attend_to_nothing(self.attention, self.rows.blocks(num_reqs, 0))
        if self.one_pass is not None:
            self.num_sampled.zero_()
            for num_reqs in self.one_pass.warm_up(input_batch):
                self._take_up(num_reqs)
        self.warm = True

    def counts(self) -> dict[str, int] | None:
        """What one-pass drafting has counted since the start; the device's part may be a few steps old."""
        if self.one_pass is None or self.counted is None:
            return None
        return {**self.counted.read(), "draft_passes": self.draft_passes}

    def _finish(self, n: int, together: int, new: np.ndarray[Any, Any]) -> bool:
        """Draft from the hidden states of a pass that left it at that. Whether the next step may do without one.

        together: the requests that draft in this step; new [n]: those whose prompt ends in it.
        """
        if self.one_pass is None or self.drafted is None:  # the pass has drafted already
            return False
        if n < together or self.shape.num_hypotheses(together) == 0:
            self._sample(n, self.drafted[:n, : self.num_speculative_steps], self.rows.positions[:n])
            return False
        first = async_tensor_h2d(new, self.device)
        self.one_pass.state.begin(self.rows.slots[:n, 0], self.drafted[:n], first)
        self._sample_and_guess(n)
        return True

    def _stage(self, num_reqs: int, num_sampled: torch.Tensor, num_rejected: torch.Tensor) -> None:
        for buffer, values in ((self.num_sampled, num_sampled), (self.num_rejected, num_rejected)):
            buffer[:num_reqs] = values[:num_reqs]
            buffer[num_reqs:] = 0

    def _run_outcome(self, num_reqs: int) -> None:
        graphs = self.outcome_graphs
        if graphs is not None and (graph := graphs.find(num_reqs)) is not None:
            graphs.run_fullgraph(graph)
        else:
            self._take_up(num_reqs)

    def _take_up(self, n: int) -> None:
        """One pass: draft from rows of a block that this verification carried, or of the one before it.

        On buffers only: this, too, is what a CUDA graph captures.
        """
        assert self.one_pass is not None
        rows = self.one_pass.views(n)
        self.one_pass.state.settle(
            self.rows.slots[:n, 0],
            rows.blocks.prefix_lengths,
            rows.hidden.view(n, -1, self.block, rows.hidden.shape[1]),
            self.num_sampled[:n],
            self.num_rejected[:n],
            self.rows.input_ids[:n, 0],
        )
        self._sample_and_guess(n)

    def _sample_and_guess(self, n: int) -> None:
        """Sample drafts from the blocks at hand, and choose hypotheses about what will become of them."""
        assert self.one_pass is not None
        state, slot = self.one_pass.state, self.rows.slots[:n, 0]
        hidden = state.drafting(slot)  # [n, K + 1, hidden]
        logits = self.model.compute_logits(hidden.flatten(0, 1)).view(n, hidden.shape[1], -1)
        anchor_position, anchor = self.rows.positions[:n, 0], self.rows.input_ids[:n, 0]
        # A draw is keyed by the step as well as by its place: which block it came from depended on earlier draws.
        steps = (
            anchor_position[:, None] * (self.num_speculative_steps + 1)
            + self.draft_columns[: self.num_speculative_steps]
        )
        self.logits = logits[:, :-1].flatten(0, 1)
        self._sample(n, hidden[:, :-1], steps)
        self.logits = None
        state.choose(slot, anchor_position, anchor, logits, self.drafts[:n], self.temperature[slot])

    def compute_draft_logits(self, hidden_states: torch.Tensor, spec_step_idx: int) -> torch.Tensor:
        return self.model.compute_logits(hidden_states) if self.logits is None else self.logits

    def _run(self, num_reqs: int, longest: int, eager: bool) -> None:
        if self.attention is None:  # the profile run comes before there is a cache: blocks see only themselves
            alone = BlocksAlone(self._target_attention())
            self._draft(num_reqs, alone, alone.begin(self.rows.blocks(num_reqs, 0)))
            return
        if self.graphs is not None and not eager:
            graph = self.graphs.dispatch(num_reqs, num_reqs * self.block, self.block, num_active_loras=0)
            if graph.cg_mode == CUDAGraphMode.FULL:
                self.attention.begin(self.rows.blocks(graph.num_reqs, longest))
                self.graphs.run_fullgraph(graph)
                return
        self._draft(num_reqs, self.attention, self.attention.begin(self.rows.blocks(num_reqs, longest)))

    def _draft(self, num_reqs: int, attention: BlockAttention, context: ForwardInputs) -> None:
        """The draft pass itself, on buffers only: this is what a CUDA graph captures."""
        inputs = set_forward_context(
            context.attn_metadata,
            self.vllm_config,
            num_tokens=num_reqs * self.block,
            slot_mapping=context.slot_mapping,
        )
        with inputs, self.model.fused():
            ids, positions = self.rows.input_ids[:num_reqs].flatten(), self.rows.positions[:num_reqs].flatten()
            hidden = self.model(ids, positions, attention)
        hidden = hidden.view(num_reqs, self.block, -1)
        if self.drafted is not None:
            self.drafted[:num_reqs] = hidden
            return
        # A draw is keyed by the position of the row it comes from.
        self._sample(num_reqs, hidden[:, : self.num_speculative_steps], self.rows.positions[:num_reqs])

    def _sample(self, num_reqs: int, hidden: torch.Tensor, keys: torch.Tensor) -> None:
        """Draw each request's drafts from its rows: hidden [num_reqs, K, hidden], keys [num_reqs, K or more]."""
        sampled = self.sample_draft(
            hidden.flatten(0, 1),
            keys[:, : self.num_speculative_steps].flatten(),
            self.rows.slots[:num_reqs].flatten(),
            self.temperature,
            self.seeds,
            self.draft_columns[: num_reqs * self.num_speculative_steps],
            self.draft_logits,
        )
        self.drafts[:num_reqs] = sampled.view(num_reqs, -1)


def _past_prompt(batch: InputBatch) -> np.ndarray[Any, Any]:
    """The rows of the batch whose prompt this step finished or an earlier one did; the host knows this exactly."""
    scheduled = batch.num_scheduled_tokens[: batch.num_reqs]
    computed = batch.num_computed_tokens_np[: batch.num_reqs] + scheduled
    return np.flatnonzero(computed >= batch.prefill_len_np[: batch.num_reqs])
