"""What the dual-view attention is given: as callers have it, and as its kernels take it."""

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_orthrus.kernels.packed import require_packed


class PagedCache(NamedTuple):
    """One layer's cache. Any physical layout: only strides say how pages, heads, slots and dimensions are ordered."""

    keys: Tensor  # [num_pages, kv_heads, page, dim]
    values: Tensor  # [num_pages, kv_heads, page, dim]
    block_table: Tensor  # [num_reqs, max_blocks] int32, of blocks that hold one or more pages
    block_size: int  # positions per block of the table, a multiple of the page
    k_scale: Tensor | None = None  # [] or [1] or [kv_heads] float32: what a stored key is worth
    v_scale: Tensor | None = None


class Verification(NamedTuple):
    """Rows that see the cache alone. They take part in the same launch, so the prefix is read once for all rows."""

    q: Tensor  # [rows, q_heads, dim]
    lengths: Tensor  # [rows] int32 or int64, position + 1; negative: no such row
    width: int  # the most rows any request has
    out: Tensor  # [rows, q_heads, dim]
    starts: Tensor | None = None  # [num_reqs + 1] int32, each request's first row; None: `width` rows each


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, cache: PagedCache, num_blocks: int, verification: Verification | None
) -> None:
    kv_heads, page, head_dim = cache.keys.shape[1:]
    problems = {
        f"cache of {cache.keys.dtype}: view its bytes as the fp8 type they hold": cache.keys.dtype == torch.uint8,
        f"{q.shape[0]} rows do not make {num_blocks} blocks": num_blocks == 0 or q.shape[0] % max(num_blocks, 1),
        f"q of {tuple(q.shape)} over keys of {tuple(cache.keys.shape)}": q.shape[1] % kv_heads
        or q.shape[2] != head_dim,
        f"k of {tuple(k.shape)} and v of {tuple(v.shape)} beside q of {tuple(q.shape)}": k.shape != v.shape
        or k.shape != (q.shape[0], kv_heads, head_dim),
        f"values of {tuple(cache.values.shape)} and {cache.values.dtype} beside keys of "
        f"{tuple(cache.keys.shape)} and {cache.keys.dtype}": cache.values.shape != cache.keys.shape
        or cache.values.dtype != cache.keys.dtype,
        f"head_dim={head_dim}: must be a power of two from 16 to 256": head_dim not in (16, 32, 64, 128, 256),
        f"block_size={cache.block_size}: must be a multiple of the page of {page}": cache.block_size % page,
        "rows must be contiguous in their last dimension": any(
            x.stride(-1) != 1 for x in (q, k, v, *((verification.q, verification.out) if verification else ()))
        ),
        "scales must have one element or one for each key-value head": any(
            s is not None and s.numel() not in (1, kv_heads) for s in (cache.k_scale, cache.v_scale)
        ),
        "the block table must be contiguous along each request": cache.block_table.stride(1) != 1,
    }
    for problem, present in problems.items():
        if present:
            raise ValueError(f"dual_view_attention: {problem}")
    require_packed(k_scale=cache.k_scale, v_scale=cache.v_scale)
    if verification:
        require_packed(lengths=verification.lengths, starts=verification.starts, verify_out=verification.out)


# The arguments of the kernels: tensors, and the strides from one row, head and so on to the next, in elements. No field
# may be named like an attribute of Triton's own tuples, as `values` is.


class Rows(NamedTuple):
    """Which rows there are, and how much of the prefix each sees."""

    lengths: Tensor
    verify_lengths: Tensor | None
    verify_starts: Tensor | None
    lengths_req: int
    lengths_block: int


class Fresh(NamedTuple):
    """The queries, keys and values of the rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    verify_q: Tensor | None
    q_row: int
    q_head: int
    k_row: int
    k_head: int
    v_row: int
    v_head: int
    verify_q_row: int
    verify_q_head: int


class Cached(NamedTuple):
    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    k_page: int
    k_head: int
    k_slot: int
    k_dim: int
    v_page: int
    v_head: int
    v_slot: int
    v_dim: int


class Out(NamedTuple):
    """Where results go, and those of splits before they are merged."""

    data: Tensor
    verify: Tensor | None
    partial: Tensor | None
    lse: Tensor | None
    active: Tensor | None
    row: int
    head: int
    verify_row: int
    verify_head: int


class Shape(NamedTuple):
    """Constants of a compiled kernel: the rows of a request."""

    groups: int  # query heads that share a key-value head
    dim: int
    block: int  # rows of a block
    blocks: int  # of a request
    verify: int  # the most verification rows of a request
    ragged: bool  # a request may have fewer


class Layout(NamedTuple):
    """Constants of a compiled kernel: the cache."""

    page: int
    block_size: int  # positions per block of the table
    same_strides: bool  # of keys and values
    k_scales: int  # none, one for all heads, or one each
    v_scales: int
