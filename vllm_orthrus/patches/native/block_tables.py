"""Block tables of the batch, the cache slots of its tokens, and the rows that the host has changed."""

from typing import Any

import numpy as np
import torch

from vllm_orthrus.patches.native.launch import DECLINED, Grid, native
from vllm_orthrus.patches.native.memory import flat, table


@native("vllm.v1.worker.gpu.block_table:_gather_block_tables_kernel", "977a296033b0", "d5e90942ace0")
def gather_block_tables(
    grid: Grid,
    *,
    batch_idx_to_req_idx: torch.Tensor,
    src_block_table_ptrs: torch.Tensor,
    dst_block_table_ptrs: torch.Tensor,
    block_table_strides: torch.Tensor,
    num_blocks_ptr: torch.Tensor,
    num_blocks_stride: int,
    num_reqs: int,
    num_computed_tokens_ptr: torch.Tensor | None = None,
    sliding_window_reach_ptr: torch.Tensor | None = None,
    block_sizes_ptr: torch.Tensor | None = None,
    MASK_SLIDING_WINDOW: bool = False,
    **_: Any,
) -> None:
    groups, padded = grid
    count = min(num_reqs, padded)
    slots, num_blocks = flat(batch_idx_to_req_idx)[:count].tolist(), flat(num_blocks_ptr)
    sources, targets = flat(src_block_table_ptrs).tolist(), flat(dst_block_table_ptrs).tolist()
    strides = flat(block_table_strides).tolist()
    for group in range(groups):
        width = strides[group]
        target = table(targets[group], width, padded)
        target[count:] = 0
        if not slots:
            continue
        source = table(sources[group], width, max(slots) + 1)
        for row, slot in enumerate(slots):
            blocks = int(num_blocks[group * num_blocks_stride + slot])
            target[row, :blocks] = source[slot, :blocks]
            if MASK_SLIDING_WINDOW:
                assert num_computed_tokens_ptr is not None
                assert sliding_window_reach_ptr is not None and block_sizes_ptr is not None
                reach = int(flat(sliding_window_reach_ptr)[group])
                if reach > 0:
                    unseen = max(int(flat(num_computed_tokens_ptr)[slot]) - reach, 0)
                    target[row, : min(unseen // int(flat(block_sizes_ptr)[group]), blocks)] = 0


@native("vllm.v1.worker.gpu.block_table:_compute_slot_mappings_kernel", "c70c4f84d279")
def compute_slot_mappings(
    grid: Grid,
    *,
    max_num_tokens: int,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    pos: torch.Tensor,
    block_table_ptrs: torch.Tensor,
    block_table_strides: torch.Tensor,
    block_sizes: torch.Tensor,
    slot_mapping_enabled: torch.Tensor,
    slot_mappings_ptr: torch.Tensor,
    slot_mappings_stride: int,
    CP_SIZE: int,
    PAD_ID: int,
    **_: Any,
) -> object:
    if CP_SIZE != 1:
        return DECLINED
    groups, n = grid[0], grid[1] - 1
    starts = flat(query_start_loc)[: n + 1]
    first, last = (int(starts[0]), int(starts[-1])) if n else (int(starts[0]),) * 2
    slots = np.repeat(flat(idx_mapping)[:n], starts[1:] - starts[:-1])  # of each token
    positions = flat(pos)[first:last]
    real = slots >= 0
    mappings = flat(slot_mappings_ptr)
    for group in range(groups):
        mapping = mappings[group * slot_mappings_stride :]
        mapping[last:max_num_tokens] = PAD_ID
        if last == first:
            continue
        if not flat(slot_mapping_enabled)[group] or not real.any():
            mapping[first:last] = PAD_ID
            continue
        width, size = int(flat(block_table_strides)[group]), int(flat(block_sizes)[group])
        blocks = table(int(flat(block_table_ptrs)[group]), width, int(slots.max()) + 1)
        block, offset = np.divmod(positions, size)
        found = blocks[np.maximum(slots, 0), np.where(real, block, 0)].astype(np.int64)
        mapping[first:last] = np.where(real, found * size + offset, PAD_ID)
    return None


@native("vllm.v1.worker.gpu.buffer_utils:_apply_write_kernel", "6567cf5a7766", "810bb70de428")
def apply_write(
    grid: Grid,
    *,
    output_ptr: torch.Tensor,
    output_stride: Any,
    write_indices_ptr: torch.Tensor,
    write_starts_ptr: torch.Tensor,
    write_contents_ptr: torch.Tensor,
    write_cu_lens_ptr: torch.Tensor,
    write_group_ids_ptr: torch.Tensor | None,
    MULTI_GROUP: bool,
    **_: Any,
) -> None:
    n = grid[0]
    indices, starts = flat(write_indices_ptr)[:n].tolist(), flat(write_starts_ptr)[:n].tolist()
    contents, ends = flat(write_contents_ptr), flat(write_cu_lens_ptr)[:n].tolist()
    begin = 0
    for i, end in enumerate(ends):
        new = contents[begin:end]
        if write_group_ids_ptr is not None and MULTI_GROUP:
            group = int(flat(write_group_ids_ptr)[i])
            written = table(int(flat(output_ptr)[group]), int(flat(output_stride)[group]), indices[i] + 1)
            written[indices[i], starts[i] : starts[i] + len(new)] = new
        else:
            first = indices[i] * output_stride + starts[i]
            flat(output_ptr)[first : first + len(new)] = new
        begin = end
