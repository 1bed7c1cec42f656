"""What the loop asks of a way to draft. There are two: `twopass.py` and `onepass/drafting.py`.

Both sample their drafts into the same buffer, from the rows of a block. They differ in where the block comes from:

    two passes   verify -> draft pass over [bonus, MASK, ...] -> sample
    one pass     verify, with the blocks of likely outcomes beside it -> match the outcome -> sample -> choose the next

One pass, too, needs a draft pass where no verification has carried a block: behind prompts and in large batches.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_orthrus.engine.graphs import OutcomeGraphs
from vllm_orthrus.engine.vllm import InputBatch

HostInts = np.ndarray[Any, Any]


class Sampled(NamedTuple):
    """The outcome of a verification, as vLLM hands it over."""

    num_sampled: torch.Tensor  # [num_reqs], accepted drafts plus the bonus; 0 within a prompt
    num_rejected: torch.Tensor  # [num_reqs]
    last_sampled: torch.Tensor  # [max_num_reqs, 1], by slot
    next_prefill_tokens: torch.Tensor  # [lookahead, max_num_reqs], by slot


class Turn(NamedTuple):
    """Requests that share a draft pass."""

    slots: HostInts  # [n]; none in a dummy run
    together: int  # requests that draft in this step, in this turn or another
    drafts: int  # that are wanted of each


def read_prompts(batch: InputBatch) -> HostInts:
    """[num_reqs] bool: which requests read their prompt in this step."""
    reading: HostInts = batch.num_computed_tokens_np[: batch.num_reqs] < batch.prefill_len_np[: batch.num_reqs]
    return reading


class Drafting(ABC):
    carried = False  # the verification that ran last had blocks beside it

    @abstractmethod
    def keep(self, num_reqs: int, hidden: torch.Tensor) -> None:
        """A draft pass has these hidden states [num_reqs, block, hidden]. Part of its graph."""

    @abstractmethod
    def finish(self, num_reqs: int, turn: Turn) -> None:
        """Behind a draft pass, and not part of its graph. Then its drafts are sampled, if they were not already."""

    @abstractmethod
    def take_up(self, batch: InputBatch, sampled: Sampled, graphs: OutcomeGraphs | None) -> bool:
        """Sample drafts for all of the batch from blocks that its verification carried. False if some have none."""

    def informed(self, of: HostInts, slots: torch.Tensor, places: torch.Tensor) -> torch.Tensor | None:
        """[n] bool: which of the drafts at hand come from rows that knew the token before them all. None: each.

        slots, places [n]: whose drafts, and which of theirs; of: the slots, on the host.
        """
        return None

    @abstractmethod
    def forget(self, slots: HostInts, reading: HostInts) -> None:
        """Nothing that is remembered of these slots applies to their next verification.

        reading [n] bool: their prompt is being read, so not even what was learnt applies: it was of another request.
        """

    def lasting(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is on the device from one step to the next."""
        return iter(())

    @abstractmethod
    def warm_up(self, batch: InputBatch) -> None:
        """Launch every form of a kernel that this way to draft may launch."""

    @abstractmethod
    def counts(self) -> dict[str, int] | None:
        """What was counted since the start, without waiting for the device; None if there is nothing to count."""
