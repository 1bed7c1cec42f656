"""Where the keys and values of one of the target's layers lie in its paged cache."""

from typing import Any

import torch

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
