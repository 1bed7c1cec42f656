"""Plain PyTorch: gather each prefix out of the cache, then attend densely."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from vllm_orthrus.engine.attention.blocks import BlockAttention, Blocks, CachedLayer, ForwardInputs
from vllm_orthrus.engine.attention.cache import PLAIN, cached_keys_values, packed


class GatherAttention(BlockAttention):
    """Its cost follows the longest prefix of the batch, which it moves for every layer: for CPUs, and as a check."""

    supports_graphs = False
    takes_any_width = True

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
            return x.view(num_reqs, -1, x.shape[-1] // dim, dim).transpose(1, 2)  # [num_reqs, heads, rows, dim]

        keys, values = by_request(k), by_request(v)
        kv_heads, rows, length = *keys.shape[1:3], 0
        # All query heads of a key's head at once: fewer and larger products.
        queries = by_request(q).reshape(num_reqs, kv_heads, -1, dim)  # [num_reqs, kv_heads, group * rows, dim]
        if self._blocks.longest:
            prefix_keys, prefix_values = self._gather(self.layers[layer])
            length = prefix_keys.shape[2]
            keys = torch.cat([prefix_keys, keys], dim=2)
            values = torch.cat([prefix_values, values], dim=2)
        mask = self._mask(length, rows, queries.shape[2] // rows)
        out = scaled_dot_product_attention(queries, keys, values, mask, scale=attn.impl.scale)
        return out.view(num_reqs, -1, rows, dim).transpose(1, 2).reshape(q.shape)

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

    def _mask(self, length: int, rows: int, group: int) -> torch.Tensor:
        """Seen by rows [num_reqs, 1, group * rows or 1, length + rows]: the prefix before their anchor, their block."""
        if length not in self._masks:
            lengths = self._blocks.prefix_lengths  # [num_reqs, H]
            in_prefix = torch.arange(length, device=lengths.device) < lengths[..., None]  # [num_reqs, H, length]
            per_request = lengths.shape[1]
            if per_request > 1:
                in_prefix = in_prefix.repeat_interleave(rows // per_request, dim=1)  # [num_reqs, rows, length]
            block = torch.arange(rows, device=lengths.device) // (rows // per_request)
            in_block = block == block[:: rows if per_request == 1 else 1, None]  # [rows or 1, rows]
            seen = torch.cat([in_prefix, in_block.expand(len(lengths), -1, -1)], dim=2)[:, None]
            self._masks[length] = seen if per_request == 1 else seen.repeat(1, 1, group, 1)
        return self._masks[length]


def ungatherable(layer: CachedLayer) -> str | None:
    """Why `GatherAttention` cannot read this layer's cache, or None."""
    if layer.attn.kv_cache_dtype not in PLAIN:
        return f"kv_cache_dtype={layer.attn.kv_cache_dtype} is quantized"
    return packed(layer.attn)
