"""Sampling drafts, by vLLM's own sampler for drafts."""

import torch

from vllm_orthrus.engine.draft_rows import DraftRows
from vllm_orthrus.engine.settings import DraftShape
from vllm_orthrus.engine.view import DiffusionView
from vllm_orthrus.engine.vllm import DraftModelSpeculator


class DraftSampler:
    """Samples with the temperatures and seeds that the speculator holds, into a buffer that a graph may write."""

    def __init__(self, speculator: DraftModelSpeculator, shape: DraftShape, rows: DraftRows) -> None:
        self.speculator, self.shape, self.rows = speculator, shape, rows
        room, device = rows.capacity, rows.input_ids.device
        self.drafts = torch.zeros(room, shape.drafts, dtype=torch.int64, device=device)
        self.columns = torch.arange(shape.drafts, dtype=torch.int32, device=device).repeat(room, 1)

    def sample_block(
        self, num_reqs: int, hidden: torch.Tensor, view: DiffusionView, keys: torch.Tensor | None = None
    ) -> None:
        """From the rows of a draft pass [num_reqs, block, hidden]. Keys, if not given: the positions of the rows."""
        drafting = hidden[:, : self.shape.drafts]
        keys = self.rows.positions[:num_reqs] if keys is None else keys
        self.sample(num_reqs, view.compute_logits(drafting.flatten(0, 1)), keys[:, : drafting.shape[1]])

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
