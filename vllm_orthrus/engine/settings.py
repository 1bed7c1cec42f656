"""The numbers that an engine's drafts are made of: fixed when it starts, and the same for all who build on them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_orthrus.policy.cost import Forward, blocks_beside

# A draft pass of this many rows keeps a GPU busy for longer than the host needs to launch it, so larger batches lose
# nothing by drafting in turns, and their logits, hidden states and graphs need no more memory than this.
MAX_PASS_ROWS = 2048


@dataclass(frozen=True)
class DraftShape:
    block: int  # rows of a draft block
    drafts: int  # K, those that are verified
    drafting_rows: int  # rows of a block that were taught to predict
    mask_token_id: int
    hypotheses: int  # H, the most blocks of a request beside a verification
    rows: int  # the most rows of a forward that carries hypotheses
    max_num_reqs: int  # requests that hold a slot
    max_pass_rows: int  # of a draft pass
    modes: tuple[int, ...] = ()  # numbers of drafts that a step may make, where they change

    @classmethod
    def of(cls, vllm_config: Any) -> "DraftShape":
        config, scheduler = vllm_config.speculative_config, vllm_config.scheduler_config
        table = config.num_speculative_tokens_per_batch_size or ()
        return cls(
            config.orthrus_block_size,
            config.num_speculative_tokens,
            config.orthrus_drafting_rows,
            config.orthrus_mask_token_id,
            config.orthrus_hypotheses,
            min(config.orthrus_rows, scheduler.max_num_batched_tokens),
            scheduler.max_num_seqs,
            # vLLM sizes its profile run, compiled ranges and workspaces for max_num_batched_tokens rows.
            min(MAX_PASS_ROWS, scheduler.max_num_batched_tokens),
            tuple(config.orthrus_modes or (drafts for _, _, drafts in table)),
        )

    @property
    def verified(self) -> int:
        """Rows of a request's verification: the anchor and its drafts."""
        return self.drafts + 1

    @property
    def widths(self) -> list[int]:
        """Rows of a block in a draft pass, the widest last: one for each draft where fewer than all are wanted."""
        return sorted({self.block, *(drafts for drafts in self.modes if 0 < drafts < self.drafts)})

    @property
    def at_once(self) -> int:
        """Requests that draft in one pass."""
        return min(self.max_num_reqs, max(1, self.max_pass_rows // self.block))

    def num_hypotheses(self, num_reqs: int) -> int:
        """How many blocks per request ride along with the verification of this many requests."""
        return blocks_beside(num_reqs, self.rows, self.verified, self.block, self.hypotheses)

    def carrying(self, num_reqs: int) -> Forward:
        """A verification of so many requests with their hypotheses, all of whose drafts are wanted."""
        return Forward(num_reqs, 0, self.verified, self.block * self.num_hypotheses(num_reqs), self.verified)

    @cached_property
    def most_carried(self) -> int:
        """The most requests whose verification carries hypotheses; 0 if there is no room for any."""
        return next((count for count in range(self.max_num_reqs, 0, -1) if self.num_hypotheses(count)), 0)

    @property
    def most_blocks(self) -> int:
        """Of all requests beside one verification."""
        return max((count * self.num_hypotheses(count) for count in range(1, self.most_carried + 1)), default=0)
