"""How a layer attends with the rows of a verification and with the hypothesis rows beside them.

Either way the keys and values of the verification rows are in the cache before a hypothesis row looks at it. Where
`joined` is told that it knows the target's attention, it makes queries, keys and values of all rows and takes their
results; elsewhere the target's own code does for the verification rows.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch

from vllm_orthrus.engine.attention.blocks import BlockAttention, Blocks, CachedLayer
from vllm_orthrus.engine.attention.kernel import KernelAttention, unreadable
from vllm_orthrus.engine.onepass import joined
from vllm_orthrus.engine.target_attention import answered_by, attend_to_cache, beyond_plain_softmax, write_to_cache
from vllm_orthrus.engine.vllm import InputBatch, VllmConfig
from vllm_orthrus.kernels.dual_view_attention import Verification


class OnePassAttention(ABC):
    """One call per layer of a forward with hypotheses."""

    def __init__(self, blocks: BlockAttention, join: bool, paired: frozenset[int] = frozenset()) -> None:
        self.blocks = blocks  # how hypotheses attend
        self.join = join  # both views' projections
        self.paired = paired  # numbers of requests for which one product is quicker than one for each view
        self.supports_graphs = blocks.supports_graphs

    @abstractmethod
    def prepare(self, batch: InputBatch) -> None:
        """Learn what the rows of this batch's verification see. Run before a graph is replayed, and not part of it."""

    @abstractmethod
    def clear(self) -> None:
        """The coming verification has no rows: a graph captures it, or it only warms something up."""

    def nothing(self, num_reqs: int) -> Verification | None:
        """Verification rows of nobody, where they share a launch with hypotheses. After `clear`."""
        return None

    def begin(self, blocks: Blocks) -> None:
        """A forward with these hypotheses starts."""
        self.pair = len(blocks.prefix_lengths) in self.paired
        self.blocks.begin(blocks)

    @abstractmethod
    def __call__(
        self,
        layer: int,
        target: Any,  # the target's attention in this layer, projections included
        diffusion: Any,  # the view's
        positions: tuple[torch.Tensor, torch.Tensor],  # of verification rows, of hypothesis rows
        hidden: torch.Tensor,  # [rows of both, hidden], those of the verification first
    ) -> torch.Tensor:
        """Returns hidden's shape."""


class BackendVerification(OnePassAttention):
    """vLLM's attention takes the verification rows, ours the hypotheses: each reads the prefix."""

    def prepare(self, batch: InputBatch) -> None:
        """vLLM's attention has metadata of its own."""

    def clear(self) -> None:
        """Nothing to clear: vLLM makes metadata for each forward."""

    def __call__(
        self,
        layer: int,
        target: Any,
        diffusion: Any,
        positions: tuple[torch.Tensor, torch.Tensor],
        hidden: torch.Tensor,
    ) -> torch.Tensor:
        if self.join:
            rows, fresh = joined.project(target, diffusion, positions, hidden, self.pair)
            attended = joined.Attended(target, diffusion, rows, fresh, self.pair)
            attend_to_cache(target.attn, *rows, attended.verified)
            self.blocks.into(attended.drafted, layer, *fresh)
            return attended.results()
        split = len(positions[0])
        verified = target(positions=positions[0], hidden_states=hidden[:split])
        drafted = diffusion(positions[1], hidden[split:], target.rotary_emb, self.blocks, layer)
        return torch.cat([verified, drafted])


