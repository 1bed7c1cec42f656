"""Sampling without drafts, and the drafts' own: temperature, min-p, and the Gumbel trick."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_orthrus.patches.native.draws import gumbel_noise, gumbel_noise_double
from vllm_orthrus.patches.native.launch import Grid, native
from vllm_orthrus.patches.native.memory import Array, flat, floats, rows, stored

_GUMBEL = "vllm.v1.worker.gpu.sample.gumbel:"
_DRAFT_SALT = 1 << 30  # keeps the noise of drafts apart from that of the tokens sampled after them


@native(_GUMBEL + "_temperature_kernel", "88dfbee4e98e")
def apply_temperature(
    grid: Grid,
    *,
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    temperature_ptr: torch.Tensor,
    vocab_size: int,
    **_: Any,
) -> None:
    n = grid[0]
    temperature = flat(temperature_ptr)[flat(expanded_idx_mapping_ptr)[:n]].astype(np.float32)
    logits = rows(logits_ptr, logits_stride, n, vocab_size)
    for row in np.flatnonzero((temperature != 0) & (temperature != 1)).tolist():
        logits[row] = stored(logits_ptr, floats(logits_ptr, logits[row]) / temperature[row])


@native("vllm.v1.worker.gpu.sample.min_p:_min_p_kernel", "d4457aada09e")
def apply_min_p(
    grid: Grid,
    *,
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    min_p_ptr: torch.Tensor,
    vocab_size: int,
    **_: Any,
) -> None:
    (n,) = grid
    min_p = flat(min_p_ptr)[flat(expanded_idx_mapping_ptr)[:n]].astype(np.float32)
    logits = rows(logits_ptr, logits_stride, n, vocab_size)
    for row in np.flatnonzero(min_p).tolist():
        values = floats(logits_ptr, logits[row])
        threshold = np.fmax.reduce(values) + np.log(min_p[row])
        below = values < threshold
        if below.any():
            logits[row, below] = stored(logits_ptr, np.array([-np.inf], dtype=np.float32))[0]


@native(_GUMBEL + "_gumbel_sample_kernel", "cfc2b1befc77")
@native(_GUMBEL + "_gumbel_sample_kernel", "37119916fe55", seed_by_column=True)
def gumbel_sample(
    grid: Grid,
    *,
    local_argmax_ptr: torch.Tensor,
    local_argmax_stride: int,
    local_max_ptr: torch.Tensor,
    local_max_stride: int,
    logits_cache_ptr: torch.Tensor | None,
    logits_cache_stride_0: int,
    logits_cache_stride_1: int,
    logits_cache_col_ptr: torch.Tensor | None,
    logits_cache_source_ptr: torch.Tensor | None,
    logits_cache_source_stride: int,
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    seeds_ptr: torch.Tensor,
    pos_ptr: torch.Tensor,
    temp_ptr: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
    IS_DRAFTING: bool,
    APPLY_TEMPERATURE: bool,
    USE_FP64: bool,
    PER_TOKEN_COL: bool,
    seed_by_column: bool = False,
) -> None:
    n, blocks = grid
    slots = flat(expanded_idx_mapping_ptr)[:n].astype(np.int64)
    real = slots >= 0
    temperature = np.where(real, flat(temp_ptr)[slots], 0).astype(np.float32)
    seeds = np.where(real, flat(seeds_ptr)[slots], 0).astype(np.int64)
    positions = flat(pos_ptr)[:n].astype(np.int64)
    if logits_cache_ptr is not None:
        assert logits_cache_col_ptr is not None and logits_cache_source_ptr is not None
        columns = flat(logits_cache_col_ptr)[: n if PER_TOKEN_COL else 1].astype(np.int64)
        columns = np.broadcast_to(columns, n)
        cache, source = flat(logits_cache_ptr), flat(logits_cache_source_ptr)
        for row in np.flatnonzero(real).tolist():
            start = int(slots[row]) * logits_cache_stride_0 + int(columns[row]) * logits_cache_stride_1
            read = row * logits_cache_source_stride
            cache[start : start + vocab_size] = source[read : read + vocab_size]
        if seed_by_column:
            seeds ^= columns << 32

    logits = floats(logits_ptr, rows(logits_ptr, logits_stride, n, vocab_size))
    drawn = np.flatnonzero(temperature)
    if APPLY_TEMPERATURE and len(drawn):
        logits[drawn] /= temperature[drawn, None]
    values: Array = logits.astype(np.float64) if USE_FP64 else logits
    if len(drawn):
        at = positions[drawn] + (_DRAFT_SALT if IS_DRAFTING else 0)
        noise = gumbel_noise_double if USE_FP64 else gumbel_noise
        values[drawn] += noise(seeds[drawn], at, vocab_size)
    best, token = block_argmax(values, BLOCK_SIZE)
    rows(local_argmax_ptr, local_argmax_stride, n, blocks)[:] = token
    rows(local_max_ptr, local_max_stride, n, blocks)[:] = best


def block_argmax(values: Array, block: int) -> tuple[Array, NDArray[np.int64]]:
    """The greatest value of each block of each row, and its place in the row: both [n, blocks]. NaN is never that."""
    n, width = values.shape
    blocks = -(-width // block)
    if width % block:
        padded = np.full((n, blocks * block), -np.inf, dtype=values.dtype)
        padded[:, :width] = values
        values = padded
    by_block = values.reshape(n * blocks, block)
    place = by_block.argmax(axis=1)
    best = by_block[np.arange(n * blocks), place]
    lost = np.isnan(best)
    if lost.any():
        by_block = np.where(np.isnan(by_block[lost]), -np.inf, by_block[lost])
        place[lost] = by_block.argmax(axis=1)
        best[lost] = by_block.max(axis=1)
    token = place.reshape(n, blocks) + np.arange(blocks) * block
    return best.reshape(n, blocks), token
