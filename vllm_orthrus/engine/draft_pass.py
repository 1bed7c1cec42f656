"""The draft pass: the diffusion view of a block for each drafting request, over the target's cache.

block  = [anchor, MASK, ..., MASK]           at positions p, p+1, ...
hidden = diffusion view of the block         over the target's cache before p
"""

from collections.abc import Callable

import torch
from vllm.logger import init_logger

from vllm_orthrus.engine.attention.blocks import BlockAttention, BlocksAlone, ForwardInputs
from vllm_orthrus.engine.attention.kernel import KernelAttention
from vllm_orthrus.engine.draft_rows import DraftRows
from vllm_orthrus.engine.graphs import BlockGraphs
from vllm_orthrus.engine.settings import DraftShape
from vllm_orthrus.engine.view import DiffusionView
from vllm_orthrus.engine.vllm import (
    BatchExecutionDescriptor,
    BlockTables,
    CUDAGraphMode,
    VllmConfig,
    set_forward_context,
)

logger = init_logger("vllm.orthrus")


class DraftPass:
    def __init__(
        self,
        view: DiffusionView,
        shape: DraftShape,
        rows: DraftRows,
        vllm_config: VllmConfig,
        keep: Callable[[int, torch.Tensor], None],
    ) -> None:
        """keep: is given the hidden states [num_reqs, block, hidden] of each pass, within its graph."""
        self.view, self.shape, self.rows, self.vllm_config, self.keep = view, shape, rows, vllm_config, keep
        self.at_once = shape.at_once  # requests of one pass; larger batches draft in turns
        # vLLM runs a draft before there is a cache, to measure what memory it needs.
        self.attention: BlockAttention = BlocksAlone(view.target_attention())

    def bind(self, attention: BlockAttention, block_tables: BlockTables) -> None:
        """There is a cache now, or another: on GPUs vLLM makes one to measure with first."""
        self.attention = attention
        self.rows.bind(block_tables, isinstance(attention, KernelAttention))

    def run(self, num_reqs: int, longest: int, graphs: BlockGraphs | None, drafts: int | None = None) -> None:
        """Over the first rows. longest: an upper bound on their prefixes; drafts: how many are wanted, if not all."""
        width = self._width(drafts)
        if graphs is not None:
            graph = graphs.find(num_reqs, width)
            if graph.cg_mode == CUDAGraphMode.FULL:
                self.attention.begin(self.rows.blocks(graph.num_reqs, longest, width))
                graphs.run_fullgraph(graph)
                return
        self.compute(num_reqs, self.attention.begin(self.rows.blocks(num_reqs, longest, width)), width)

    @property
    def widths(self) -> list[int]:
        """Rows that a block may have here, the most last."""
        return self.shape.widths if self.attention.takes_any_width else [self.shape.block]

    def _width(self, drafts: int | None) -> int:
        """Rows of a block: one for each draft, if fewer than all are wanted. Narrow blocks draft no worse."""
        return drafts if drafts in self.widths else self.shape.block

    def compute(self, num_reqs: int, context: ForwardInputs, width: int) -> None:
        """The pass itself, on buffers only: this is what a CUDA graph captures."""
        inputs = set_forward_context(
            context.attn_metadata,
            self.vllm_config,
            num_tokens=num_reqs * width,
            slot_mapping=context.slot_mapping,
        )
        with inputs, self.view.fused():
            ids = self.rows.input_ids[:num_reqs, :width].flatten()
            positions = self.rows.positions[:num_reqs, :width].flatten()
            hidden = self.view(ids, positions, self.attention)
        self.keep(num_reqs, hidden.view(num_reqs, width, -1))

    def make_graphs(self, cudagraph_mode: CUDAGraphMode, device: torch.device) -> BlockGraphs:
        """cudagraph_mode: the target's. One that has graphs of its pieces only says nothing of these passes."""
        most, block = self.attention.most_graph_rows, self.shape.block
        ours = cudagraph_mode != CUDAGraphMode.NONE and self.attention.supports_graphs
        if ours and most is not None:
            ours = most >= block
            self.at_once = min(self.shape.at_once, most // block) or self.shape.at_once
        mode = CUDAGraphMode.FULL_DECODE_ONLY if ours else CUDAGraphMode.NONE
        return BlockGraphs(self.vllm_config, device, mode, self.widths, self.at_once)

    def capture(self, graphs: BlockGraphs) -> None:
        self.rows.clear()

        def prepare(descriptor: BatchExecutionDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            width = descriptor.uniform_token_count
            blocks = self.rows.blocks(descriptor.num_reqs, self.rows.max_model_len, width)
            context = self.attention.begin(blocks, capturing=True)
            return lambda mode: self.compute(descriptor.num_reqs, context, width)

        graphs.capture(prepare, "Capturing Orthrus drafts")
        captured = sorted({descriptor.num_reqs for descriptor in graphs.graphs})
        logger.info("Orthrus drafts have CUDA graphs for these numbers of requests: %s.", captured)
