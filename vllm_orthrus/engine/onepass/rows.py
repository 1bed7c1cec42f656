"""The rows of hypotheses beside a verification, in buffers that a graph may hold."""

from typing import NamedTuple

import torch

from vllm_orthrus.engine.attention.blocks import Blocks
from vllm_orthrus.engine.settings import DraftShape
from vllm_orthrus.engine.vllm import InputBatch, ModelConfig
from vllm_orthrus.kernels.prepare_hypotheses import HypothesisBlocks, VerifyBatch, prepare_hypotheses
from vllm_orthrus.kernels.slots import Remembered


class HypothesisRows(NamedTuple):
    """Of one forward. Views of buffers that stay where they are."""

    input_ids: torch.Tensor  # [num_reqs * H * block]
    positions: torch.Tensor  # [num_reqs * H * block]
    blocks: Blocks
    hidden: torch.Tensor  # [num_reqs * H * block, hidden], filled by the forward
    captured_for: tuple[int, int] | None = None  # requests and tokens of the graph that is to hold these rows


class HypothesisBuffers:
    def __init__(self, shape: DraftShape, model: ModelConfig, device: torch.device) -> None:
        self.shape, self.model_config = shape, model
        most = shape.block * shape.most_blocks
        self.input_ids = torch.zeros(most, dtype=torch.int64, device=device)
        self.positions = torch.zeros(most, dtype=torch.int64, device=device)
        self.prefix_lengths = torch.full((shape.most_blocks,), -1, dtype=torch.int32, device=device)
        self.hidden = torch.zeros(most, model.get_hidden_size(), dtype=model.dtype, device=device)
        self.tables: list[torch.Tensor] = []  # per cache group [max_num_reqs, max_blocks], vLLM's own

    def rows_for(self, num_reqs: int, longest: int = 0) -> HypothesisRows:
        """The rows of this many requests, whatever stands in them."""
        num_hypotheses = self.shape.num_hypotheses(num_reqs)
        blocks = num_reqs * num_hypotheses
        rows = blocks * self.shape.block
        return HypothesisRows(
            self.input_ids[:rows],
            self.positions[:rows],
            Blocks(
                self.positions[:rows].view(num_reqs, -1),
                self.prefix_lengths[:blocks].view(num_reqs, num_hypotheses),
                [table[:num_reqs] for table in self.tables],
                longest,
            ),
            self.hidden[:rows],
        )

    def empty_rows_for(self, num_reqs: int) -> HypothesisRows:
        """Rows that stand for no hypothesis: for a graph to be captured with, or to warm something up."""
        rows = self.rows_for(num_reqs)
        rows.blocks.prefix_lengths.fill_(-1)
        return rows

    def fill(self, rows: HypothesisRows, remembered: Remembered, batch: InputBatch, num_reqs: int) -> None:
        """With the hypotheses of the batch's first requests."""
        by_block = (*rows.blocks.prefix_lengths.shape, self.shape.block)
        prepare_hypotheses(
            num_reqs,
            remembered,
            VerifyBatch(batch.idx_mapping, batch.query_start_loc, batch.positions),
            HypothesisBlocks(rows.input_ids.view(by_block), rows.positions.view(by_block), rows.blocks.prefix_lengths),
            self.shape.mask_token_id,
            self.model_config.max_model_len,  # which `--max-model-len auto` lowers once the cache is known
        )
