# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Build the rows of a draft pass from the device's state after sampling, in one launch.

For drafting request i, which stands at row r of the batch and at slot s of the per-request state:

    p      = positions[query_start_loc[r + 1] - num_rejected[r] - 1] + 1     behind the last token that was kept
    anchor = last_sampled[s] if num_sampled[r] > 0 else next_prefill_tokens[s]
    block  = [anchor, MASK, ..., MASK] at p, p + 1, ...                      clamped to the context limit

The host knows neither how many drafts were accepted nor, therefore, p; nothing here waits for it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_orthrus.kernels.forms import runs_triton
from vllm_orthrus.kernels.packed import require_packed


class BatchState(NamedTuple):
    """What vLLM leaves on the device once a batch has been sampled."""

    idx_mapping: Tensor  # [num_reqs], the slot of each row of the batch
    query_start_loc: Tensor  # [num_reqs + 1]
    positions: Tensor  # [num_tokens]
    num_sampled: Tensor  # [num_reqs]
    num_rejected: Tensor  # [num_reqs]
    last_sampled: Tensor  # [max_num_reqs, 1], by slot
    next_prefill_tokens: Tensor  # [lookahead, max_num_reqs], by slot


class BlockTables(NamedTuple):
    """The batch's block tables and where drafting requests' rows of them go. Neither may move afterwards."""

    sources: list[Tensor]  # per cache group [max_num_reqs, max_blocks] int32, by row of the batch
    targets: list[Tensor]  # the same, by drafting request
    block_sizes: list[int]
    addresses: Tensor  # [groups, 5] int64: source, its row stride, target, its row stride, block size


class BlockRows(NamedTuple):
    """The buffers that a draft pass reads. Rows that no request fills see nothing and sample nothing."""

    input_ids: Tensor  # [capacity, width] int64
    positions: Tensor  # [capacity, width] int64
    prefix_lengths: Tensor  # [capacity] int32
    slots: Tensor  # [capacity, num_drafts] int64, -1: sample nothing
    tables: BlockTables


def link_tables(sources: list[Tensor], targets: list[Tensor], block_sizes: list[int]) -> BlockTables:
    for source, target in zip(sources, targets, strict=True):
        require_packed(source=source, target=target)
    addresses = [
        (source.data_ptr(), source.stride(0), target.data_ptr(), target.stride(0), size)
        for source, target, size in zip(sources, targets, block_sizes, strict=True)
    ]
    device = sources[0].device
    return BlockTables(sources, targets, block_sizes, torch.tensor(addresses, dtype=torch.int64, device=device))


def prepare_blocks(
    drafting: Tensor,  # [num_drafting] rows of the batch
    batch: BatchState,
    out: BlockRows,
    mask_token: int,
    max_model_len: int,
    num_rows: int | None = None,
    padding_length: int = 0,
) -> None:
    """Fill the first rows of `out`, clear the others up to `num_rows` (default: all), and copy block tables.

    A table row is copied as far as prefix and block reach; what stands behind that is left as it was. Cleared rows get
    `padding_length` as their prefix length: -1 tells the dual-view attention that there is no such request.
    """
    form = launch if runs_triton(drafting.device, chosen=True) else naive
    form(drafting, batch, out, mask_token, max_model_len, num_rows, padding_length)


def rows_to_fill(drafting: Tensor, out: BlockRows, num_rows: int | None) -> int:
    capacity = len(out.input_ids)
    num_rows = capacity if num_rows is None else num_rows
    if not len(drafting) <= num_rows <= capacity:
        raise ValueError(f"{len(drafting)} requests into {num_rows} of {capacity} rows")
    return num_rows


