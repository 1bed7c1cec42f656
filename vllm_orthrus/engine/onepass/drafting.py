"""Drafting in one pass. A step chooses hypotheses, and the next verification carries their blocks:

forward    OnePass.forward      the verification, with the rows of the hypotheses
verify     vLLM
match      Memory.match         the newest block that the outcome has made useful, and its rows that draft next
logits     JoinedLogits.take    of those rows, if they came with the verification's
draft      OnePassDrafting.draft
choose     Memory.choose        hypotheses about what becomes of these drafts
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from vllm_orthrus.engine.attention.blocks import BlockAttention, CachedLayer
from vllm_orthrus.engine.attention.gather import GatherAttention
from vllm_orthrus.engine.attention.kernel import KernelAttention
from vllm_orthrus.engine.draft_rows import DraftRows
from vllm_orthrus.engine.drafting import Drafting, HostInts, Sampled, Turn
from vllm_orthrus.engine.graphs import OutcomeGraphs
from vllm_orthrus.engine.lasting import tensors_in
from vllm_orthrus.engine.onepass.counters import LateCounts
from vllm_orthrus.engine.onepass.forward import OnePass
from vllm_orthrus.engine.onepass.joined import can_join
from vllm_orthrus.engine.onepass.logits import JoinedLogits
from vllm_orthrus.engine.onepass.memory import Memory
from vllm_orthrus.engine.onepass.pairs import lay_side_by_side, requests_paired
from vllm_orthrus.engine.onepass.rows import HypothesisBuffers
from vllm_orthrus.engine.onepass.verification import refuse_unfusable
from vllm_orthrus.engine.sampler import DraftSampler
from vllm_orthrus.engine.settings import DraftShape
from vllm_orthrus.engine.view import DiffusionView
from vllm_orthrus.engine.vllm import (
    BatchExecutionDescriptor,
    BlockTables,
    CUDAGraphMode,
    InputBatch,
    VllmConfig,
    async_tensor_h2d,
)
from vllm_orthrus.kernels.chances import LOOKED_AT
from vllm_orthrus.kernels.choose import Drafted
from vllm_orthrus.kernels.forms import runs_triton
from vllm_orthrus.kernels.most_probable import most_probable
from vllm_orthrus.kernels.take_up import COUNTERS, Outcome


class OnePassDrafting(Drafting):
    def __init__(
        self,
        view: DiffusionView,
        shape: DraftShape,
        rows: DraftRows,
        sampler: DraftSampler,
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        self.view, self.shape, self.rows, self.sampler, self.vllm_config = view, shape, rows, sampler, vllm_config
        model, room = vllm_config.model_config, rows.capacity
        fused = vllm_config.speculative_config.orthrus_verification == "fused"
        self.paired = requests_paired(shape, vllm_config) if runs_triton(device) else frozenset[int]()
        if self.paired:
            lay_side_by_side(view)
        self.memory = Memory(shape, model, device)
        self.buffers = HypothesisBuffers(shape, model, device)
        self.logits = JoinedLogits(view.target, shape, self.memory, vllm_config, device)
        self.one_pass = OnePass(view, shape, self.memory, self.buffers, self.logits, fused)
        # Hidden states of a draft pass [room, block, hidden].
        self.drafted = torch.zeros(room, shape.block, model.get_hidden_size(), dtype=model.dtype, device=device)
        # What a graph that takes up an outcome reads beside the rows. Nothing sampled: no request.
        self.num_sampled = torch.zeros(room, dtype=torch.int64, device=device)
        self.num_rejected = torch.zeros(room, dtype=torch.int64, device=device)
        self.every_row = torch.arange(room, device=device)
        self.counted = LateCounts(COUNTERS, self.memory.counters)
        # By slot, on the host: the newest drafts come from a block that a verification carried.
        self.rode = np.zeros(shape.max_num_reqs, dtype=bool)
        self.draft_passes = 0  # of requests; the host knows them exactly

    def bind(self, attention: BlockAttention, layers: list[CachedLayer], block_tables: BlockTables) -> None:
        """There is a cache now, which draft passes see by this attention."""
        one_pass = self.one_pass
        if one_pass.fused:
            refuse_unfusable(self.vllm_config, layers)
        beside: BlockAttention = GatherAttention(layers)
        if isinstance(attention, KernelAttention):
            beside = KernelAttention(layers, attention.workspace, self.shape.verified if one_pass.fused else 0)
        targets = [layer.self_attn for layer in self.view.target.model.layers]
        join = all(can_join(*one, self.every_row.device) for one in zip(layers, targets, strict=True))
        one_pass.bind(beside, block_tables.input_block_tables, join, self.paired)

    @property
    def carried(self) -> bool:  # type: ignore[override]
        return self.one_pass.carried

    # Where a verification has carried blocks

    def take_up(self, batch: InputBatch, sampled: Sampled, graphs: OutcomeGraphs | None) -> bool:
        num_reqs = batch.num_reqs
        if not self.carried:
            return False
        assert self.logits.awaited is None, "vLLM has computed no logits of the verification that carried blocks"
        self.rows.prepare(self.every_row[:num_reqs], batch, sampled)
        for buffer, values in ((self.num_sampled, sampled.num_sampled), (self.num_rejected, sampled.num_rejected)):
            buffer[:num_reqs] = values[:num_reqs]
            buffer[num_reqs:] = 0
        padded = batch.num_reqs_after_padding
        graph = None if graphs is None else graphs.find(padded)
        if graphs is not None and graph is not None:
            graphs.run_fullgraph(graph)
        else:
            self.match_and_draft(padded)
        self.rode[batch.idx_mapping_np[:num_reqs]] = True
        return True

    def match_and_draft(self, num_reqs: int) -> None:
        """Draft from a block that this verification carried, or from the one before it.

        On buffers only: this, too, is what a CUDA graph captures.
        """
        outcome = Outcome(
            self.rows.slots[:num_reqs, 0],
            self.num_sampled[:num_reqs],
            self.num_rejected[:num_reqs],
            self.rows.input_ids[:num_reqs, 0],
        )
        rows = self.buffers.rows_for(num_reqs)
        which = self.memory.match(rows, outcome)
        hidden = self.memory.rows(rows, which, outcome.slot)
        if num_reqs in self.logits.requests:
            self.draft(num_reqs, hidden, self.logits.take(num_reqs, which, outcome.slot))
        else:
            self.draft(num_reqs, hidden, self.view.compute_logits(hidden))

    def draft(self, num_reqs: int, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Sample drafts from rows of the blocks at hand, and choose hypotheses about what becomes of them.

        hidden, logits: [num_reqs * K + num_reqs, ...] of these rows, and of the row behind each request's.
        """
        slot, keys = self.rows.slots[:num_reqs, 0], self._keys(num_reqs)
        drafts, temperature = self.sampler.drafts[:num_reqs], self.sampler.speculator.temperature[slot]
        if self.sampler.selector is None:
            self.sampler.sample(num_reqs, logits[: num_reqs * self.shape.drafts], keys)
            said = most_probable(logits, drafts, temperature, LOOKED_AT)
        else:
            offset = self.memory.slots.offset[slot]
            said = self.sampler.select(self.sampler.selector, keys, hidden, logits, offset, temperature)
        drafted = Drafted(
            slot,
            self.rows.positions[:num_reqs, 0],
            self.rows.input_ids[:num_reqs, 0],
            drafts,
            temperature,
        )
        self.memory.choose(drafted, said)

    def _keys(self, num_reqs: int) -> torch.Tensor:
        """Of draws [num_reqs, K], by step as well as by place: which block drafts next depended on earlier draws."""
        return self.rows.positions[:num_reqs, :1] * (self.shape.drafts + 1) + self.sampler.columns[0]

    def capture(self, graphs: OutcomeGraphs) -> None:
        self.num_sampled.zero_()

        def prepare(descriptor: BatchExecutionDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            return lambda mode: self.match_and_draft(descriptor.num_reqs)

        graphs.capture(prepare, "Capturing Orthrus outcomes")

    # Where a draft pass was needed

    def keep(self, num_reqs: int, hidden: torch.Tensor) -> None:
        self.drafted[:num_reqs, : hidden.shape[1]] = hidden

    def finish(self, num_reqs: int, turn: Turn) -> None:
        self.draft_passes += len(turn.slots)
        self.rode[turn.slots] = False
        fewer = turn.drafts < self.shape.drafts
        if fewer or num_reqs < turn.together or self.shape.num_hypotheses(turn.together) == 0:
            # The next verification carries no blocks, so nothing need be remembered.
            hidden = self.drafted[:num_reqs, : turn.drafts]
            self.sampler.sample_block(num_reqs, hidden, self.view, self._keys(num_reqs))
            return
        new = async_tensor_h2d(self.memory.meet(turn.slots, num_reqs), self.drafted.device)
        hidden = self.memory.begin(self.rows.slots[:num_reqs, 0], self.drafted[:num_reqs], new)
        self.draft(num_reqs, hidden, self.view.compute_logits(hidden))
        self.logits.known[turn.slots] = False
        if len(turn.slots):
            self.memory.keep_only(turn.slots)

    # Beside both

    def informed(self, of: HostInts, slots: torch.Tensor, places: torch.Tensor) -> torch.Tensor | None:
        """Of a block that rode along those at its start, if it was the exact one. Fillers repeat another row's."""
        rode = self.rode[of]
        if not rode.any():
            return None
        exact = self.memory.slots.offset[slots] == 0
        real = places < self.memory.slots.drafts.real[slots]
        return torch.where(async_tensor_h2d(rode, slots.device), exact & real, True)

    def forget(self, slots: HostInts, reading: HostInts) -> None:
        self.memory.forget(slots)
        self.memory.new[slots[reading]] = True

    def lasting(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in ("memory", "buffers", "logits", "drafted", "num_sampled", "num_rejected", "every_row"):
            yield from tensors_in(getattr(self, name), name)

    def warm_up(self, batch: InputBatch) -> None:
        self.num_sampled.zero_()
        for num_reqs in self.one_pass.warm_up(batch):
            self.match_and_draft(num_reqs)
        self.memory.begin(self.rows.slots[:1, 0], self.drafted[:1], self.num_sampled[:1] == 0)  # behind a draft pass

    def make_graphs(
        self, cudagraph_mode: CUDAGraphMode, drafts_have_graphs: bool, device: torch.device
    ) -> OutcomeGraphs:
        """One outcome follows one verification: they are there where the target's whole forward has graphs."""
        carried = drafts_have_graphs and cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        mode = CUDAGraphMode.FULL_DECODE_ONLY if carried else CUDAGraphMode.NONE
        return OutcomeGraphs(self.vllm_config, device, mode, self.shape)

    def counts(self) -> dict[str, int]:
        return {**self.counted.read(), "draft_passes": self.draft_passes}
