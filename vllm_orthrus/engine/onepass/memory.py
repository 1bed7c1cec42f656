"""What one-pass drafting remembers of each request from one step to the next, by slot and on the device."""

from typing import Any

import numpy as np
import torch

from vllm_orthrus.engine.onepass.rows import HypothesisRows
from vllm_orthrus.engine.settings import DraftShape
from vllm_orthrus.engine.vllm import ModelConfig
from vllm_orthrus.kernels import chances
from vllm_orthrus.kernels.choose import Drafted, choose
from vllm_orthrus.kernels.hypotheses import NONE
from vllm_orthrus.kernels.most_probable import Probable
from vllm_orthrus.kernels.slots import Remembered, Slots
from vllm_orthrus.kernels.take_rows import take_rows
from vllm_orthrus.kernels.take_up import COUNTERS, Outcome, take_up


class Memory:
    """For each slot: the newest block at hand, the drafts taken from it, and the hypotheses about their outcome.

    Slot -1 stands for rows of a graph that no request fills. There is one place more than requests, so what is written
    there is nobody's. All of it stays where it is in memory and nothing is read back, as a graph demands; only the host
    notes which slots are up to date.

    Hidden states are what takes memory, and far fewer requests than there are slots can have hypotheses at a time: they
    lie in as many places as that, and each slot says which place is its own.
    """

    def __init__(self, shape: DraftShape, model: ModelConfig, device: torch.device) -> None:
        self.shape = shape
        num_drafts, num_hypotheses = shape.drafts, shape.hypotheses

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape.max_num_reqs + 1, *size, dtype=dtype, device=device)

        self.places_of_blocks = torch.arange(shape.most_carried + 1, device=device)
        self.place = zeros() + shape.most_carried  # the last is nobody's
        newest = (len(self.places_of_blocks), shape.block, model.get_hidden_size())
        self.block_hidden = torch.zeros(newest, dtype=model.dtype, device=device)  # of the newest block, by place
        places, candidates = num_drafts + 1, chances.CANDIDATES
        self.slots = Slots(
            offset=zeros(),
            sampled=zeros(dtype=torch.bool),
            hypotheses=Remembered(zeros() - 1, zeros(num_hypotheses) + NONE, zeros(num_hypotheses)),
            drafts=chances.Drafts(
                tokens=zeros(num_drafts),
                real=zeros(),
                offset=zeros(),
                confidence=zeros(num_drafts, dtype=torch.float32),
                candidates=zeros(places, candidates),
                share=zeros(places, candidates, dtype=torch.float32),
            ),
            history=chances.new_history(shape.max_num_reqs + 1, device),
            calibration=chances.new_calibration(device),
        )
        self.values = chances.block_values(shape.block, shape.drafting_rows, num_hypotheses, device)
        self.counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)
        # By slot, on the host.
        self.current = np.zeros(shape.max_num_reqs, dtype=bool)
        self.new = np.ones(shape.max_num_reqs, dtype=bool)  # what was learnt here is of another request

    # Whether it applies

    def ready(self, slots: np.ndarray[Any, Any]) -> bool:
        """Whether all that is remembered of these slots is about the step that is being taken."""
        return bool(self.current[slots].all())

    def forget(self, slots: np.ndarray[Any, Any]) -> None:
        self.current[slots] = False

    def keep_only(self, slots: np.ndarray[Any, Any]) -> None:
        """These have a block from a pass of its own, and places for blocks are taken anew: no other slot has one."""
        self.current[:] = False
        self.current[slots] = True

    def meet(self, slots: np.ndarray[Any, Any], num_reqs: int) -> np.ndarray[Any, Any]:
        """[num_reqs] bool: which of these have a block for the first time. Rows behind them are nobody's."""
        new = np.ones(num_reqs, dtype=bool)
        new[: len(slots)] = self.new[slots]
        self.new[slots] = False
        return new

    # Before a verification

    def remembered(self) -> Remembered:
        return self.slots.hypotheses

    # Behind it

    def begin(self, slot: torch.Tensor, block_hidden: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """A draft pass has given these requests a block, and no other request has one any more.

        block_hidden [n, block, hidden]; new [n]: a first. There are at most `most_carried` of them. Returns the rows
        that draft, as `rows` does.
        """
        self.place[slot] = torch.where(slot >= 0, self.places_of_blocks[: len(slot)], self.shape.most_carried)
        first = torch.zeros_like(slot)
        self.slots.offset[slot] = first  # the number itself would be copied to the device, and waited for
        for part in self.slots.history:
            part[slot] = torch.where(new, 0, part[slot])
        return self._take_rows(block_hidden[:, None], first, slot)

    def match(self, rows: HypothesisRows, outcome: Outcome) -> torch.Tensor:
        """[n] the newest block that the outcome has made useful; -1: none. Learns from the outcome."""
        return take_up(outcome, rows.blocks.prefix_lengths, self.slots, self.counters, self.shape.block)

    def rows(self, rows: HypothesisRows, which: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """Take these blocks to hand.

        Returns hidden states [n * K + n, hidden] of the rows that draft next, and behind them of the row behind each.
        """
        by_block = rows.hidden.view(*rows.blocks.prefix_lengths.shape, self.shape.block, -1)
        return self._take_rows(by_block, which, slot)

    def _take_rows(self, hidden: torch.Tensor, which: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        return take_rows(hidden, which, slot, self.place, self.slots.offset, self.block_hidden, self.shape.drafts)

    def choose(self, drafted: Drafted, said: Probable) -> None:
        """Decide which hypotheses the next verification carries, from what the rows that draft have said."""
        choose(drafted, said, self.values, self.slots, self.shape.drafting_rows, self.shape.block)
