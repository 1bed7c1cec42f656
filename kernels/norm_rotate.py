# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Norm and rotate queries and keys where their projection has put them, for both views at once, in one launch.

    q = rotate(q * q_weight / rms(q), position)      k likewise; both by head, in place
    cache[slot] = k, v                               of the autoregressive rows, where asked for

Each view has weights of its own. What has been normed is rounded to the rows' type, as where the two are apart; the
rotation of pairs (i, i + dim / 2) is computed in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_orthrus.kernels.forms import runs_triton
from vllm_orthrus.kernels.packed import require_packed

HEADS_AT_ONCE = 8


class Projected(NamedTuple):
    """The rows of one view, straight out of the projection of all three."""

    qkv: Tensor  # [rows, (q_heads + 2 * kv_heads) * dim]
    positions: Tensor  # [rows]
    q_weight: Tensor | None  # [dim]; None: no norm
    k_weight: Tensor | None  # [dim]


class Heads(NamedTuple):
    queries: int
    keys: int  # and as many for values
    dim: int


class CacheSlots(NamedTuple):
    """Where the first view's keys and values go, in any layout."""

    k: Tensor  # [num_pages, kv_heads, page, dim]
    v: Tensor  # [num_pages, kv_heads, page, dim]
    slots: Tensor  # [at most rows], page * size of a page + place; -1: nowhere. Rows beyond have none


def norm_rotate(
    views: tuple[Projected, ...],  # one or two, of the same type
    heads: Heads,
    cos_sin: Tensor,  # [positions, dim]: cosines, then sines
    eps: float,
    cache: CacheSlots | None = None,
) -> None:
    form = launch if runs_triton(cos_sin.device) else naive
    form(views, heads, cos_sin, eps, cache)


