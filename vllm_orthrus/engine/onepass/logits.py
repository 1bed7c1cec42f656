"""Logits of the rows that may come to draft, in the product that gives those of the verification.

vLLM computes a verification's logits behind its forward, and only then is its outcome known, by which drafts come from
the one block or the other. To read the vocabulary's projection once, all of their rows pass through it together:

    logits  = projection(concat(verification's rows, hypotheses' rows))      in vLLM's own call
    carried = those of the hypotheses, where a graph finds them
    kept    = those of the block at hand, by place                           take_rows.py, once the outcome is known

A block that has come of a draft pass, or of a verification whose logits were computed apart, has none that are kept:
its rows go through the next such product as well.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.distributed import tensor_model_parallel_all_gather

from vllm_orthrus.engine.costs import device_of, model_of
from vllm_orthrus.engine.onepass.memory import Memory
from vllm_orthrus.engine.onepass.rows import HypothesisRows
from vllm_orthrus.engine.settings import DraftShape
from vllm_orthrus.engine.vllm import InputBatch, VllmConfig
from vllm_orthrus.kernels.take_rows import take_rows
from vllm_orthrus.policy.cost import joins


def requests_joined(shape: DraftShape, vllm_config: VllmConfig) -> frozenset[int]:
    """The numbers of requests whose verification shares its product with its blocks."""
    how = vllm_config.speculative_config.orthrus_vocabulary
    carrying = [count for count in range(1, shape.most_carried + 1) if shape.num_hypotheses(count)]
    # There, each rank computes the logits of some requests, in a way of its own.
    if how == "twice" or vllm_config.parallel_config.enable_batch_sharded_sampling:
        return frozenset()
    if how == "once":
        return frozenset(carrying)
    device, model = device_of(), model_of(vllm_config)
    return frozenset(count for count in carrying if joins(device, model, shape.carrying(count)))


class JoinedLogits:
    """Takes the place of `compute_logits` in this instance of the target.

    What vLLM gets of it is computed from the rows that it gives, so no fault in here can change the text.
    """

    def __init__(
        self, target: Any, shape: DraftShape, memory: Memory, vllm_config: VllmConfig, device: torch.device
    ) -> None:
        self.target, self.shape, self.memory = target, shape, memory
        self.requests = requests_joined(shape, vllm_config)
        model = vllm_config.model_config
        self.project, width = target.compute_logits, model.get_vocab_size()
        self.vocabulary, self.sharded = width, vllm_config.parallel_config.tensor_parallel_size > 1
        if self.sharded:
            # What is taken is gathered, and not all that might be.
            width = target.lm_head.num_embeddings_per_partition
            self.project = partial(target.logits_processor, target.lm_head, skip_gather=True)
        blocks = max((count * shape.num_hypotheses(count) for count in self.requests), default=0)
        places = shape.most_carried + 1 if self.requests else 0
        like: dict[str, Any] = {"dtype": model.head_dtype, "device": device}
        self.carried = torch.zeros(blocks * shape.block, width, **like)
        self.kept = torch.zeros(places, shape.block, width, **like)
        self.known = np.zeros(shape.max_num_reqs, dtype=bool)  # by slot, on the host: what is kept is of its block
        self.awaited: HypothesisRows | None = None  # the next call is for the verification that carried these
        self.unknown: torch.Tensor | None = None  # [n] slots whose blocks' logits come with it
        if self.requests:
            target.compute_logits = lambda hidden: self.compute_logits(hidden)

    def expect(self, rows: HypothesisRows, batch: InputBatch) -> None:
        """The coming verification carries these rows."""
        slots = batch.idx_mapping_np[: batch.num_reqs]
        joined = len(rows.blocks.prefix_lengths) in self.requests
        if joined:
            known = self.known[slots].all()
            self.awaited = rows
            self.unknown = None if known else batch.idx_mapping[: batch.num_reqs]
        self.known[slots] = joined

    def compute_logits(self, hidden: torch.Tensor) -> Any:
        """[rows, vocabulary], as the target itself would."""
        rows, self.awaited = self.awaited, None
        if rows is None:
            return self.whole(self.project(hidden))
        parts, places = [hidden, rows.hidden], None
        if self.unknown is not None:
            places = self.memory.place[self.unknown]
            parts.append(self.memory.block_hidden[places].flatten(0, 1))
        logits = self.project(torch.cat(parts)).split([len(part) for part in parts])
        self.carried[: len(rows.hidden)] = logits[1]
        if places is not None:
            self.kept[places] = logits[2].view(-1, *self.kept.shape[1:])
        return self.whole(logits[0])

    def take(self, num_reqs: int, which: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """[n * K + n, vocabulary] of the rows that draft next, in the order of `Memory.rows`."""
        hypotheses, block = self.shape.num_hypotheses(num_reqs), self.shape.block
        carried = self.carried[: num_reqs * hypotheses * block].view(num_reqs, hypotheses, block, -1)
        place, offset = self.memory.place, self.memory.slots.offset
        return self.whole(take_rows(carried, which, slot, place, offset, self.kept, self.shape.drafts))

    def whole(self, logits: torch.Tensor) -> torch.Tensor:
        """Of all ranks."""
        if not self.sharded:
            return logits
        return tensor_model_parallel_all_gather(logits)[:, : self.vocabulary]  # type: ignore[no-any-return]
