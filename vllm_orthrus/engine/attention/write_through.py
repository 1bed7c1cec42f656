"""The write-through path: the target's own attention layers, not causal, over a prefix and the block behind it.

The block's keys and values go into cache slots that are reserved for the request but hold nothing yet (positions p,
p+1, ...). The next verification overwrites the first of them and the rest are overwritten before anything reads them,
since vLLM only ever reads and hashes what the target has verified. So this works with every backend and cache format
that vLLM has, and any other implementation can be checked against it.
"""

import copy
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_orthrus.engine.attention.blocks import BlockAttention, Blocks, CachedLayer, ForwardInputs
from vllm_orthrus.engine.vllm import (
    AttentionCGSupport,
    KVCacheConfig,
    VllmConfig,
    build_attn_metadata,
    build_slot_mappings_by_layer,
    init_attn_backend,
    replace,
)

logger = init_logger("vllm.orthrus")


class WriteThroughAttention(BlockAttention):
    def __init__(
        self,
        layers: list[CachedLayer],
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        max_num_reqs: int,
        block: int,
        device: torch.device,
    ) -> None:
        self.attn = [layer.attn for layer in layers]
        self.kv_cache_config = kv_cache_config
        self.block_sizes = {layer.group: layer.block_size for layer in layers}
        self.block = block
        self.max_model_len = vllm_config.model_config.max_model_len
        # Metadata builders of our own: the target's keep buffers that its graphs read.
        config = copy.copy(vllm_config)
        config.attention_config = replace(vllm_config.attention_config, use_non_causal=True)
        self.groups, support, _ = init_attn_backend(
            kv_cache_config, config, device, active_layer_names={attn.layer_name for attn in self.attn}
        )
        self.compilation_config = vllm_config.compilation_config
        self.supports_graphs = support.min_cg_support.value >= AttentionCGSupport.UNIFORM_BATCH.value
        num_groups = len(kv_cache_config.kv_cache_groups)
        self.starts = torch.arange(0, (max_num_reqs + 1) * block, block, dtype=torch.int32, device=device)
        self.starts_cpu = self.starts.cpu()
        self.lengths = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self.slots = torch.full((num_groups, max_num_reqs, block), -1, dtype=torch.int64, device=device)

    @property
    def most_graph_rows(self) -> int:
        """Builders plan graphs, FlashAttention's splits among them, for no more rows than the target's graphs have."""
        return self.compilation_config.max_cudagraph_capture_size or 0

    def begin(self, blocks: Blocks, capturing: bool = False) -> ForwardInputs:
        num_reqs = len(blocks.prefix_lengths)
        lengths = self.lengths[:num_reqs]
        torch.add(blocks.prefix_lengths[:, 0], self.block, out=lengths).clamp_(max=self.max_model_len)
        for group, size in self.block_sizes.items():
            self._write_slots(self.slots[group, :num_reqs], blocks, blocks.block_tables[group], size)
        longest = min(blocks.longest + self.block, self.max_model_len)
        slots = self.slots[:, :num_reqs].flatten(1)  # [groups, rows]
        metadata: dict[str, Any] = build_attn_metadata(
            attn_groups=self.groups,
            num_reqs=num_reqs,
            num_tokens=num_reqs * self.block,
            query_start_loc_gpu=self.starts[: num_reqs + 1],
            query_start_loc_cpu=self.starts_cpu[: num_reqs + 1],
            max_query_len=self.block,
            seq_lens=lengths,
            max_seq_len=self.max_model_len if capturing else longest,
            block_tables=blocks.block_tables,
            slot_mappings=slots,
            kv_cache_config=self.kv_cache_config,
            seq_lens_cpu_upper_bound=torch.full((num_reqs,), longest, dtype=torch.int32),
            positions=blocks.positions.flatten(),
            for_cudagraph_capture=capturing,
            causal=False,
        )
        return ForwardInputs(metadata, build_slot_mappings_by_layer(slots, self.kv_cache_config))

    def _write_slots(self, slots: torch.Tensor, blocks: Blocks, table: torch.Tensor, size: int) -> None:
        """Where each row's key and value go [num_reqs, block]; -1 for rows that have no place of their own."""
        positions = blocks.prefix_lengths.long() + torch.arange(self.block, device=slots.device)
        inside = positions < self.max_model_len
        positions = positions.clamp(max=self.max_model_len - 1)
        block_ids = table.gather(1, positions // size).long()
        # Block 0 belongs to nobody: padded rows, and positions the scheduler has not reserved.
        slots.copy_(torch.where(inside & (block_ids > 0), block_ids * size + positions % size, -1))

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.attn[layer](q, k, v)
        return out


class CheckedAttention(BlockAttention):
    """Another path's results, compared with this one's in every layer of every draft.

    Both read the same cache: writing through it changes no position that either of them, or the target, reads.
    """

    supports_graphs = False  # what is compared is reported by the host
    REPORT_EVERY = 100  # drafts

    def __init__(self, path: BlockAttention, reference: WriteThroughAttention) -> None:
        self.path, self.reference = path, reference
        self.groups = reference.groups
        self.worst = torch.zeros((), device=reference.lengths.device)
        self.drafts = 0

    def begin(self, blocks: Blocks, capturing: bool = False) -> ForwardInputs:
        if self.drafts and self.drafts % self.REPORT_EVERY == 0:
            self.report()
        self.drafts += 1
        # A padded block means nothing, and of one that reaches past the context limit only a part has slots.
        prefix, width = blocks.prefix_lengths[:, 0], blocks.positions.shape[1]
        comparable = (prefix > 0) & (prefix + width <= self.reference.max_model_len)
        self.comparable = comparable.repeat_interleave(width)  # [rows]
        self.path.begin(blocks, capturing)
        return self.reference.begin(blocks, capturing)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = self.path(layer, q, k, v)
        expected = self.reference(layer, q, k, v)
        difference = (out - expected).abs().float().amax(dim=-1)  # [rows]
        torch.maximum(self.worst, torch.where(self.comparable, difference, 0).max(), out=self.worst)
        return out

    def report(self) -> float:
        """The worst difference of any element so far."""
        worst = float(self.worst)
        logger.info(
            "%s and %s: worst difference in %d drafts %.3g.",
            type(self.path).__name__,
            type(self.reference).__name__,
            self.drafts,
            worst,
        )
        return worst
