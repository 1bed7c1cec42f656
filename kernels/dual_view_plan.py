"""How a launch of the dual-view attention is cut up, and the memory it needs."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Tiles(NamedTuple):
    """How the work is cut up. Fixed per kind of input: nothing is tuned while serving."""

    rows: int  # rows x grouped query heads per program
    positions: int  # cached positions per step
    warps: int
    stages: int
    per_sm: int  # programs that fit on one multiprocessor at a time


class Plan(NamedTuple):
    """Everything that is fixed before a launch, with the memory it needs, so that a launch allocates nothing."""

    tiles: Tiles
    splits: int
    num_tiles: int  # programs along the rows of one request and key-value head
    partial: Tensor | None  # [num_reqs, kv_heads, num_tiles, splits, tiles.rows, dim] float32
    lse: Tensor | None  # [num_reqs, kv_heads, num_tiles, splits, tiles.rows] float32, base 2
    active: Tensor | None  # [num_reqs, kv_heads, num_tiles] int32, splits that hold something


def make_plan(
    num_reqs: int,
    rows_per_request: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    device: torch.device | str,
    splits: int | None = None,
    tiles: Tiles | None = None,
    buffer: Tensor | None = None,
) -> Plan:
    """Choose tiles and splits for a launch and take its memory from `buffer`, or allocate it.

    A float32 `buffer` of `workspace_size(...)` elements may be shared by all layers and by plans that never run at the
    same time. Fix `splits` where results must not depend on how many requests share a launch.
    """
    device = torch.device(device)
    rows = rows_per_request * (q_heads // kv_heads)
    tiles = tiles or choose_tiles(rows, head_dim, dtype, cache_dtype, device)
    num_tiles = -(-rows // tiles.rows)
    if splits is None:
        splits = choose_splits(num_reqs * kv_heads * num_tiles, tiles.per_sm, device)
    if splits == 1:
        return Plan(tiles, 1, num_tiles, None, None, None)
    programs = num_reqs * kv_heads * num_tiles
    size = programs * (splits * tiles.rows * (head_dim + 1) + 1)
    if buffer is None:
        buffer = torch.empty(size, dtype=torch.float32, device=device)
    if buffer.numel() < size or buffer.dtype != torch.float32:
        raise ValueError(f"buffer has {buffer.numel()} elements of {buffer.dtype}, the plan needs {size} of float32")
    partial, lse, active = buffer[:size].split(
        [programs * splits * tiles.rows * head_dim, programs * splits * tiles.rows, programs]
    )
    return Plan(
        tiles,
        splits,
        num_tiles,
        partial.view(num_reqs, kv_heads, num_tiles, splits, tiles.rows, head_dim),
        lse.view(num_reqs, kv_heads, num_tiles, splits, tiles.rows),
        active.view(torch.int32).view(num_reqs, kv_heads, num_tiles),
    )


def workspace_size(plan: Plan) -> int:
    """How many float32 elements of a shared buffer this plan uses."""
    return sum(part.numel() for part in plan[3:] if part is not None)


def choose_tiles(rows: int, head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype, device: torch.device) -> Tiles:
    """Tiles for this many rows x grouped heads.

    Hopper's warpgroup instructions want 64 rows. More rows per program read the prefix less often, until the
    accumulator no longer fits the registers; then the programs of one stretch of prefix share it through the L2 cache.
    """
    wanted = max(16, triton.next_power_of_2(rows))
    if device.type == "cpu":  # interpreted: few, large steps
        return Tiles(min(wanted, 1024), 256, 1, 1, 1)
    if dtype == torch.float32:
        return Tiles(min(wanted, 32), 32, 4, 1, 1)
    if head_dim > 128:
        return Tiles(min(wanted, 64), 32, 4, 3, 1)
    if wanted >= 128:
        return Tiles(128, 64, 8, 3, 1)
    return Tiles(wanted, 64, 4, 3, 2)


def choose_splits(programs: int, per_sm: int, device: torch.device) -> int:
    """The fewest splits that keep at least 90 % of the device's places busy if all prefixes are equally long."""
    if device.type == "cpu":
        return 1
    places = torch.cuda.get_device_properties(device).multi_processor_count * per_sm
    best, best_use = 1, 0.0
    for splits in range(1, max(places // programs, 8) + 1):
        waves = -(-programs * splits // places)
        use = programs * splits / (waves * places)
        if use > best_use + 0.02:
            best, best_use = splits, use
        if best_use >= 0.9:
            break
    return min(best, 128)
