"""What one-pass drafting remembers of each request from one step to the next, by slot and on the device."""

import torch

from vllm_orthrus.engine.settings import DraftShape
from vllm_orthrus.engine.vllm import ModelConfig
from vllm_orthrus.kernels.choose import choose_hypotheses
from vllm_orthrus.kernels.hypotheses import NONE, Hypotheses, count_covered
from vllm_orthrus.kernels.match import match_outcome
from vllm_orthrus.kernels.most_probable import most_probable
from vllm_orthrus.kernels.prepare_hypotheses import Remembered
from vllm_orthrus.policy import chances


class HypothesisState:
    """For each slot: the newest block at hand, the drafts taken from it, and the hypotheses about their fate.

    Slot -1 stands for rows of a graph that no request fills. There is one place more than requests, so what is written
    there is nobody's. All of it stays where it is in memory and nothing is read back, as a graph demands.

    Hidden states are what takes memory, and far fewer requests than there are slots can have hypotheses at a time: they
    lie in as many places as that, and each slot says which place is its own.
    """

    COUNTERS = ("verifications", "hits", "accepted_count_missed", "bonus_missed", "tokens", "rows")

    def __init__(self, shape: DraftShape, model: ModelConfig, device: torch.device) -> None:
        self.shape = shape
        num_drafts, hypotheses = shape.drafts, shape.hypotheses

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape.max_num_reqs + 1, *size, dtype=dtype, device=device)

        self.places_of_blocks = torch.arange(shape.most_carried + 1, device=device)
        self.place = zeros() + shape.most_carried  # the last is nobody's
        newest = (len(self.places_of_blocks), shape.block, model.get_hidden_size())
        self.block_hidden = torch.zeros(newest, dtype=model.dtype, device=device)  # of the newest block, by place
        self.offset = zeros()  # its row that predicts what follows the anchor
        self.anchor_position = zeros() - 1  # where the next verification must start for any of this to apply
        self.accepted = zeros(hypotheses) + NONE
        self.token = zeros(hypotheses)
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
        self.values = chances.block_values(shape.block, shape.drafting_rows, hypotheses, device)
        self.places = torch.arange(places, device=device)
        self.counters = torch.zeros(len(self.COUNTERS), dtype=torch.int64, device=device)

    def remembered(self) -> Remembered:
        return Remembered(self.anchor_position, self.accepted, self.token)

    def begin(self, slot: torch.Tensor, block_hidden: torch.Tensor, new: torch.Tensor) -> None:
        """A separate draft pass has given these requests a block, and no other request has one any more.

        block_hidden [n, block, hidden]; new [n]: a first. There are at most `most_carried` of them.
        """
        place = torch.where(slot >= 0, self.places_of_blocks[: len(slot)], self.shape.most_carried)
        self.place[slot] = place
        self.block_hidden[place] = block_hidden
        self.offset[slot] = 0
        for part in self.history:
            part[slot] = torch.where(new, 0, part[slot])

    def settle(
        self,
        slot: torch.Tensor,
        prefix_lengths: torch.Tensor,
        hidden: torch.Tensor,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
    ) -> None:
        """Verification has spoken: take up the newest block it made useful.

        prefix_lengths [n, H] as the rows had them; hidden [n, H, block, hidden]; num_sampled [n], 0 where there is no
        request; last_sampled [n], the bonus.
        """
        count = prefix_lengths.shape[1]
        accepted = torch.where(prefix_lengths >= 0, self.accepted[slot, :count], NONE)
        hypotheses = Hypotheses(accepted, self.token[slot, :count])
        drafts = chances.Drafts(*(part[slot] for part in self.drafts))
        # The scheduler may have dropped some, at the context limit or for a grammar: those were not judged.
        drafts = drafts._replace(real=torch.minimum(drafts.real, num_sampled + num_rejected - 1))
        match = match_outcome(hypotheses, drafts.tokens, num_sampled, last_sampled, self.offset[slot])
        found = match.which >= 0
        chosen = hidden[torch.arange(len(slot), device=slot.device), match.which.clamp(min=0)]  # [n, block, hidden]
        place = self.place[slot]
        self.block_hidden[place] = torch.where(found[:, None, None], chosen, self.block_hidden[place])
        self.offset[slot] = match.offset

        hit = found & (match.offset == 0)
        covered = count_covered(hypotheses, drafts.tokens, drafts.real, num_sampled - 1)
        rows = num_sampled + num_rejected + self.shape.block * count  # those of the verification, and the hypotheses'
        counted = (torch.ones_like(hit), hit, ~hit & ~covered, ~hit & covered, num_sampled, rows)
        self.counters += (torch.stack([part.long() for part in counted]) * (num_sampled > 0)).sum(1)
        history = chances.History(*(part[slot] for part in self.history))
        calibration, history = chances.update_calibration(
            self.calibration, history, drafts, self.sampled[slot], num_sampled, last_sampled
        )
        for part, new in zip(self.calibration, calibration, strict=True):
            part.copy_(new)
        for part, new in zip(self.history, history, strict=True):
            part[slot] = new

    def drafting(self, slot: torch.Tensor) -> torch.Tensor:
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
        count = chances.draft_count(offset, self.shape.drafts, self.shape.drafting_rows)
        sampled = temperature > 0
        said = most_probable(logits, drafts, temperature, chances.LOOKED_AT)
        described = chances.describe_drafts(said, drafts, count, offset, self.shape.block)
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
