# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The dual-view attention on the device: one kernel over prefix and blocks, and one that merges its splits.

For each tile of rows, online softmax over the columns it sees (scores s carry a factor log2 e, so that exp is exp2):

    m' = max(m, max s)    l' = l 2^(m - m') + sum 2^(s - m')    o' = o 2^(m - m') + 2^(s - m') V

and for splits with results o_i / l_i and lse_i = m_i + log2 l_i:   out = sum 2^lse_i (o_i / l_i) / sum 2^lse_i.
"""

import triton
import triton.language as tl


@triton.jit
def _tile_rows(
    req,
    tile,
    lengths,
    lengths_req,
    lengths_block,
    verify_lengths,
    verify_starts,
    GQA: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    VERIFY: tl.constexpr,
    RAGGED: tl.constexpr,
    TILE_M: tl.constexpr,
):
    """What the rows of a tile are: their place among their kind, the length each sees (-1: no row), and their kind."""
    row = (tile * TILE_M + tl.arange(0, TILE_M)) // GQA  # [TILE_M], verification rows first
    own = row - VERIFY  # [TILE_M], place among the request's block rows
    in_block = (own >= 0) & (own < BLOCKS * BLOCK)
    at = lengths + req.to(tl.int64) * lengths_req + (own // BLOCK) * lengths_block
    length = tl.load(at, mask=in_block, other=-1).to(tl.int32)  # [TILE_M]
    # Kept over the whole prefix, so in 32 bits until it becomes an address: 64 would make ragged rows spill on sm_120.
    place = req * (BLOCKS * BLOCK) + own  # [TILE_M], row of q, k, v and out
    if VERIFY > 0:
        if RAGGED:
            first = tl.load(verify_starts + req)
            count = tl.minimum(tl.load(verify_starts + req + 1) - first, VERIFY)
        else:
            first = req * VERIFY
            count = VERIFY
        verifies = row < count
        verify_place = first + row
        verify_length = tl.load(verify_lengths + verify_place, mask=verifies, other=-1).to(tl.int32)
        length = tl.where(verifies, verify_length, length)
        place = tl.where(verifies, verify_place, place)
    else:
        verifies = row < 0
    return own, place, length, in_block, verifies


@triton.jit
def _store_rows(
    values,
    kv_head,
    m,
    place,
    in_block,
    verifies,
    out,
    out_row,
    out_head,
    verify_out,
    verify_out_row,
    verify_out_head,
    GQA: tl.constexpr,
    DIM: tl.constexpr,
    VERIFY: tl.constexpr,
):
    head = kv_head * GQA + m % GQA  # [TILE_M]
    dims = tl.arange(0, DIM)
    place = place.to(tl.int64)
    at = place * out_row + head * out_head
    tl.store(out + at[:, None] + dims[None, :], values.to(out.dtype.element_ty), mask=in_block[:, None])
    if VERIFY > 0:
        at = place * verify_out_row + head * verify_out_head
        values = values.to(verify_out.dtype.element_ty)
        tl.store(verify_out + at[:, None] + dims[None, :], values, mask=verifies[:, None])


@triton.jit
def _dot(a, b, acc, WIDEN: tl.constexpr):
    if WIDEN:  # Triton's interpreter keeps bfloat16 as integers and would multiply those
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


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
def _look_up(table, at, longest, PAGE: tl.constexpr, MANAGER: tl.constexpr, TILE_N: tl.constexpr):
    """Blocks that hold positions at .. at + TILE_N. What stands in the table behind the length is never read."""
    position = at if PAGE % TILE_N == 0 else at + tl.arange(0, TILE_N)  # one look-up where one page holds the tile
    return tl.load(table + position // MANAGER, mask=position < longest, other=0)


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
    key_page,
    key_slot,
    key_dim,
    value_page,
    value_slot,
    value_dim,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    MANAGER: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    TILE_N: tl.constexpr,
    WIDEN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Attend to cached positions at .. at + TILE_N, which lie in `block`; `at` is a multiple of TILE_N."""
    dims = tl.arange(0, DIM)
    position = at + tl.arange(0, TILE_N)  # [TILE_N]
    first = at if PAGE % TILE_N == 0 else position  # one page for the whole tile, or one for each position
    page = block.to(tl.int64) * (MANAGER // PAGE) + first % MANAGER // PAGE
    slot = position % PAGE
    key_at = page * key_page + slot * key_slot  # [TILE_N]
    value_at = key_at if SAME_STRIDES else page * value_page + slot * value_slot
    key_at = keys + key_at[:, None] + dims[None, :] * key_dim
    value_at = values + value_at[:, None] + dims[None, :] * (key_dim if SAME_STRIDES else value_dim)
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


# Compiled once for all numbers of splits and widths of a block table.
@triton.jit(do_not_specialize=["splits", "table_width", "table_row"])
def attend(
    q,
    k,
    v,
    verify_q,
    keys,
    values,
    table,
    k_scale,
    v_scale,
    scale,
    table_width,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    verify_q_row,
    verify_q_head,
    key_page,
    key_head,
    key_slot,
    key_dim,
    value_page,
    value_head,
    value_slot,
    value_dim,
    table_row,
    lengths,
    lengths_req,
    lengths_block,
    verify_lengths,
    verify_starts,
    out,
    out_row,
    out_head,
    verify_out,
    verify_out_row,
    verify_out_head,
    partial,
    lse,
    active,
    splits,
    GQA: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    VERIFY: tl.constexpr,
    RAGGED: tl.constexpr,
    PAGE: tl.constexpr,
    MANAGER: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    K_SCALES: tl.constexpr,
    V_SCALES: tl.constexpr,
    SPLIT: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_C: tl.constexpr,
    WIDEN: tl.constexpr,
):
    # Tiles of the same stretch of prefix run next to each other, so that the L2 cache serves all but the first.
    tile = tl.program_id(0) % NUM_TILES
    kv_head = tl.program_id(0) // NUM_TILES
    split = tl.program_id(1)
    req = tl.program_id(2)
    own, place, length, in_block, verifies = _tile_rows(
        req, tile, lengths, lengths_req, lengths_block, verify_lengths, verify_starts,
        GQA, BLOCK, BLOCKS, VERIFY, RAGGED, TILE_M,
    )  # fmt: skip
    length = tl.minimum(length, table_width * MANAGER)  # a wrong length must not read past the table
    longest = tl.max(length, 0)
    shortest = tl.min(tl.where(length < 0, longest, length), 0)  # rows that do not exist may compute anything

    # The fresh rows [first, last) of this request that any row of this tile sees.
    last_own = ((tile + 1) * TILE_M - 1) // GQA - VERIFY
    first = tl.maximum(tile * TILE_M // GQA - VERIFY, 0) // BLOCK * BLOCK
    last = tl.minimum((last_own // BLOCK + 1) * BLOCK, BLOCKS * BLOCK)
    if (last_own < 0) | (longest < 0):
        last = first

    steps = tl.cdiv(tl.maximum(longest, 0), TILE_N)
    share = tl.cdiv(steps, splits)  # steps per split
    used = tl.cdiv(steps, tl.maximum(share, 1))  # splits that have a part of the prefix
    fresh_split = tl.minimum(used, splits - 1)  # the fresh rows go to a split of their own while there is one
    if SPLIT:
        holding = tl.where(last > first, fresh_split + 1, used)
        if split == 0:
            tl.store(active + (req * tl.num_programs(0) + tl.program_id(0)), holding)
        if split >= holding:
            return

    m = tile * TILE_M + tl.arange(0, TILE_M)
    head = kv_head * GQA + m % GQA  # [TILE_M]
    dims = tl.arange(0, DIM)
    q_at = q + (place.to(tl.int64) * q_row + head * q_head)[:, None] + dims[None, :]
    rows = tl.load(q_at, mask=in_block[:, None], other=0.0)  # [TILE_M, DIM]
    if VERIFY > 0:
        q_at = verify_q + (place.to(tl.int64) * verify_q_row + head * verify_q_head)[:, None] + dims[None, :]
        rows = tl.where(verifies[:, None], tl.load(q_at, mask=verifies[:, None], other=0.0), rows)

    acc = tl.zeros([TILE_M, DIM], tl.float32)
    top = tl.full([TILE_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)

    prefix_scale = scale
    if K_SCALES > 0:
        prefix_scale = scale * tl.load(k_scale + (kv_head if K_SCALES > 1 else 0))
    begin = split * share * TILE_N
    end = tl.minimum(begin + share * TILE_N, longest)
    whole = tl.maximum(begin, tl.minimum(shortest, end) // TILE_N * TILE_N)  # up to here every row sees all
    keys += kv_head.to(tl.int64) * key_head
    values += kv_head.to(tl.int64) * value_head
    table += req.to(tl.int64) * table_row
    # Each step looks up the next one's blocks, so that no load of keys waits for the table.
    block = _look_up(table, begin, longest, PAGE, MANAGER, TILE_N)
    for at in tl.range(begin, whole, TILE_N):
        following = _look_up(table, at + TILE_N, longest, PAGE, MANAGER, TILE_N)
        acc, top, total = _prefix_step(
            acc, top, total, rows, length, at, block, longest, prefix_scale, keys, values,
            key_page, key_slot, key_dim, value_page, value_slot, value_dim,
            DIM, PAGE, MANAGER, SAME_STRIDES, TILE_N, WIDEN, False,
        )  # fmt: skip
        block = following
    for at in tl.range(whole, end, TILE_N, num_stages=1):
        acc, top, total = _prefix_step(
            acc, top, total, rows, length, at, block, longest, prefix_scale, keys, values,
            key_page, key_slot, key_dim, value_page, value_slot, value_dim,
            DIM, PAGE, MANAGER, SAME_STRIDES, TILE_N, WIDEN, True,
        )  # fmt: skip
        block = _look_up(table, at + TILE_N, longest, PAGE, MANAGER, TILE_N)
    if V_SCALES > 0:
        acc *= tl.load(v_scale + (kv_head if V_SCALES > 1 else 0))

    # Only now the fresh rows, which carry no scales.
    if split != fresh_split:
        last = first
    for at in tl.range(first, last, TILE_C, num_stages=1):
        column = at + tl.arange(0, TILE_C)  # [TILE_C], rows among the request's block rows
        block_at = lengths + req.to(tl.int64) * lengths_req + column // BLOCK * lengths_block
        exists = column < last
        exists = exists & (tl.load(block_at, mask=exists, other=-1) >= 0)
        fresh = req.to(tl.int64) * (BLOCKS * BLOCK) + column
        k_at = k + (fresh * k_row + kv_head * k_head)[:, None] + dims[None, :]
        v_at = v + (fresh * v_row + kv_head * v_head)[:, None] + dims[None, :]
        k_tile = tl.load(k_at, mask=exists[:, None], other=0.0)  # [TILE_C, DIM]
        v_tile = tl.load(v_at, mask=exists[:, None], other=0.0)
        scores = _dot(rows, tl.trans(k_tile), None, WIDEN) * scale  # [TILE_M, TILE_C]
        same_block = (own // BLOCK)[:, None] == (column // BLOCK)[None, :]
        seen = same_block & exists[None, :] & in_block[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        acc, top, total = _softmax_step(acc, top, total, scores, v_tile, WIDEN)

    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    result = tl.where((length >= 0)[:, None], result, 0.0)  # a row that sees nothing, or does not exist, is zero
    if not SPLIT:
        _store_rows(
            result, kv_head, m, place, in_block, verifies, out, out_row, out_head,
            verify_out, verify_out_row, verify_out_head, GQA, DIM, VERIFY,
        )  # fmt: skip
    else:
        at = (req * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * splits + split
        at = at * TILE_M + tl.arange(0, TILE_M)
        tl.store(partial + at[:, None] * DIM + dims[None, :], result)
        tl.store(lse + at, tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf")))


@triton.jit(do_not_specialize=["splits"])
def merge(
    lengths,
    lengths_req,
    lengths_block,
    verify_lengths,
    verify_starts,
    out,
    out_row,
    out_head,
    verify_out,
    verify_out_row,
    verify_out_head,
    partial,
    lse,
    active,
    splits,
    GQA: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    VERIFY: tl.constexpr,
    RAGGED: tl.constexpr,
    SPLIT: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_S: tl.constexpr,
):
    """out = sum over splits of 2^lse partial / sum over splits of 2^lse, for TILE_R rows of one tile."""
    group = tl.program_id(0)
    kv_head = tl.program_id(1)
    req = tl.program_id(2)
    _, place, _, in_block, verifies = _tile_rows(
        req, group, lengths, lengths_req, lengths_block, verify_lengths, verify_starts,
        GQA, BLOCK, BLOCKS, VERIFY, RAGGED, TILE_R,
    )  # fmt: skip
    tile = (req * tl.num_programs(1) + kv_head) * NUM_TILES + group * TILE_R // TILE_M
    in_tile = group * TILE_R % TILE_M + tl.arange(0, TILE_R)  # [TILE_R]
    dims = tl.arange(0, DIM)
    holding = tl.load(active + tile)
    acc = tl.zeros([TILE_R, DIM], tl.float32)
    top = tl.full([TILE_R], float("-inf"), tl.float32)
    total = tl.zeros([TILE_R], tl.float32)
    for at in range(0, holding, TILE_S):
        split = at + tl.arange(0, TILE_S)
        rows = (tile.to(tl.int64) * splits + split)[:, None] * TILE_M + in_tile[None, :]  # [TILE_S, TILE_R]
        exists = (split < holding)[:, None]
        weight = tl.load(lse + rows, mask=exists, other=float("-inf"))
        part = tl.load(partial + rows[:, :, None] * DIM + dims[None, None, :], mask=exists[:, :, None], other=0.0)
        new_top = tl.maximum(top, tl.max(weight, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(weight - base[None, :])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink[:, None] + tl.sum(weight[:, :, None] * part, 0)
        top = new_top
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    m = group * TILE_R + tl.arange(0, TILE_R)
    _store_rows(
        result, kv_head, m, place, in_block, verifies, out, out_row, out_head,
        verify_out, verify_out_row, verify_out_head, GQA, DIM, VERIFY,
    )  # fmt: skip
