"""Attention of both views over one paged cache, in one launch.

    out[i] = softmax(scale * q[i] @ [K_cache[:n_i], K_block(i)].T) @ [V_cache[:n_i], V_block(i)]

A row i is a query token that sees the first n_i cached positions of its request and, if it belongs to a block, all rows
of that block in both directions, whose keys and values exist only as activations:

    block row of a draft or a hypothesis   n = positions before the block's anchor, and the block itself
    verification row at position t         n = t + 1 (its own key and value were just written), and no block

The rows of one request times the query heads that share a key-value head form one matrix of M rows, so each program
reads a stretch of the prefix once for all of them. The prefix is cut into a fixed number of splits whose *share* of the
prefix is worked out on the device: the grid, and with it a CUDA graph, never depends on a length. A second kernel
merges the splits in a fixed order, so results are the same from run to run.

This file launches the kernels and holds their `naive` twin; the kernels stand in dual_view_device.py, and how the work
is cut up in dual_view_plan.py.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vllm_orthrus.kernels import dual_view_device as device
from vllm_orthrus.kernels.dual_view_plan import Plan, Tiles, make_plan, workspace_size
from vllm_orthrus.kernels.packed import require_packed

__all__ = ["PagedCache", "Plan", "Tiles", "Verification", "dual_view_attention", "make_plan", "naive", "workspace_size"]

# Left alone, NVIDIA's assembler would rather spill a little than give up a third program per multiprocessor, for which
# there is no shared memory anyway.
REGISTERS = {} if torch.version.hip else {"maxnreg": 255}


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


def dual_view_attention(
    q: Tensor,  # [num_reqs * blocks * width, q_heads, dim], block by block
    k: Tensor,  # [num_reqs * blocks * width, kv_heads, dim]
    v: Tensor,
    cache: PagedCache,
    prefix_lengths: Tensor,  # [num_reqs] or [num_reqs, blocks] int32; negative: no such block, its rows become zero
    scale: float,
    out: Tensor | None = None,
    plan: Plan | None = None,
    verification: Verification | None = None,
) -> Tensor:
    """Attend with the rows of all blocks, and with verification rows if there are any; returns `out`, shaped like q."""
    if prefix_lengths.dim() == 1:
        prefix_lengths = prefix_lengths[:, None]
    num_reqs, blocks = prefix_lengths.shape
    num_rows, q_heads, head_dim = q.shape
    kv_heads, page = cache.keys.shape[1:3]
    width = num_rows // (num_reqs * blocks)
    out = torch.empty_like(q) if out is None else out
    check_inputs(q, k, v, cache, num_reqs * blocks, verification)
    require_packed(out=out, k_scale=cache.k_scale, v_scale=cache.v_scale)
    if verification:
        require_packed(lengths=verification.lengths, starts=verification.starts, verify_out=verification.out)
    verify_width = verification.width if verification else 0
    rows_per_request = verify_width + blocks * width
    if plan is None:
        plan = make_plan(num_reqs, rows_per_request, q_heads, kv_heads, head_dim, q.dtype, cache.keys.dtype, q.device)
    tiles = plan.tiles
    rows = {
        "lengths": prefix_lengths,
        "lengths_req": prefix_lengths.stride(0),
        "lengths_block": prefix_lengths.stride(1),
        "verify_lengths": verification.lengths if verification else None,
        "verify_starts": verification.starts if verification else None,
        "GQA": q_heads // kv_heads,
        "DIM": head_dim,
        "BLOCK": width,
        "BLOCKS": blocks,
        "VERIFY": verify_width,
        "RAGGED": verification is not None and verification.starts is not None,
        "splits": plan.splits,
        "SPLIT": plan.splits > 1,
        "TILE_M": tiles.rows,
    }
    outputs = {
        "out": out,
        "out_row": out.stride(0),
        "out_head": out.stride(1),
        "verify_out": verification.out if verification else None,
        "verify_out_row": verification.out.stride(0) if verification else 0,
        "verify_out_head": verification.out.stride(1) if verification else 0,
        "partial": plan.partial,
        "lse": plan.lse,
        "active": plan.active,
    }
    device.attend[(plan.num_tiles * kv_heads, plan.splits, num_reqs)](
        q,
        k,
        v,
        verification.q if verification else None,
        cache.keys,
        cache.values,
        cache.block_table,
        cache.k_scale,
        cache.v_scale,
        scale * 1.4426950408889634,  # exp(x) = exp2(x log2(e))
        cache.block_table.shape[1],
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        verification.q.stride(0) if verification else 0,
        verification.q.stride(1) if verification else 0,
        *cache.keys.stride(),
        *cache.values.stride(),
        cache.block_table.stride(0),
        **rows,
        **outputs,
        NUM_TILES=plan.num_tiles,
        PAGE=page,
        MANAGER=cache.block_size,
        SAME_STRIDES=cache.keys.stride() == cache.values.stride(),
        K_SCALES=_scales(cache.k_scale),
        V_SCALES=_scales(cache.v_scale),
        TILE_N=tiles.positions,
        TILE_C=min(64, max(16, triton.next_power_of_2(width if blocks == 1 else blocks * width))),
        WIDEN=q.device.type == "cpu",
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **REGISTERS,
        enable_fp_fusion=True,  # said, because Triton's default changes
    )
    if plan.splits > 1:
        together = min(32, triton.next_power_of_2(plan.splits))
        elements = 2**18 if q.device.type == "cpu" else 2**12  # interpreted: few, large steps
        at_once = min(tiles.rows, max(1, elements // (together * head_dim)))
        grouped_rows = rows_per_request * (q_heads // kv_heads)
        device.merge[(triton.cdiv(grouped_rows, at_once), kv_heads, num_reqs)](
            **rows,
            **outputs,
            NUM_TILES=plan.num_tiles,
            TILE_R=at_once,
            TILE_S=together,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


def _scales(scale: Tensor | None) -> int:
    """How many scales there are: none, one for all heads, or one each."""
    return 0 if scale is None else scale.numel()


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


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: PagedCache,
    prefix_lengths: Tensor,
    scale: float,
    verification: Verification | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor | None]:
    """The same, row group by row group and densely, in `dtype`: the block rows, then the verification rows if any."""
    if prefix_lengths.dim() == 1:
        prefix_lengths = prefix_lengths[:, None]
    num_reqs, blocks = prefix_lengths.shape
    width = q.shape[0] // (num_reqs * blocks)
    kv_heads, page = cache.keys.shape[1:3]
    groups = q.shape[1] // kv_heads
    lengths = prefix_lengths.tolist()

    def prefix(req: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first positions [kv_heads, length, dim], as they were before they were quantized."""
        positions = torch.arange(length, device=q.device)
        slots = cache.block_table[req].long()[positions // cache.block_size] * cache.block_size
        slots += positions % cache.block_size
        read = []
        for stored, factor in ((cache.keys, cache.k_scale), (cache.values, cache.v_scale)):
            kept = stored.view(torch.uint8) if stored.element_size() == 1 else stored  # fp8 has no indexing
            rows = kept[slots // page, :, slots % page].view(stored.dtype).to(dtype)  # [length, kv_heads, dim]
            read.append((rows if factor is None else rows * factor.to(dtype).view(-1, 1)).transpose(0, 1))
        return read[0], read[1]

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """queries [rows, q_heads, dim] over keys and values [kv_heads, n, dim]; nothing to see gives zero."""
        if keys.shape[1] == 0:
            return torch.zeros_like(queries, dtype=dtype)
        folded = queries.to(dtype).transpose(0, 1).unflatten(0, (kv_heads, groups))  # [kv_heads, groups, rows, dim]
        weights = torch.softmax(folded @ keys[:, None].transpose(2, 3) * scale, dim=-1)
        return (weights @ values[:, None]).flatten(0, 1).transpose(0, 1)

    out = torch.zeros_like(q, dtype=dtype)
    for req in range(num_reqs):
        for block in range(blocks):
            if lengths[req][block] >= 0:
                first = (req * blocks + block) * width
                rows = slice(first, first + width)
                keys, values = prefix(req, lengths[req][block])
                keys = torch.cat([keys, k[rows].to(dtype).transpose(0, 1)], dim=1)
                values = torch.cat([values, v[rows].to(dtype).transpose(0, 1)], dim=1)
                out[rows] = attend(q[rows], keys, values)
    if verification is None:
        return out, None
    verified = torch.zeros_like(verification.q, dtype=dtype)
    starts = [req * verification.width for req in range(num_reqs + 1)]
    if verification.starts is not None:
        starts = verification.starts.tolist()
    visible = verification.lengths.tolist()
    for req in range(num_reqs):
        for row in range(starts[req], starts[req + 1]):
            if visible[row] >= 0:
                verified[row] = attend(verification.q[row : row + 1], *prefix(req, visible[row]))[0]
    return out, verified
