"""Attention of the diffusion view: a block of fresh rows over the target's cached prefix and over itself.

Every implementation answers the same call: for each layer, given the block's q, k and v, return what the rows see in
(a) the target's cache of that layer, positions before the anchor, and (b) all of the block, in both directions. None
may write to positions the target will read before it overwrites them.
"""

from abc import ABC, abstractmethod
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


class BlocksAlone(BlockAttention):
    """Blocks that see only themselves: before there is a cache, vLLM runs a draft to measure what memory it needs."""

    supports_graphs = False

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


class GatherAttention(BlockAttention):
    """Plain PyTorch: gather each prefix out of the cache, then attend densely.

    Its cost follows the longest prefix of the batch and it moves that prefix for every layer, so it is for CPUs and
    for checking other implementations.
    """

    supports_graphs = False

    def __init__(self, layers: list[CachedLayer]) -> None:
        self.layers = layers

    def begin(self, blocks: Blocks, capturing: bool = False) -> ForwardInputs:
        self._blocks = blocks
        self._pages: dict[tuple[int, int, int], torch.Tensor] = {}
        self._masks: dict[int, torch.Tensor] = {}
        return ForwardInputs()

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        attn = self.layers[layer].attn
        num_reqs, dim = self._blocks.prefix_lengths.shape[0], attn.head_size

        def by_request(x: torch.Tensor) -> torch.Tensor:
            return x.view(num_reqs, -1, x.shape[-1] // dim, dim).transpose(1, 2)  # [num_reqs, heads, block, dim]

        queries, keys, values = by_request(q), by_request(k), by_request(v)
        rows, length = keys.shape[2], 0
        if self._blocks.longest:
            prefix_keys, prefix_values = self._gather(self.layers[layer])
            length = prefix_keys.shape[2]
            keys = torch.cat([prefix_keys, keys], dim=2)
            values = torch.cat([prefix_values, values], dim=2)
        mask = self._mask(length, rows)
        out = scaled_dot_product_attention(queries, keys, values, mask, scale=attn.impl.scale, enable_gqa=True)
        return out.transpose(1, 2).reshape(q.shape)

    def _gather(self, layer: CachedLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first `longest` positions, rounded up to pages: [num_reqs, kv_heads, length, dim]."""
        keys, values = cached_keys_values(layer.attn)  # [num_pages, kv_heads, page, dim]
        pages = self._page_table(layer, keys.shape[2])
        num_reqs, num_pages = pages.shape

        def gather(cached: torch.Tensor) -> torch.Tensor:
            picked = cached[pages].transpose(1, 2)  # [num_reqs, kv_heads, pages, page, dim]
            return picked.reshape(num_reqs, cached.shape[1], num_pages * cached.shape[2], cached.shape[3])

        return gather(keys), gather(values)

    def _page_table(self, layer: CachedLayer, page: int) -> torch.Tensor:
        """The pages that hold each prefix [num_reqs, pages]: the manager's blocks, split as this cache splits them."""
        key = (layer.group, layer.block_size, page)
        if key not in self._pages:
            split = layer.block_size // page
            num_blocks = -(-self._blocks.longest // layer.block_size)
            blocks = self._blocks.block_tables[layer.group][:, :num_blocks].long()  # [num_reqs, num_blocks]
            pages = blocks[:, :, None] * split + torch.arange(split, device=blocks.device)
            self._pages[key] = pages.flatten(1)
        return self._pages[key]

    def _mask(self, length: int, rows: int) -> torch.Tensor:
        """Seen by rows [num_reqs, 1, rows or 1, length + rows]: the prefix before their anchor, and their block."""
        if length not in self._masks:
            lengths = self._blocks.prefix_lengths  # [num_reqs, H]
            in_prefix = torch.arange(length, device=lengths.device) < lengths[..., None]  # [num_reqs, H, length]
            count = lengths.shape[1]
            if count > 1:
                in_prefix = in_prefix.repeat_interleave(rows // count, dim=1)  # [num_reqs, rows, length]
            block = torch.arange(rows, device=lengths.device) // (rows // count)
            in_block = block == block[:: rows if count == 1 else 1, None]  # [rows or 1, rows]
            self._masks[length] = torch.cat([in_prefix, in_block.expand(len(lengths), -1, -1)], dim=2)[:, None]
        return self._masks[length]


# Backends that keep keys and values of one head side by side, so that strides say everything about the layout.
READABLE = ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER", "FLEX_ATTENTION", "CPU_ATTN")
PLAIN = ("auto", "float16", "bfloat16", "float32")


def packed(attn: Any) -> str | None:
    """Why strides do not say where this layer's keys and values are, or None."""
    backend = attn.attn_backend.get_name()
    if backend not in READABLE:
        return f"attention backend {backend} keeps its cache in a form of its own"
    if backend == "CPU_ATTN" and (attn.kv_cache_dtype not in PLAIN or attn.isa not in ("vec", "vec16")):
        return "this CPU's attention packs its cache for matrix tiles"
    return None


def ungatherable(layer: CachedLayer) -> str | None:
    """Why `GatherAttention` cannot read this layer's cache, or None."""
    if layer.attn.kv_cache_dtype not in PLAIN:
        return f"kv_cache_dtype={layer.attn.kv_cache_dtype} is quantized"
    return packed(layer.attn)


def cached_keys_values(attn: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a layer's cache as keys and values [num_pages, kv_heads, page, dim], whatever its physical order."""
    cache, dim = attn.kv_cache, attn.head_size
    if attn.attn_backend.get_name() != "CPU_ATTN":
        keys, values = cache.split(dim, dim=-1)
        return keys, values
    # The CPU backend keeps, per page and head, all keys and then all values, and its vector kernels want the keys
    # with the positions innermost.
    num_pages, heads, page, _ = cache.shape
    keys, values = cache.view(num_pages, heads, 2, page * dim).unbind(2)
    keys = keys.view(num_pages, heads, dim, page).transpose(2, 3)
    return keys, values.view(num_pages, heads, page, dim)
