"""What one-pass drafting remembers of each request from one step to the next, by slot and on the device."""

from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_orthrus.engine.onepass.rows import HypothesisRows
from vllm_orthrus.engine.settings import DraftShape
from vllm_orthrus.engine.vllm import ModelConfig
from vllm_orthrus.kernels.choose import choose_hypotheses
from vllm_orthrus.kernels.hypotheses import NONE, Hypotheses, count_covered
from vllm_orthrus.kernels.match import match_outcome
from vllm_orthrus.kernels.most_probable import most_probable
from vllm_orthrus.kernels.prepare_hypotheses import Remembered
from vllm_orthrus.policy import chances


class Outcome(NamedTuple):
    """Of a verification. Rows of a graph that no request fills have slot -1 and have sampled nothing."""

    slot: torch.Tensor  # [n]
    num_sampled: torch.Tensor  # [n], accepted drafts plus the bonus
    num_rejected: torch.Tensor  # [n]
    bonus: torch.Tensor  # [n]


class Memory:
    """For each slot: the newest block at hand, the drafts taken from it, and the hypotheses about their outcome.

    Slot -1 stands for rows of a graph that no request fills. There is one place more than requests, so what is written
    there is nobody's. All of it stays where it is in memory and nothing is read back, as a graph demands; only the host
    notes which slots are up to date.

    Hidden states are what takes memory, and far fewer requests than there are slots can have hypotheses at a time: they
    lie in as many places as that, and each slot says which place is its own.
    """

    COUNTERS = ("verifications", "hits", "accepted_count_missed", "bonus_missed", "tokens", "rows")

    def __init__(self, shape: DraftShape, model: ModelConfig, device: torch.device) -> None:
        self.shape = shape
        num_drafts, num_hypotheses = shape.drafts, shape.hypotheses

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape.max_num_reqs + 1, *size, dtype=dtype, device=device)

        self.places_of_blocks = torch.arange(shape.most_carried + 1, device=device)
        self.place = zeros() + shape.most_carried  # the last is nobody's
        newest = (len(self.places_of_blocks), shape.block, model.get_hidden_size())
        self.block_hidden = torch.zeros(newest, dtype=model.dtype, device=device)  # of the newest block, by place
        self.offset = zeros()  # its row that predicts what follows the anchor
        self.anchor_position = zeros() - 1  # where the next verification must start for any of this to apply
        self.accepted = zeros(num_hypotheses) + NONE
        self.token = zeros(num_hypotheses)
        places, candidates = num_drafts + 1, chances.CANDIDATES
        self.drafts = chances.Drafts(
            tokens=zeros(num_drafts),
            real=zeros(),
            offset=zeros(),
            confidence=zeros(num_drafts, dtype=torch.float32),
            candidates=zeros(places, candidates),
            share=zeros(places, candidates, dtype=torch.float32),
        )
        self.sampled = zeros(dtype=torch.bool)
        self.history = chances.new_history(shape.max_num_reqs + 1, device)
        self.calibration = chances.new_calibration(device)
        self.values = chances.block_values(shape.block, shape.drafting_rows, num_hypotheses, device)
        self.places = torch.arange(places, device=device)
        self.counters = torch.zeros(len(self.COUNTERS), dtype=torch.int64, device=device)
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
        return Remembered(self.anchor_position, self.accepted, self.token)

    # Behind it

    def begin(self, slot: torch.Tensor, block_hidden: torch.Tensor, new: torch.Tensor) -> None:
        """A draft pass has given these requests a block, and no other request has one any more.

        block_hidden [n, block, hidden]; new [n]: a first. There are at most `most_carried` of them.
        """
        place = torch.where(slot >= 0, self.places_of_blocks[: len(slot)], self.shape.most_carried)
        self.place[slot] = place
        self.block_hidden[place] = block_hidden
        self.offset[slot] = 0
        for part in self.history:
            part[slot] = torch.where(new, 0, part[slot])

    def match(self, rows: HypothesisRows, outcome: Outcome) -> None:
        """Take the newest block that the outcome has made useful, and learn from the outcome."""
        slot, num_sampled = outcome.slot, outcome.num_sampled
        prefix_lengths = rows.blocks.prefix_lengths  # [n, H]
        num_reqs, num_hypotheses = prefix_lengths.shape
        accepted = torch.where(prefix_lengths >= 0, self.accepted[slot, :num_hypotheses], NONE)
        hypotheses = Hypotheses(accepted, self.token[slot, :num_hypotheses])
        drafts = chances.Drafts(*(part[slot] for part in self.drafts))
        # The scheduler may have dropped some, at the context limit or for a grammar: those were not judged.
        drafts = drafts._replace(real=torch.minimum(drafts.real, num_sampled + outcome.num_rejected - 1))
        match = match_outcome(hypotheses, drafts.tokens, num_sampled, outcome.bonus, self.offset[slot])
        found = match.which >= 0
        hidden = rows.hidden.view(num_reqs, num_hypotheses, self.shape.block, -1)
        chosen = hidden[torch.arange(num_reqs, device=slot.device), match.which.clamp(min=0)]  # [n, block, hidden]
        place = self.place[slot]
        self.block_hidden[place] = torch.where(found[:, None, None], chosen, self.block_hidden[place])
        self.offset[slot] = match.offset

        hit = found & (match.offset == 0)
        covered = count_covered(hypotheses, drafts.tokens, drafts.real, num_sampled - 1)
        self._count(outcome, hit, covered, num_hypotheses)
        self._learn(outcome, drafts)

    def _count(self, outcome: Outcome, hit: torch.Tensor, covered: torch.Tensor, num_hypotheses: int) -> None:
        """covered [n]: some hypothesis had the right number of accepted drafts."""
        num_sampled = outcome.num_sampled
        rows = num_sampled + outcome.num_rejected + self.shape.block * num_hypotheses
        counted = (torch.ones_like(hit), hit, ~hit & ~covered, ~hit & covered, num_sampled, rows)  # as in COUNTERS
        self.counters += (torch.stack([part.long() for part in counted]) * (num_sampled > 0)).sum(1)

    def _learn(self, outcome: Outcome, drafts: chances.Drafts) -> None:
        slot = outcome.slot
        history = chances.History(*(part[slot] for part in self.history))
        calibration, history = chances.update_calibration(
            self.calibration, history, drafts, self.sampled[slot], outcome.num_sampled, outcome.bonus
        )
        for part, new in zip(self.calibration, calibration, strict=True):
            part.copy_(new)
        for part, new in zip(self.history, history, strict=True):
            part[slot] = new

    def rows_at_hand(self, slot: torch.Tensor) -> torch.Tensor:
        """Hidden states of the rows that draft next, and of the one behind them: [n, K + 1, hidden]."""
        rows = (self.offset[slot][:, None] + self.places).clamp(max=self.shape.block - 1)  # [n, K + 1]
        return self.block_hidden[self.place[slot][:, None], rows]

    def choose(
        self,
        slot: torch.Tensor,
        anchor_position: torch.Tensor,
        anchor: torch.Tensor,
        logits: torch.Tensor,
        drafts: torch.Tensor,
        temperature: torch.Tensor,
    ) -> None:
        """Decide which hypotheses the next verification carries. logits [n, K + 1, vocabulary]; drafts [n, K]."""
        offset = self.offset[slot]
        num_drafts = chances.draft_count(offset, self.shape.drafts, self.shape.drafting_rows)
        sampled = temperature > 0
        said = most_probable(logits, drafts, temperature, chances.LOOKED_AT)
        described = chances.describe_drafts(said, drafts, num_drafts, offset, self.shape.block)
        history = chances.History(*(part[slot] for part in self.history))
        chosen = choose_hypotheses(
            chances.outcome_chances(self.calibration, history, described, sampled),
            chances.bonus_chances(self.calibration, described, sampled),
            described.candidates,
            drafts,
            anchor,
            offset,
            self.values,
            self.shape.hypotheses,
        )
        for part, new in zip(self.drafts, described, strict=True):
            part[slot] = new
        self.accepted[slot], self.token[slot] = chosen.accepted, chosen.token
        self.sampled[slot] = sampled
        self.anchor_position[slot] = anchor_position
