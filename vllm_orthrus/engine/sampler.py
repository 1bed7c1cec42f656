"""Sampling drafts: by vLLM's own sampler for drafts, or from left to right by a selector."""

import torch

from vllm_orthrus.engine.draft_rows import DraftRows
from vllm_orthrus.engine.selector import Selector
from vllm_orthrus.engine.settings import DraftShape
from vllm_orthrus.engine.view import DiffusionView
from vllm_orthrus.engine.vllm import DraftModelSpeculator
from vllm_orthrus.kernels.chances import LOOKED_AT
from vllm_orthrus.kernels.most_probable import Probable, likeliest
from vllm_orthrus.kernels.select import Blocks, Kept, select


class DraftSampler:
    """Samples with the temperatures and seeds that the speculator holds, into a buffer that a graph may write."""

    def __init__(self, speculator: DraftModelSpeculator, shape: DraftShape, rows: DraftRows) -> None:
        self.speculator, self.shape, self.rows = speculator, shape, rows
        room, device = rows.capacity, rows.input_ids.device
        self.drafts = torch.zeros(room, shape.drafts, dtype=torch.int64, device=device)
        self.columns = torch.arange(shape.drafts, dtype=torch.int32, device=device).repeat(room, 1)
        self.from_start = torch.zeros(room, dtype=torch.int64, device=device)  # the first row of each block
        self.selector: Selector | None = None
        self.written: torch.Tensor | None = None  # [slots, K, candidates], what a selector has written for each slot

    def select_by(self, selector: Selector) -> None:
        self.selector = selector
        size = (self.shape.max_num_reqs, self.shape.drafts, selector.shape.candidates)
        if self.speculator.draft_logits is not None:
            self.written = torch.full(size, -1, dtype=torch.int32, device=self.drafts.device)

    def sample_block(
        self, num_reqs: int, hidden: torch.Tensor, view: DiffusionView, keys: torch.Tensor | None = None
    ) -> None:
        """From the rows of a draft pass [num_reqs, block, hidden]. Keys, if not given: the positions of the rows."""
        drafting = hidden[:, : self.shape.drafts]
        keys = (self.rows.positions[:num_reqs] if keys is None else keys)[:, : drafting.shape[1]]
        rows = drafting.flatten(0, 1)
        logits = view.compute_logits(rows)
        if self.selector is None:
            self.sample(num_reqs, logits, keys)
        else:
            temperature = self.speculator.temperature[self.rows.slots[:num_reqs, 0]]
            self.select(self.selector, keys, rows, logits, self.from_start[:num_reqs], temperature)

    def sample(self, num_reqs: int, logits: torch.Tensor, keys: torch.Tensor) -> None:
        """logits [num_reqs * n, vocabulary] of the first n drafts; keys [num_reqs, n], of the draws.

        No key may come twice for a request.
        """
        num_drafts = keys.shape[1]
        if self.speculator.draft_logits is not None:
            # The rejection sampler divides by what these say. From nonsense it would make wrong text, from a row that
            # says nothing only rejections.
            logits.masked_fill_(~logits.sum(-1, keepdim=True, dtype=torch.float32).isfinite(), 0)
        sampled = self.speculator.sample_draft(
            logits,
            keys.flatten(),
            self.rows.slots[:num_reqs, :num_drafts].flatten(),
            self.speculator.temperature,
            self.speculator.seeds,
            self.columns[:num_reqs, :num_drafts].flatten(),
            self.speculator.draft_logits,
        )
        self.drafts[:num_reqs, :num_drafts] = sampled.view(num_reqs, -1)

    def select(
        self,
        selector: Selector,
        keys: torch.Tensor,
        hidden: torch.Tensor,
        logits: torch.Tensor,
        offset: torch.Tensor,
        temperature: torch.Tensor,
    ) -> Probable:
        """keys [num_reqs, n], of the draws; hidden and logits of n rows each, or n + 1 with those behind them last.

        offset [num_reqs]: the first of these rows, counted in its block; temperature [num_reqs]. Returns what was said
        of the drafts.
        """
        num_reqs, num_drafts = keys.shape
        slot = self.rows.slots[:num_reqs, 0]
        behind = len(hidden) > num_reqs * num_drafts
        said = likeliest(logits, behind, temperature, selector.shape.candidates)
        blocks = Blocks(slot, self.rows.input_ids[:num_reqs, 0], offset, temperature, selector.gates(hidden))
        kept = None
        if self.written is not None:
            kept = Kept(self.speculator.seeds, keys, self.speculator.draft_logits, self.written)
        return select(said, blocks, selector.tables, self.drafts[:num_reqs, :num_drafts], LOOKED_AT, kept)

    def warm_up(self, view: DiffusionView, widths: list[int]) -> None:
        """Launch what drafts of each width are chosen by. For nobody."""
        if self.selector is None:
            return
        rows = self.selector.gate.new_zeros(1, max(widths), self.selector.gate.shape[1])
        self.rows.clear()
        for width in widths:
            self.sample_block(1, rows[:, :width], view)