def naive(
    drafting: Tensor,
    batch: BatchState,
    out: BlockRows,
    mask_token: int,
    max_model_len: int,
    num_rows: int | None = None,
    padding_length: int = 0,
) -> None:
    width = out.input_ids.shape[1]
    for i in range(rows_to_fill(drafting, out, num_rows)):
        real = i < len(drafting)
        p = 0
        out.input_ids[i] = mask_token if real else 0
        out.positions[i] = 0
        out.prefix_lengths[i] = padding_length
        out.slots[i] = -1
        if real:
            row = int(drafting[i])
            slot = int(batch.idx_mapping[row])
            last_kept = int(batch.query_start_loc[row + 1]) - int(batch.num_rejected[row]) - 1
            p = min(int(batch.positions[last_kept]) + 1, max_model_len)
            sampled = int(batch.num_sampled[row]) > 0
            out.input_ids[i, 0] = batch.last_sampled[slot, 0] if sampled else batch.next_prefill_tokens[0, slot]
            for column in range(width):
                out.positions[i, column] = min(p + column, max_model_len - 1)
            out.prefix_lengths[i] = p
            out.slots[i] = slot
        for source, target, size in zip(out.tables.sources, out.tables.targets, out.tables.block_sizes, strict=True):
            needed = -(-min(p + width, max_model_len) // size)
            target[i, :needed] = source[int(drafting[i]), :needed] if real else 0


def launch(
    drafting: Tensor,
    batch: BatchState,
    out: BlockRows,
    mask_token: int,
    max_model_len: int,
    num_rows: int | None = None,
    padding_length: int = 0,
) -> None:
    num_rows = rows_to_fill(drafting, out, num_rows)
    require_packed(drafting=drafting, **batch._asdict())
    require_packed(out_ids=out.input_ids, out_positions=out.positions, out_lengths=out.prefix_lengths, slots=out.slots)
    width, num_drafts = out.input_ids.shape[1], out.slots.shape[1]
    _prepare_blocks_kernel[(num_rows, 1 + len(out.tables.sources))](
        drafting,
        len(drafting),
        batch.idx_mapping,
        batch.query_start_loc,
        batch.positions,
        batch.num_sampled,
        batch.num_rejected,
        batch.last_sampled,
        batch.last_sampled.stride(0),
        batch.next_prefill_tokens,
        out.input_ids,
        out.input_ids.stride(0),
        out.positions,
        out.positions.stride(0),
        out.prefix_lengths,
        out.slots,
        out.slots.stride(0),
        out.tables.addresses,
        mask_token,
        max_model_len,
        padding_length,
        WIDTH=width,
        DRAFTS=num_drafts,
        TILE=triton.next_power_of_2(max(width, num_drafts)),
        COLUMNS=1024,
        num_warps=1,
    )


# Compiled once for all numbers of requests: they change from step to step.
@triton.jit(do_not_specialize=["num_drafting"])
def _prepare_blocks_kernel(
    drafting,
    num_drafting,
    idx_mapping,
    query_start_loc,
    positions,
    num_sampled,
    num_rejected,
    last_sampled,
    last_sampled_stride,
    next_prefill_tokens,
    out_input_ids,
    out_input_ids_stride,
    out_positions,
    out_positions_stride,
    out_prefix_lengths,
    out_slots,
    out_slots_stride,
    addresses,
    mask_token,
    max_model_len,
    padding_length,
    WIDTH: tl.constexpr,
    DRAFTS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (i, 0) builds the rows of request i, program (i, 1 + g) copies its row of table g."""
    i = tl.program_id(0).to(tl.int64)
    task = tl.program_id(1)
    real = i < num_drafting
    row = tl.load(drafting + i, mask=real, other=0).to(tl.int64)
    end = tl.load(query_start_loc + row + 1, mask=real, other=1) - tl.load(num_rejected + row, mask=real, other=0)
    p = tl.load(positions + end - 1, mask=real, other=-1).to(tl.int64) + 1
    p = tl.minimum(p, max_model_len)  # 0 for rows that no request fills
    if task == 0:
        slot = tl.load(idx_mapping + row, mask=real, other=-1).to(tl.int64)
        sampled = tl.load(num_sampled + row, mask=real, other=0) > 0
        after_sampling = tl.load(last_sampled + slot * last_sampled_stride, mask=real & sampled, other=0).to(tl.int64)
        in_prompt = tl.load(next_prefill_tokens + slot, mask=real & (sampled == 0), other=0).to(tl.int64)
        column = tl.arange(0, TILE)  # [TILE]
        token = tl.where(column == 0, after_sampling + in_prompt, mask_token)
        place = tl.minimum(p + column, max_model_len - 1)
        tl.store(out_input_ids + i * out_input_ids_stride + column, tl.where(real, token, 0), mask=column < WIDTH)
        tl.store(out_positions + i * out_positions_stride + column, tl.where(real, place, 0), mask=column < WIDTH)
        tl.store(out_prefix_lengths + i, tl.where(real, p, padding_length).to(tl.int32))
        tl.store(out_slots + i * out_slots_stride + column, tl.where(real, slot, -1) + column * 0, mask=column < DRAFTS)
    else:
        entry = addresses + (task - 1) * 5
        source = tl.load(entry).to(tl.pointer_type(tl.int32)) + row * tl.load(entry + 1)
        target = tl.load(entry + 2).to(tl.pointer_type(tl.int32)) + i * tl.load(entry + 3)
        needed = tl.cdiv(tl.minimum(p + WIDTH, max_model_len), tl.load(entry + 4)).to(tl.int32)
        held = tl.where(real, needed, 0)
        for at in range(0, needed, COLUMNS):
            column = at + tl.arange(0, COLUMNS)  # [COLUMNS]
            block = tl.load(source + column, mask=column < held, other=0)
            tl.store(target + column, block, mask=column < needed)
