"""Two passes: after each verification, a draft pass over every request's newest token."""

import torch

from vllm_orthrus.engine.drafting import Drafting, HostInts, Sampled, Turn
from vllm_orthrus.engine.graphs import OutcomeGraphs
from vllm_orthrus.engine.sampler import DraftSampler
from vllm_orthrus.engine.settings import DraftShape
from vllm_orthrus.engine.view import DiffusionView
from vllm_orthrus.engine.vllm import InputBatch


class TwoPasses(Drafting):
    def __init__(self, view: DiffusionView, shape: DraftShape, sampler: DraftSampler, local_argmax: bool) -> None:
        """local_argmax: each rank finds the likeliest token of its part of the vocabulary, and logits stay apart."""
        self.view, self.shape, self.sampler, self.local_argmax = view, shape, sampler, local_argmax

    def keep(self, num_reqs: int, hidden: torch.Tensor) -> None:
        if self.local_argmax:
            drafting = hidden[:, : self.shape.drafts]
            found = self.view.get_top_tokens(drafting.flatten(0, 1)).view(num_reqs, -1)
            self.sampler.drafts[:num_reqs, : found.shape[1]] = found
            return
        self.sampler.sample_block(num_reqs, hidden, self.view)

    def finish(self, num_reqs: int, turn: Turn) -> None:
        """The pass has sampled already."""

    def take_up(self, batch: InputBatch, sampled: Sampled, graphs: OutcomeGraphs | None) -> bool:
        return False

    def forget(self, slots: HostInts, reading: HostInts) -> None:
        """Nothing is remembered."""

    def warm_up(self, batch: InputBatch) -> None:
        """vLLM samples; nothing here is a kernel of ours."""

    def counts(self) -> None:
        return None
