"""The rows of a draft pass: `[anchor, MASK, ..., MASK]` for each drafting request, in buffers that a graph may hold."""

import torch

from vllm_orthrus.engine.attention.blocks import Blocks
from vllm_orthrus.engine.drafting import Sampled
from vllm_orthrus.engine.settings import DraftShape
from vllm_orthrus.engine.vllm import BlockTables, InputBatch, ModelConfig
from vllm_orthrus.kernels.prepare_block import BatchState, BlockRows, link_tables, prepare_blocks


class DraftRows:
    """Compact: only requests that draft have rows, in the order in which they were asked for."""

    def __init__(self, shape: DraftShape, model_config: ModelConfig, device: torch.device) -> None:
        self.shape, self.model_config = shape, model_config
        # What takes up the outcome of a verification is built from these rows, too.
        self.capacity = max(shape.at_once, shape.most_carried)
        self.input_ids = torch.zeros(self.capacity, shape.block, dtype=torch.int64, device=device)
        self.positions = torch.zeros(self.capacity, shape.block, dtype=torch.int64, device=device)
        self.prefix_lengths = torch.zeros(self.capacity, dtype=torch.int32, device=device)
        # One for each draft; -1: sample nothing.
        self.slots = torch.full((self.capacity, shape.drafts), -1, dtype=torch.int64, device=device)
        self.offsets = torch.arange(shape.block, device=device)
        self.tables: list[torch.Tensor] = []  # per cache group [capacity, max_blocks]
        self.for_kernel: BlockRows | None = None

    @property
    def max_model_len(self) -> int:
        """Asked for anew each time: `--max-model-len auto` lowers the limit once the cache is known."""
        return int(self.model_config.max_model_len)

    def bind(self, block_tables: BlockTables, for_kernel: bool) -> None:
        """There are block tables now, or others. for_kernel: the attention that will read this is our kernel."""
        self.sources = block_tables.input_block_tables
        self.tables = [table.new_zeros(self.capacity, table.shape[1]) for table in self.sources]
        self.for_kernel = None
        if for_kernel:
            tables = link_tables(self.sources, self.tables, block_tables.block_sizes)
            self.for_kernel = BlockRows(self.input_ids, self.positions, self.prefix_lengths, self.slots, tables)

    def prepare(
        self,
        rows: torch.Tensor,  # [n], drafting rows of the batch
        batch: InputBatch,
        sampled: Sampled,
    ) -> None:
        """Write each request's block at `p, p+1, ...`, behind the last token that verification kept."""
        if self.for_kernel is not None:
            state = BatchState(batch.idx_mapping, batch.query_start_loc, batch.positions, *sampled)
            # A prefix of -1 tells the kernel that there is no such request.
            mask, limit = self.shape.mask_token_id, self.max_model_len
            prepare_blocks(rows, state, self.for_kernel, mask, limit, padding_length=-1)
            return
        n = len(rows)
        slot = batch.idx_mapping[rows]  # [n]
        last_kept = batch.query_start_loc[rows + 1] - sampled.num_rejected[rows] - 1
        anchor_position = batch.positions[last_kept] + 1  # p, [n]
        bonus, prompted = sampled.last_sampled[slot, 0], sampled.next_prefill_tokens[0, slot]
        anchor = torch.where(sampled.num_sampled[rows] > 0, bonus, prompted)

        self.input_ids[:n] = self.shape.mask_token_id
        self.input_ids[:n, 0] = anchor
        # A block may reach past the context limit; such drafts are never scheduled, but their rows need a position.
        self.positions[:n] = (anchor_position[:, None] + self.offsets).clamp_(max=self.max_model_len - 1)
        self.prefix_lengths[:n] = anchor_position
        self.slots[:n] = slot[:, None]
        for mine, theirs in zip(self.tables, self.sources, strict=True):
            torch.index_select(theirs, 0, rows, out=mine[:n])
        self.clear(n)

    def clear(self, first: int = 0) -> None:
        """Make the rows of a graph that no request fills see nothing and sample nothing."""
        self.input_ids[first:] = 0
        self.positions[first:] = 0
        self.prefix_lengths[first:] = 0
        self.slots[first:] = -1
        for table in self.tables:
            table[first:] = 0

    def blocks(self, num_reqs: int, longest: int, width: int | None = None) -> Blocks:
        """width: rows of each block, if not all."""
        tables = [table[:num_reqs] for table in self.tables]
        return Blocks(self.positions[:num_reqs, :width], self.prefix_lengths[:num_reqs, None], tables, longest)
