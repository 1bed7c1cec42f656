"""Attention of the diffusion view: a block of fresh rows over the target's cached prefix and over itself.

Every implementation answers the same call: for each layer, given the block's q, k and v, return what the rows see in
(a) the target's cache of that layer, positions before the anchor, and (b) all of the block, in both directions. None
may write to positions the target will read before it overwrites them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention


class Blocks(NamedTuple):
    """The blocks of one draft pass, or the hypotheses beside one verification: H blocks for each request.

    Tensors are views of buffers that stay where they are, so a graph may read them.
    """

    positions: torch.Tensor  # [num_reqs, H * block]
    prefix_lengths: torch.Tensor  # [num_reqs, H], positions before each anchor; 0 or less where there is no block
    block_tables: list[torch.Tensor]  # per cache group [num_reqs, max_blocks]; all zeros on padded rows
    longest: int  # an upper bound on prefix_lengths that the host knows; 0 while there is no cache


class ForwardInputs(NamedTuple):
    """What vLLM's forward context must hold while the view runs, for paths through vLLM's own attention layers."""

    attn_metadata: dict[str, Any] | None = None
    slot_mapping: dict[str, torch.Tensor] | None = None


class CachedLayer(NamedTuple):
    """One target attention layer and how the manager addresses its cache."""

    attn: Any  # vllm Attention: its cache is looked up at run time because it is bound, and rebound, late
    group: int
    block_size: int  # tokens per block of the block table, which the cache may split further


class BlockAttention(ABC):
    """One attention call per layer of one draft pass."""

    supports_graphs: bool
    takes_any_width = False  # blocks of fewer rows than the widest
    groups: Sequence[Any] = ()  # vLLM's attention groups, where it attends through vLLM's own layers

    @property
    def most_graph_rows(self) -> int | None:
        """Of one draft pass; None: as many as there are."""
        return None

    @abstractmethod
    def begin(self, blocks: Blocks, capturing: bool = False) -> ForwardInputs:
        """Prepare a draft pass over these blocks. Not part of a captured graph, and run before each replay."""

    @abstractmethod
    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [rows, heads * dim], k and v [rows, kv_heads * dim] of all blocks, in order; returns q's shape."""

    def into(self, out: torch.Tensor, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """The same, and it stands in `out` then."""
        out.copy_(self(layer, q, k, v))


class BlocksAlone(BlockAttention):
    """Blocks that see only themselves: before there is a cache, vLLM runs a draft to measure what memory it needs."""

    supports_graphs = False
    takes_any_width = True

    def __init__(self, attn: list[Any]) -> None:
        self.attn = attn

    def begin(self, blocks: Blocks, capturing: bool = False) -> ForwardInputs:
        self.num_reqs = len(blocks.prefix_lengths)
        return ForwardInputs()

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        attn = self.attn[layer]
        queries, keys, values = (
            x.view(self.num_reqs, -1, x.shape[1] // attn.head_size, attn.head_size) for x in (q, k, v)
        )
        out = scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            scale=attn.impl.scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2).reshape(q.shape)