def naive(
    views: tuple[Projected, ...], heads: Heads, cos_sin: Tensor, eps: float, cache: CacheSlots | None = None
) -> None:
    for at, (qkv, positions, q_weight, k_weight) in enumerate(views):
        by_head = qkv.view(len(qkv), -1, heads.dim)
        q, k, v = by_head.split([heads.queries, heads.keys, heads.keys], dim=1)
        cos, sin = cos_sin[positions].float()[:, None].chunk(2, dim=-1)  # [rows, 1, dim / 2]
        for x, weight in ((q, q_weight), (k, k_weight)):
            rows = x
            if weight is not None:
                wide = x.float()
                normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
                rows = normed.to(x.dtype) * weight.to(x.dtype)
            first, second = rows.float().chunk(2, dim=-1)
            x.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
        if cache is not None and at == 0:
            kept = cache.slots >= 0
            slots, page = cache.slots[kept].long(), cache.k.shape[2]
            for stored, rows in ((cache.k, k), (cache.v, v)):
                stored[slots // page, :, slots % page] = rows[: len(kept)][kept].to(stored.dtype)


def launch(
    views: tuple[Projected, ...], heads: Heads, cos_sin: Tensor, eps: float, cache: CacheSlots | None = None
) -> None:
    first, second = views[0], views[1] if len(views) == 2 else None
    for view in views:
        require_packed(**view._asdict())
    require_packed(cos_sin=cos_sin, slots=None if cache is None else cache.slots)
    rows = sum(len(view.qkv) for view in views)
    num_heads = heads.queries + heads.keys * (1 if cache is None else 2)
    if rows == 0:
        return
    _norm_rotate_kernel[(rows, triton.cdiv(num_heads, HEADS_AT_ONCE))](
        first,
        first.qkv.stride(0),
        len(first.qkv),
        second,
        0 if second is None else second.qkv.stride(0),
        cos_sin,
        cos_sin.stride(0),
        eps,
        cache,
        0 if cache is None else len(cache.slots),
        (0,) * 4 if cache is None else cache.k.stride(),
        (0,) * 4 if cache is None else cache.v.stride(),
        TWO=second is not None,
        NORM=first.q_weight is not None,
        WRITE=cache is not None,
        QUERIES=heads.queries,
        KEYS=heads.keys,
        DIM=heads.dim,
        PAGE=1 if cache is None else cache.k.shape[2],
        AT_ONCE=HEADS_AT_ONCE,
        num_warps=2,
    )


# Compiled once for all numbers of rows.
@triton.jit(do_not_specialize=["rows_of_first", "num_slots"])
def _norm_rotate_kernel(
    first,
    first_stride,
    rows_of_first,
    second,
    second_stride,
    cos_sin,
    cos_sin_stride,
    eps,
    cache,
    num_slots,
    keys_strides,
    values_strides,
    TWO: tl.constexpr,
    NORM: tl.constexpr,
    WRITE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Program (r, g) does some heads of row r, of the first view's rows and then the second's."""
    HALF: tl.constexpr = DIM // 2
    r = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)  # queries, keys, and values where they are written
    qkv, positions = first.qkv + r * first_stride, first.positions + r
    q_weight, k_weight = first.q_weight, first.k_weight
    if TWO:
        own, row = r < rows_of_first, r - rows_of_first
        qkv = tl.where(own, qkv, second.qkv + row * second_stride)
        positions = tl.where(own, positions, second.positions + row)
        if NORM:
            q_weight = tl.where(own, q_weight, second.q_weight)
            k_weight = tl.where(own, k_weight, second.k_weight)
    i = tl.arange(0, HALF)
    is_query = head < QUERIES
    turns = head < QUERIES + KEYS
    exists = head < QUERIES + KEYS * (2 if WRITE else 1)
    at = qkv + (head * HALF * 2)[:, None] + i[None, :]  # [HEADS, HALF]
    a = tl.load(at, mask=exists[:, None], other=0.0)
    b = tl.load(at + HALF, mask=exists[:, None], other=0.0)
    x, y = a.to(tl.float32), b.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / (2 * HALF) + eps)[:, None]
        w = tl.where(is_query[:, None], tl.load(q_weight + i)[None, :], tl.load(k_weight + i)[None, :])
        x = (x * scale).to(a.dtype).to(tl.float32) * w.to(tl.float32)
        w = tl.load(k_weight + HALF + i)[None, :]
        w = tl.where(is_query[:, None], tl.load(q_weight + HALF + i)[None, :], w)
        y = (y * scale).to(a.dtype).to(tl.float32) * w.to(tl.float32)
        x, y = x.to(a.dtype).to(tl.float32), y.to(a.dtype).to(tl.float32)
    angle = cos_sin + tl.load(positions).to(tl.int64) * cos_sin_stride + i
    cos, sin = tl.load(angle).to(tl.float32)[None, :], tl.load(angle + HALF).to(tl.float32)[None, :]
    turned_a = (x * cos - y * sin).to(a.dtype)
    turned_b = (y * cos + x * sin).to(a.dtype)
    tl.store(at, turned_a, mask=turns[:, None])
    tl.store(at + HALF, turned_b, mask=turns[:, None])
    if WRITE:
        slot = tl.load(cache.slots + r, mask=r < num_slots, other=-1).to(tl.int64)
        page, place = slot // PAGE, slot % PAGE
        written = tl.where(slot >= 0, QUERIES + 2 * KEYS, 0)
        key = ((head < written) & turns & (head >= QUERIES))[:, None]
        of = page * keys_strides[0] + (head - QUERIES).to(tl.int64) * keys_strides[1] + place * keys_strides[2]
        of = cache.k + of[:, None] + i[None, :] * keys_strides[3]
        tl.store(of, turned_a.to(cache.k.dtype.element_ty), mask=key)
        tl.store(of + HALF * keys_strides[3], turned_b.to(cache.k.dtype.element_ty), mask=key)
        value = ((head < written) & (head >= QUERIES + KEYS))[:, None]
        of = page * values_strides[0] + (head - QUERIES - KEYS).to(tl.int64) * values_strides[1]
        of = cache.v + (of + place * values_strides[2])[:, None] + i[None, :] * values_strides[3]
        tl.store(of, a.to(cache.v.dtype.element_ty), mask=value)
        tl.store(of + HALF * values_strides[3], b.to(cache.v.dtype.element_ty), mask=value)