class FusedVerification(OnePassAttention):
    """One launch of our kernel takes all rows and reads each prefix once.

    What the rows see stands in buffers, where a captured launch finds it. Requests may have fewer rows than `width`;
    those that only fill up a graph have rows of length -1, which cost nothing and come out as zeros.
    """

    blocks: KernelAttention

    def __init__(self, blocks: KernelAttention, max_num_reqs: int, join: bool, paired: frozenset[int]) -> None:
        super().__init__(blocks, join, paired)
        self.width = blocks.verified
        rows, device = max_num_reqs * self.width, blocks.workspace.device
        self.uniform = torch.arange(0, rows + 1, self.width, dtype=torch.int32, device=device)
        self.starts = self.uniform.clone()  # [max_num_reqs + 1], each request's first row
        self.lengths = torch.full((rows,), -1, dtype=torch.int32, device=device)  # position + 1

    def prepare(self, batch: InputBatch) -> None:
        num_reqs, num_tokens = batch.num_reqs, batch.num_tokens
        padded_reqs, padded_tokens = batch.num_reqs_after_padding, batch.num_tokens_after_padding
        if padded_tokens > len(self.lengths):  # it reads prompts, so it carries no hypotheses
            return
        self.starts[: num_reqs + 1] = batch.query_start_loc[: num_reqs + 1]
        torch.add(batch.positions[:num_tokens], 1, out=self.lengths[:num_tokens])
        if padded_reqs > num_reqs:
            self.starts[num_reqs + 1 : padded_reqs + 1] = self.uniform[num_reqs + 1 : padded_reqs + 1]
            self.lengths[num_tokens:padded_tokens] = -1

    def clear(self) -> None:
        self.starts.copy_(self.uniform)
        self.lengths.fill_(-1)

    def nothing(self, num_reqs: int) -> Verification:
        attn, rows = self.blocks.layers[0].attn, num_reqs * self.width
        q = torch.zeros(rows, attn.num_heads, attn.head_size, dtype=attn.dtype, device=self.lengths.device)
        return Verification(q, self.lengths, self.width, torch.empty_like(q), self.starts[: num_reqs + 1])

    def begin(self, blocks: Blocks) -> None:
        super().begin(blocks)
        self.num_reqs = len(blocks.prefix_lengths)

    def __call__(
        self,
        layer: int,
        target: Any,
        diffusion: Any,
        positions: tuple[torch.Tensor, torch.Tensor],
        hidden: torch.Tensor,
    ) -> torch.Tensor:
        if self.join:
            rows, fresh = joined.project(target, diffusion, positions, hidden, self.pair)
            attended = joined.Attended(target, diffusion, rows, fresh, self.pair)
            self._attend(layer, rows[0], fresh, attended.verified, attended.drafted)
            return attended.results()
        split, attn = len(positions[0]), target.attn
        fresh = diffusion.project(positions[1], hidden[split:], target.rotary_emb)
        drafted: torch.Tensor | None = None

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            nonlocal drafted
            write_to_cache(attn, key, value)
            verified, drafted = (q.new_empty(q.shape) for q in (query, fresh[0]))
            self._attend(layer, query, fresh, verified, drafted)
            return verified

        with answered_by(attn, attend):
            verified = target(positions=positions[0], hidden_states=hidden[:split])
        assert drafted is not None, "the target has not asked for its attention"
        drafted, _ = diffusion.o_proj(drafted)
        return torch.cat([verified, drafted])

    def _attend(
        self,
        layer: int,
        query: torch.Tensor,
        fresh: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        verified: torch.Tensor,
        drafted: torch.Tensor,
    ) -> None:
        """Fill in what the verification's rows see, whose keys and values the cache has, and the hypotheses' rows."""
        dim = self.blocks.layers[layer].attn.head_size

        def by_head(x: torch.Tensor) -> torch.Tensor:
            return x.view(len(x), -1, dim)

        starts = self.starts[: self.num_reqs + 1]
        rows = Verification(by_head(query), self.lengths, self.width, by_head(verified), starts)
        self.blocks.into(drafted, layer, *fresh, rows)


def refuse_unfusable(vllm_config: VllmConfig, layers: list[CachedLayer]) -> None:
    for layer in layers:
        problem = unreadable(layer) or beyond_plain_softmax(vllm_config, layer.attn)
        if problem:
            raise ValueError(
                f"orthrus_verification='fused' cannot stand in for the attention of {layer.attn.layer_name}: "
                f"{problem}. Set orthrus_verification to 'backend'."
            )
