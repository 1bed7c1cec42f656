"""How a launch of the dual-view attention is cut up, and the memory it needs."""

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Target(NamedTuple):
    """What a device offers a program."""

    warpgroups: bool  # matrix instructions that want 64 rows and read their operands from shared memory
    shared: int  # bytes of shared memory that one program may have
    multiprocessors: int


INTERPRETER = Target(False, 2**31, 1)


@cache
def target_of(device: torch.device) -> Target:
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target(False, 64 * 1024, properties.multi_processor_count)
    warpgroups = properties.major in (9, 10)
    shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Target(warpgroups, shared, properties.multi_processor_count)


class Tiles(NamedTuple):
    """How the work is cut up. Fixed per kind of input: nothing is tuned while serving."""

    rows: int  # rows x grouped query heads per program
    positions: int  # cached positions per step
    warps: int
    stages: int
    per_sm: int  # programs that fit on one multiprocessor at a time


def choose_tiles(rows: int, head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype, target: Target) -> Tiles:
    """Tiles for this many rows x grouped heads.

    More rows per program read the prefix less often, until the accumulator no longer fits the registers; then the
    programs of one stretch of prefix share it through the L2 cache. What a step brings in (positions x head_dim x 2) is
    kept near 32 KiB, and stages are as deep as shared memory allows: only loads in flight make bandwidth.
    """
    wanted = max(16, triton.next_power_of_2(rows))
    if target is INTERPRETER:  # few, large steps
        return Tiles(min(wanted, 1024), 256, 1, 1, 1)
    if dtype == torch.float32:  # exact arithmetic without matrix instructions, for tests
        return Tiles(min(wanted, 32), 16, 4, 1, 1)
    narrow = cache_dtype.itemsize == 1
    wide = head_dim > 128
    if target.warpgroups and wanted >= 64:
        if wide:
            return Tiles(64, 32, 8, 3, 1)  # four warps would spill some of 64 x 256 sums
        if wanted >= 128:
            return Tiles(128, 64, 8, 5 if narrow else 4, 1)
        return Tiles(64, 64, 4, 5 if narrow else 4 if head_dim < 128 else 3, 2)
    rows = min(wanted, 32 if wide else 64)
    if target.shared > 200 * 1024:
        return Tiles(rows, 32 if wide else 64, 4, 4, 1 if wide else 2)
    if target.shared > 80 * 1024:
        places = 2 if target.shared > 160 * 1024 and not wide else 1
        # Widening fp8 takes registers. Where a second program would not fit anyway, more threads share them.
        return Tiles(rows, 32, 8 if narrow and rows == 64 and places == 1 else 4, 3 if wide else 4, places)
    return Tiles(rows, 32, 4, 2, 2)


# Every split writes a partial result, which is read again. With more than this many programs for each that can run at a
# time, that costs more than a last wave that leaves some multiprocessors idle.
MOST_WAVES = 4


def choose_splits(programs: int, per_sm: int, target: Target) -> int:
    """The fewest splits that keep at least 95 % of the device busy if all prefixes are equally long."""
    if target is INTERPRETER:
        return 1
    places = target.multiprocessors * per_sm
    best, best_use = 1, 0.0
    for splits in range(1, max(places // programs, 8) + 1):
        if splits > 1 and programs * splits > MOST_WAVES * places:
            break
        waves = -(-programs * splits // places)
        use = programs * splits / (waves * places)
        if use > best_use + 0.02:
            best, best_use = splits, use
        if best_use >= 0.95:
            break
    return min(best, 128)


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
    target: Target | None = None,
    allocate: bool = True,
) -> Plan:
    """Choose tiles and splits for a launch and take its memory from `buffer`, or allocate it.

    A float32 `buffer` of `workspace_size(plan)` elements may be shared by all layers and by plans that never run at the
    same time; a plan that is not to `allocate` has no memory of its own and only says how much it would use. Fix
    `splits` where results must not depend on how many requests share a launch.
    """
    device = torch.device(device)
    rows = rows_per_request * (q_heads // kv_heads)
    target = target or target_of(device)
    tiles = tiles or choose_tiles(rows, head_dim, dtype, cache_dtype, target)
    num_tiles = -(-rows // tiles.rows)
    if splits is None:
        splits = choose_splits(num_reqs * kv_heads * num_tiles, tiles.per_sm, target)
    if splits == 1:
        return Plan(tiles, 1, num_tiles, None, None, None)
    programs = num_reqs * kv_heads * num_tiles
    size = programs * (splits * tiles.rows * (head_dim + 1) + 1)
    if buffer is None:
        buffer = torch.empty(size, dtype=torch.float32, device=device if allocate else "meta")
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
