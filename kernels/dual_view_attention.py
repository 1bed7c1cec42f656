# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Attention of both views over one paged cache, in one launch.

    out[i] = softmax(scale * q[i] @ [K_cache[:n_i], K_block(i)].T) @ [V_cache[:n_i], V_block(i)]

A row i is a query token that sees the first n_i cached positions of its request and, if it belongs to a block, all rows
of that block in both directions, whose keys and values exist only as activations:

    block row of a draft or a hypothesis   n = positions before the block's anchor, and the block itself
    verification row at position t         n = t + 1 (its own key and value were just written), and no block

The rows of one request times the query heads that share a key-value head form one matrix of M rows, so each program
reads a stretch of the prefix once for all of them. The prefix is cut into a fixed number of splits whose *share* of the
prefix is worked out on the device: the grid, and with it a CUDA graph, never depends on a length. A second kernel
merges the splits in a fixed order, so results are the same from run to run. dual_view_plan.py says how the work is cut
up, dual_view_inputs.py what is passed.

For each tile of rows, online softmax over the columns it sees (scores s carry a factor log2 e, so that exp is exp2):

    m' = max(m, max s)    l' = l 2^(m - m') + sum 2^(s - m')    o' = o 2^(m - m') + 2^(s - m') V

and for splits with results o_i / l_i and lse_i = m_i + log2 l_i:   out = sum 2^lse_i (o_i / l_i) / sum 2^lse_i.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_orthrus.kernels.dual_view_inputs import (
    Cached,
    Fresh,
    Layout,
    Out,
    PagedCache,
    Rows,
    Shape,
    Verification,
    check_inputs,
)
from vllm_orthrus.kernels.dual_view_plan import Plan, Tiles, make_plan, workspace_size
from vllm_orthrus.kernels.forms import REGISTERS, runs_triton
from vllm_orthrus.kernels.packed import require_packed

__all__ = [
    "PagedCache",
    "Plan",
    "Tiles",
    "Verification",
    "dual_view_attention",
    "launch",
    "make_plan",
    "naive",
    "workspace_size",
]


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
    form = launch if runs_triton(q.device, chosen=True) else naive
    return form(q, k, v, cache, prefix_lengths, scale, out, plan, verification)


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: PagedCache,
    prefix_lengths: Tensor,
    scale: float,
    out: Tensor | None = None,
    plan: Plan | None = None,
    verification: Verification | None = None,
) -> Tensor:
    """Row group by row group and densely, in float64. Nothing is cut up, so a plan makes no difference."""
    out = torch.empty_like(q) if out is None else out
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
            rows = kept[slots // page, :, slots % page].view(stored.dtype).double()  # [length, kv_heads, dim]
            read.append((rows if factor is None else rows * factor.double().view(-1, 1)).transpose(0, 1))
        return read[0], read[1]

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """queries [rows, q_heads, dim] over keys and values [kv_heads, n, dim]; nothing to see gives zero."""
        if keys.shape[1] == 0:
            return torch.zeros_like(queries, dtype=torch.float64)
        folded = queries.double().transpose(0, 1).unflatten(0, (kv_heads, groups))  # [kv_heads, groups, rows, dim]
        weights = torch.softmax(folded @ keys[:, None].transpose(2, 3) * scale, dim=-1)
        return (weights @ values[:, None]).flatten(0, 1).transpose(0, 1)

    out.zero_()
    for req in range(num_reqs):
        for block in range(blocks):
            if lengths[req][block] >= 0:
                first = (req * blocks + block) * width
                rows = slice(first, first + width)
                keys, values = prefix(req, lengths[req][block])
                keys = torch.cat([keys, k[rows].double().transpose(0, 1)], dim=1)
                values = torch.cat([values, v[rows].double().transpose(0, 1)], dim=1)
                out[rows] = attend(q[rows], keys, values)
    if verification is None:
        return out
    starts = [req * verification.width for req in range(num_reqs + 1)]
    if verification.starts is not None:
        starts = verification.starts.tolist()
    visible = verification.lengths.tolist()
    verification.out[starts[0] : starts[-1]] = 0
    for req in range(num_reqs):
        for row in range(starts[req], starts[req + 1]):
            if visible[row] >= 0:
                verification.out[row] = attend(verification.q[row : row + 1], *prefix(req, visible[row]))[0]
    return out


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: PagedCache,
    prefix_lengths: Tensor,
    scale: float,
    out: Tensor | None = None,
    plan: Plan | None = None,
    verification: Verification | None = None,
) -> Tensor:
    if prefix_lengths.dim() == 1:
        prefix_lengths = prefix_lengths[:, None]
    num_reqs, blocks = prefix_lengths.shape
    num_rows, q_heads, head_dim = q.shape
    kv_heads, page = cache.keys.shape[1:3]
    width = num_rows // (num_reqs * blocks)
    out = torch.empty_like(q) if out is None else out
    check_inputs(q, k, v, cache, num_reqs * blocks, verification)
    require_packed(out=out)
    verify_width = verification.width if verification else 0
    rows_per_request = verify_width + blocks * width
    if plan is None:
        plan = make_plan(num_reqs, rows_per_request, q_heads, kv_heads, head_dim, q.dtype, cache.keys.dtype, q.device)
    tiles = plan.tiles
    verify_q, verify_lengths, _, verify_out, verify_starts = verification or (None, None, 0, None, None)
    rows = Rows(prefix_lengths, verify_lengths, verify_starts, *prefix_lengths.stride())
    fresh = Fresh(q, k, v, verify_q, *_strides(q), *_strides(k), *_strides(v), *_strides(verify_q))
    k_strides, v_strides = cache.keys.stride(), cache.values.stride()
    cached = Cached(cache.keys, cache.values, cache.k_scale, cache.v_scale, *k_strides, *v_strides)
    outputs = Out(out, verify_out, plan.partial, plan.lse, plan.active, *_strides(out), *_strides(verify_out))
    shape = Shape(
        groups=q_heads // kv_heads,
        dim=head_dim,
        block=width,
        blocks=blocks,
        verify=verify_width,
        ragged=verify_starts is not None,
    )
    layout = Layout(
        page,
        cache.block_size,
        same_strides=k_strides == v_strides,
        k_scales=0 if cache.k_scale is None else cache.k_scale.numel(),
        v_scales=0 if cache.v_scale is None else cache.v_scale.numel(),
    )
    _attend_kernel[(plan.num_tiles * kv_heads, plan.splits, num_reqs)](
        rows,
        fresh,
        cached,
        cache.block_table,
        cache.block_table.stride(0),
        cache.block_table.shape[1],
        outputs,
        plan.splits,
        scale * 1.4426950408889634,  # exp(x) = exp2(x log2(e))
        SHAPE=shape,
        LAYOUT=layout,
        SPLIT=plan.splits > 1,
        NUM_TILES=plan.num_tiles,
        TILE_M=tiles.rows,
        TILE_N=tiles.positions,
        TILE_C=min(64, max(16, triton.next_power_of_2(width if blocks == 1 else blocks * width))),
        WIDEN=q.device.type == "cpu",
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **REGISTERS,
        enable_fp_fusion=True,  # whatever the default of a Triton is
    )
    if plan.splits > 1:
        together = min(32, triton.next_power_of_2(plan.splits))
        elements = 2**18 if q.device.type == "cpu" else 2**12  # interpreted: few, large steps
        at_once = min(tiles.rows, max(1, elements // (together * head_dim)))
        _merge_kernel[(triton.cdiv(rows_per_request * shape.groups, at_once), kv_heads, num_reqs)](
            rows,
            outputs,
            plan.splits,
            SHAPE=shape,
            NUM_TILES=plan.num_tiles,
            TILE_M=tiles.rows,
            TILE_R=at_once,
            TILE_S=together,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


def _strides(rows: Tensor | None) -> tuple[int, int]:
    """Of rows and heads; the dimensions of a head lie side by side."""
    return (0, 0) if rows is None else (rows.stride(0), rows.stride(1))


# Compiled once for all numbers of splits and widths of a block table.
@triton.jit(do_not_specialize=["splits", "table_row", "table_width"])
def _attend_kernel(
    rows,
    fresh,
    cached,
    table,
    table_row,
    table_width,
    out,
    splits,
    scale,
    SHAPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    SPLIT: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_C: tl.constexpr,
    WIDEN: tl.constexpr,
):
    DIM: tl.constexpr = SHAPE.dim  # in a list of sizes, older Tritons take no field of a tuple
    # Tiles of the same stretch of prefix run next to each other, so that the L2 cache serves all but the first.
    tile = tl.program_id(0) % NUM_TILES
    kv_head = tl.program_id(0) // NUM_TILES
    split = tl.program_id(1)
    req = tl.program_id(2)
    own, place, length, in_block, verifies = _tile_rows(req, tile, rows, SHAPE, TILE_M)
    length = tl.minimum(length, table_width * LAYOUT.block_size)  # a wrong length must not read past the table
    longest = tl.max(length, 0)
    shortest = tl.min(tl.where(length < 0, longest, length), 0)  # rows that do not exist may compute anything

    # The fresh rows [first, last) of this request that any row of this tile sees.
    last_own = ((tile + 1) * TILE_M - 1) // SHAPE.groups - SHAPE.verify
    first = tl.maximum(tile * TILE_M // SHAPE.groups - SHAPE.verify, 0) // SHAPE.block * SHAPE.block
    last = tl.minimum((last_own // SHAPE.block + 1) * SHAPE.block, SHAPE.blocks * SHAPE.block)
    if (last_own < 0) | (longest < 0):
        last = first

    steps = tl.cdiv(tl.maximum(longest, 0), TILE_N)
    share = tl.cdiv(steps, splits)  # steps per split
    used = tl.cdiv(steps, tl.maximum(share, 1))  # splits that have a part of the prefix
    fresh_split = tl.minimum(used, splits - 1)  # takes the fresh rows: the first without prefix, or the last
    if SPLIT:
        holding = tl.where(last > first, fresh_split + 1, used)
        if split == 0:
            tl.store(out.active + (req * tl.num_programs(0) + tl.program_id(0)), holding)
        if split >= holding:
            return

    m = tile * TILE_M + tl.arange(0, TILE_M)
    head = kv_head * SHAPE.groups + m % SHAPE.groups  # [TILE_M]
    dims = tl.arange(0, DIM)
    q_at = fresh.q + (place.to(tl.int64) * fresh.q_row + head * fresh.q_head)[:, None] + dims[None, :]
    q = tl.load(q_at, mask=in_block[:, None], other=0.0)  # [TILE_M, dim]
    if SHAPE.verify > 0:
        q_at = place.to(tl.int64) * fresh.verify_q_row + head * fresh.verify_q_head
        q_at = fresh.verify_q + q_at[:, None] + dims[None, :]
        q = tl.where(verifies[:, None], tl.load(q_at, mask=verifies[:, None], other=0.0), q)

    acc = tl.zeros([TILE_M, DIM], tl.float32)
    top = tl.full([TILE_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)

    prefix_scale = scale
    if LAYOUT.k_scales > 0:
        prefix_scale = scale * tl.load(cached.k_scale + (kv_head if LAYOUT.k_scales > 1 else 0))
    begin = split * share * TILE_N
    end = tl.minimum(begin + share * TILE_N, longest)
    whole = tl.maximum(begin, tl.minimum(shortest, end) // TILE_N * TILE_N)  # up to here every row sees all
    keys = cached.k + kv_head.to(tl.int64) * cached.k_head
    values = cached.v + kv_head.to(tl.int64) * cached.v_head
    table += req.to(tl.int64) * table_row
    # Each step looks up the next one's blocks, so that no load of keys waits for the table.
    block = _look_up(table, begin, longest, LAYOUT, TILE_N)
    for at in tl.range(begin, whole, TILE_N):
        following = _look_up(table, at + TILE_N, longest, LAYOUT, TILE_N)
        acc, top, total = _prefix_step(
            acc, top, total, q, length, at, block, longest, prefix_scale, keys, values, cached,
            SHAPE, LAYOUT, TILE_N, WIDEN, False,
        )  # fmt: skip
        block = following
    for at in tl.range(whole, end, TILE_N, num_stages=1):
        acc, top, total = _prefix_step(
            acc, top, total, q, length, at, block, longest, prefix_scale, keys, values, cached,
            SHAPE, LAYOUT, TILE_N, WIDEN, True,
        )  # fmt: skip
        block = _look_up(table, at + TILE_N, longest, LAYOUT, TILE_N)
    if LAYOUT.v_scales > 0:
        acc *= tl.load(cached.v_scale + (kv_head if LAYOUT.v_scales > 1 else 0))

    # Fresh keys and values carry no scales, so they come after that product.
    if split != fresh_split:
        last = first
    for at in tl.range(first, last, TILE_C, num_stages=1):
        column = at + tl.arange(0, TILE_C)  # [TILE_C], rows among the request's block rows
        block_at = rows.lengths + req.to(tl.int64) * rows.lengths_req + column // SHAPE.block * rows.lengths_block
        exists = column < last
        exists = exists & (tl.load(block_at, mask=exists, other=-1) >= 0)
        row = req.to(tl.int64) * (SHAPE.blocks * SHAPE.block) + column
        k_at = fresh.k + (row * fresh.k_row + kv_head * fresh.k_head)[:, None] + dims[None, :]
        v_at = fresh.v + (row * fresh.v_row + kv_head * fresh.v_head)[:, None] + dims[None, :]
        k = tl.load(k_at, mask=exists[:, None], other=0.0)  # [TILE_C, dim]
        v = tl.load(v_at, mask=exists[:, None], other=0.0)
        scores = _dot(q, tl.trans(k), None, WIDEN) * scale  # [TILE_M, TILE_C]
        same_block = (own // SHAPE.block)[:, None] == (column // SHAPE.block)[None, :]
        seen = same_block & exists[None, :] & in_block[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        acc, top, total = _softmax_step(acc, top, total, scores, v, WIDEN)

    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    result = tl.where((length >= 0)[:, None], result, 0.0)  # a row that sees nothing, or does not exist, is zero
    if not SPLIT:
        _store_rows(result, kv_head, m, place, in_block, verifies, out, SHAPE)
    else:
        at = (req * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * splits + split
        at = at * TILE_M + tl.arange(0, TILE_M)
        tl.store(out.partial + at[:, None] * DIM + dims[None, :], result)
        tl.store(out.lse + at, tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf")))


@triton.jit
def _tile_rows(req, tile, rows, SHAPE: tl.constexpr, TILE_M: tl.constexpr):
    """What the rows of a tile are: their place among their kind, the length each sees (-1: no row), and their kind."""
    row = (tile * TILE_M + tl.arange(0, TILE_M)) // SHAPE.groups  # [TILE_M], verification rows first
    own = row - SHAPE.verify  # [TILE_M], place among the request's block rows
    in_block = (own >= 0) & (own < SHAPE.blocks * SHAPE.block)
    at = rows.lengths + req.to(tl.int64) * rows.lengths_req + (own // SHAPE.block) * rows.lengths_block
    length = tl.load(at, mask=in_block, other=-1).to(tl.int32)  # [TILE_M]
    # It occupies registers over the whole prefix, so it has 32 bits until it becomes an address: with 64, ragged rows
    # would spill on sm_120.
    place = req * (SHAPE.blocks * SHAPE.block) + own  # [TILE_M], row of q, k, v and out
    if SHAPE.verify > 0:
        if SHAPE.ragged:
            first = tl.load(rows.verify_starts + req)
            held = tl.minimum(tl.load(rows.verify_starts + req + 1) - first, SHAPE.verify)
        else:
            first = req * SHAPE.verify
            held = SHAPE.verify
        verifies = row < held
        verify_place = first + row
        verify_length = tl.load(rows.verify_lengths + verify_place, mask=verifies, other=-1).to(tl.int32)
        length = tl.where(verifies, verify_length, length)
        place = tl.where(verifies, verify_place, place)
    else:
        verifies = row < 0
    return own, place, length, in_block, verifies


@triton.jit
def _look_up(table, at, longest, LAYOUT: tl.constexpr, TILE_N: tl.constexpr):
    """Blocks that hold positions at .. at + TILE_N. What stands in the table behind the length is never read."""
    position = at if LAYOUT.page % TILE_N == 0 else at + tl.arange(0, TILE_N)  # one look-up where a page holds all
    return tl.load(table + position // LAYOUT.block_size, mask=position < longest, other=0)


@triton.jit
def _prefix_step(
    acc,
    top,
    total,
    q,
    length,
    at,
    block,
    longest,
    scale,
    keys,
    values,
    cached,
    SHAPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    TILE_N: tl.constexpr,
    WIDEN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Attend to cached positions at .. at + TILE_N, which lie in `block`; `at` is a multiple of TILE_N.

    keys and values point at the first page of the head.
    """
    dims = tl.arange(0, SHAPE.dim)
    position = at + tl.arange(0, TILE_N)  # [TILE_N]
    first = at if LAYOUT.page % TILE_N == 0 else position  # one page for the whole tile, or one for each position
    page = block.to(tl.int64) * (LAYOUT.block_size // LAYOUT.page) + first % LAYOUT.block_size // LAYOUT.page
    slot = position % LAYOUT.page
    key_at = page * cached.k_page + slot * cached.k_slot  # [TILE_N]
    value_at = key_at if LAYOUT.same_strides else page * cached.v_page + slot * cached.v_slot
    key_at = keys + key_at[:, None] + dims[None, :] * cached.k_dim
    value_at = values + value_at[:, None] + dims[None, :] * (cached.k_dim if LAYOUT.same_strides else cached.v_dim)
    if MASKED:  # zeros, because an unused slot may hold NaN and 0 * NaN is NaN
        exists = (position < longest)[:, None]
        k = tl.load(key_at, mask=exists, other=0.0)
        v = tl.load(value_at, mask=exists, other=0.0)
    else:
        k = tl.load(key_at)
        v = tl.load(value_at)
    scores = _dot(q, tl.trans(k.to(q.dtype)), None, WIDEN) * scale  # [TILE_M, TILE_N]
    if MASKED:
        scores = tl.where(position[None, :] < length[:, None], scores, float("-inf"))
    return _softmax_step(acc, top, total, scores, v.to(q.dtype), WIDEN)


@triton.jit
def _softmax_step(acc, top, total, scores, v, WIDEN: tl.constexpr):
    """One step of the online softmax. A row that has seen nothing yet has top = -inf and must not produce NaN."""
    new_top = tl.maximum(top, tl.max(scores, 1))  # [TILE_M]
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])  # [TILE_M, TILE_N]
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    if not WIDEN:  # the interpreter would not round here, but cut off
        weights = weights.to(v.dtype)
    acc = _dot(weights, v, acc * shrink[:, None], WIDEN)
    return acc, new_top, total


@triton.jit
def _dot(a, b, acc, WIDEN: tl.constexpr):
    if WIDEN:  # Triton's interpreter keeps bfloat16 as integers and would multiply those
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _store_rows(values, kv_head, m, place, in_block, verifies, out, SHAPE: tl.constexpr):
    head = kv_head * SHAPE.groups + m % SHAPE.groups  # [TILE_M]
    dims = tl.arange(0, SHAPE.dim)
    place = place.to(tl.int64)
    at = place * out.row + head * out.head
    tl.store(out.data + at[:, None] + dims[None, :], values.to(out.data.dtype.element_ty), mask=in_block[:, None])
    if SHAPE.verify > 0:
        at = place * out.verify_row + head * out.verify_head
        values = values.to(out.verify.dtype.element_ty)
        tl.store(out.verify + at[:, None] + dims[None, :], values, mask=verifies[:, None])


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    rows,
    out,
    splits,
    SHAPE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_S: tl.constexpr,
):
    """out = sum over splits of 2^lse partial / sum over splits of 2^lse, for TILE_R rows of one tile."""
    DIM: tl.constexpr = SHAPE.dim  # in a list of sizes, older Tritons take no field of a tuple
    group = tl.program_id(0)
    kv_head = tl.program_id(1)
    req = tl.program_id(2)
    _, place, _, in_block, verifies = _tile_rows(req, group, rows, SHAPE, TILE_R)
    tile = (req * tl.num_programs(1) + kv_head) * NUM_TILES + group * TILE_R // TILE_M
    in_tile = group * TILE_R % TILE_M + tl.arange(0, TILE_R)  # [TILE_R]
    dims = tl.arange(0, DIM)
    holding = tl.load(out.active + tile)
    acc = tl.zeros([TILE_R, DIM], tl.float32)
    top = tl.full([TILE_R], float("-inf"), tl.float32)
    total = tl.zeros([TILE_R], tl.float32)
    for at in range(0, holding, TILE_S):
        split = at + tl.arange(0, TILE_S)
        stored = (tile.to(tl.int64) * splits + split)[:, None] * TILE_M + in_tile[None, :]  # [TILE_S, TILE_R]
        exists = (split < holding)[:, None]
        weight = tl.load(out.lse + stored, mask=exists, other=float("-inf"))
        part_at = out.partial + stored[:, :, None] * DIM + dims[None, None, :]
        part = tl.load(part_at, mask=exists[:, :, None], other=0.0)
        new_top = tl.maximum(top, tl.max(weight, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(weight - base[None, :])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink[:, None] + tl.sum(weight[:, :, None] * part, 0)
        top = new_top
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    m = group * TILE_R + tl.arange(0, TILE_R)
    _store_rows(result, kv_head, m, place, in_block, verifies, out, SHAPE)
