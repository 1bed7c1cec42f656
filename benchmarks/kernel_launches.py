"""What a GPU is asked to run: launches of our host code, recorded from it, for shapes that stand for many others."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from vllm_orthrus.engine.settings import MAX_PASS_ROWS, DraftShape
from vllm_orthrus.kernels import (
    chances,
    choose,
    most_probable,
    norm_rotate,
    prepare_block,
    prepare_hypotheses,
    select,
    take_rows,
    take_up,
)
from vllm_orthrus.kernels import dual_view_attention as attention
from vllm_orthrus.kernels.dual_view_plan import Target
from vllm_orthrus.kernels.slots import Remembered, Slots

KIB = 1024
PAGES = 1 << 20  # of a cache as servers have them, of more than 2 GiB
RANK, CANDIDATES = 64, 32  # of a selector that is to be good where text is drawn, too


class Gpu(NamedTuple):
    name: str
    compile_for: GPUTarget
    target: Target
    fp8: torch.dtype  # what an fp8 cache holds there


GPUS = [
    Gpu("sm_80", GPUTarget("cuda", 80, 32), Target(False, 163 * KIB, 108), torch.float8_e5m2),
    Gpu("sm_90", GPUTarget("cuda", 90, 32), Target(True, 227 * KIB, 132), torch.float8_e4m3fn),
    Gpu("sm_100", GPUTarget("cuda", 100, 32), Target(True, 227 * KIB, 148), torch.float8_e4m3fn),
    Gpu("sm_120", GPUTarget("cuda", 120, 32), Target(False, 99 * KIB, 188), torch.float8_e4m3fn),
    Gpu("gfx942", GPUTarget("hip", "gfx942", 64), Target(False, 64 * KIB, 304), torch.float8_e4m3fnuz),
]


@dataclass(frozen=True)
class Shape:
    """One draft pass, or one pass with verification rows and hypotheses."""

    name: str
    head_dim: int
    groups: int
    width: int
    blocks: int = 1
    verify: int = 0
    ragged: bool = False  # as the engine's: requests may have fewer verification rows
    page: int = 16
    num_reqs: int = 1
    fp8: bool = True  # such a cache, too


# The released heads under `vllm serve`, with every setting at its default.
RELEASED = DraftShape(
    block=16,
    drafts=15,
    drafting_rows=16,
    mask_token_id=151669,
    hypotheses=4,
    rows=192,
    max_num_reqs=1024,
    max_pass_rows=MAX_PASS_ROWS,
    modes=(0, 3, 7, 14, 15),
)
MAX_MODEL_LEN, VOCABULARY, HIDDEN = 40960, 151936, 4096


def released_shapes() -> Iterator[Shape]:
    """Every pass that these engines may run."""
    shape = RELEASED
    for model, groups, fp8 in (("Qwen3-8B and 4B", 4, True), ("Qwen3-1.7B", 2, False)):
        of_model = Shape(model, 128, groups, shape.block, fp8=fp8)
        for num_reqs in range(1, shape.at_once + 1):
            for width in shape.widths:
                yield replace(of_model, name=f"{model}, draft of {width}", width=width, num_reqs=num_reqs)
        for num_reqs in range(1, shape.most_carried + 1):
            blocks = shape.num_hypotheses(num_reqs)
            carried = replace(of_model, blocks=blocks, num_reqs=num_reqs)
            yield replace(carried, name=f"{model}, {blocks} x {shape.block} beside 16")
            yield replace(
                carried, name=f"{model}, 16 + {blocks} x {shape.block}, fused", verify=shape.verified, ragged=True
            )


# Other blocks, groups, pages and heads than those.
OTHERS = [
    Shape("4 rows", 128, 2, 2),
    Shape("draft of 8, 16/8 heads", 128, 2, 8),
    Shape("draft of 16, 32/8 heads", 128, 4, 16),
    Shape("draft of 16, 32/8 heads, pages of 64", 128, 4, 16, page=64),
    Shape("9 + 4 x 8 rows in one pass", 128, 4, 8, blocks=4, verify=9),
    Shape("16 + 8 x 16 rows in one pass, ragged", 128, 4, 16, blocks=8, verify=16, ragged=True),
    Shape("draft of 16, head_dim 64", 64, 4, 16),
    Shape("draft of 16, head_dim 256", 256, 4, 16),
]


class Call(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]


@contextmanager
def recorded(module: Any, *names: str) -> Iterator[list[Call]]:
    """Collect what the host code would launch."""
    calls: list[Call] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                calls.append(Call(self.kernel, dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs))

            return launch

    with ExitStack() as patches:
        for name in names:
            patches.enter_context(mock.patch.object(module, name, Recorder(getattr(module, name))))
        yield calls


def empty(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def attention_launches(shape: Shape, gpu: Gpu, cache_dtype: torch.dtype) -> tuple[list[Call], attention.Plan]:
    dtype, kv_heads, heads = torch.bfloat16, 8, 8 * shape.groups
    stored = empty(PAGES, shape.page, kv_heads, 2 * shape.head_dim, dtype=cache_dtype)
    keys, values = stored.transpose(1, 2).split(shape.head_dim, dim=-1)
    scale = empty(1, dtype=torch.float32) if cache_dtype.itemsize == 1 else None
    table = empty(shape.num_reqs, MAX_MODEL_LEN // shape.page, dtype=torch.int32)
    cache = attention.PagedCache(keys, values, table, shape.page, scale, scale)
    rows = shape.num_reqs * shape.blocks * shape.width
    verification = None
    if shape.verify:
        count = shape.num_reqs * shape.verify
        verification = attention.Verification(
            empty(count, heads, shape.head_dim, dtype=dtype),
            empty(count, dtype=torch.int32),
            shape.verify,
            empty(count, heads, shape.head_dim, dtype=dtype),
            empty(shape.num_reqs + 1, dtype=torch.int32) if shape.ragged else None,
        )
    per_request = shape.verify + shape.blocks * shape.width
    plan = attention.make_plan(
        shape.num_reqs, per_request, heads, kv_heads, shape.head_dim, dtype, cache_dtype, "meta", target=gpu.target
    )
    # Queries and keys come out of norm and rotation, values straight out of the projection of all three.
    projected = empty(rows, heads + 2 * kv_heads, shape.head_dim, dtype=dtype)
    with recorded(attention, "_attend_kernel", "_merge_kernel") as calls:
        attention.launch(
            empty(rows, heads, shape.head_dim, dtype=dtype),
            empty(rows, kv_heads, shape.head_dim, dtype=dtype),
            projected[:, heads + kv_heads :],
            cache,
            empty(shape.num_reqs, shape.blocks, dtype=torch.int32),
            shape.head_dim**-0.5,
            plan=plan,
            verification=verification,
        )
    return calls, plan


def rotation_launches(shape: Shape) -> list[Call]:
    """Of what precedes this attention, with weights in each view and a cache in the rows' type."""
    dtype, kv_heads = torch.bfloat16, 8
    heads = norm_rotate.Heads(kv_heads * shape.groups, kv_heads, shape.head_dim)

    def view(rows: int) -> norm_rotate.Projected:
        width = (heads.queries + 2 * heads.keys) * heads.dim
        return norm_rotate.Projected(
            empty(rows, width, dtype=dtype), empty(rows), empty(heads.dim, dtype=dtype), empty(heads.dim, dtype=dtype)
        )

    drafted, rows = view(shape.num_reqs * shape.blocks * shape.width), shape.num_reqs * RELEASED.verified
    stored = empty(PAGES, shape.page, kv_heads, 2 * heads.dim, dtype=dtype)
    cache = norm_rotate.CacheSlots(*stored.transpose(1, 2).split(heads.dim, dim=-1), empty(rows))
    given = (heads, empty(MAX_MODEL_LEN, heads.dim, dtype=dtype), 1e-6)
    with recorded(norm_rotate, "_norm_rotate_kernel") as calls:
        norm_rotate.launch((drafted,), *given)  # a draft pass
        norm_rotate.launch((view(rows), drafted), *given, cache)
    return calls


def bookkeeping_launches(num_reqs: int) -> dict[str, Call]:
    """What surrounds the forwards of so many requests with the released heads."""
    int32, float32, shape = torch.int32, torch.float32, RELEASED
    slots, room, num_hypotheses = shape.max_num_reqs, shape.at_once, shape.num_hypotheses(num_reqs)
    batch = prepare_block.BatchState(
        empty(num_reqs), empty(num_reqs + 1, dtype=int32), empty(8192), empty(num_reqs, dtype=int32),
        empty(num_reqs, dtype=int32), empty(slots, 1), empty(1, slots, dtype=int32),
    )  # fmt: skip
    sources, targets = (empty(size, MAX_MODEL_LEN // 16, dtype=int32) for size in (slots, room))
    tables = prepare_block.BlockTables([sources], [targets], [16], empty(1, 5))
    rows = prepare_block.BlockRows(
        empty(room, shape.block), empty(room, shape.block), empty(room, dtype=int32), empty(room, shape.drafts), tables
    )
    with recorded(prepare_block, "_prepare_blocks_kernel") as prepare:
        prepare_block.launch(empty(num_reqs), batch, rows, shape.mask_token_id, MAX_MODEL_LEN, None, -1)
    remembered = remembered_slots(shape)
    blocks = prepare_hypotheses.HypothesisBlocks(
        empty(num_reqs, num_hypotheses, shape.block),
        empty(num_reqs, num_hypotheses, shape.block),
        empty(num_reqs, num_hypotheses, dtype=int32),
    )
    with recorded(prepare_hypotheses, "_prepare_hypotheses_kernel") as ride_along:
        prepare_hypotheses.launch(
            num_reqs,
            remembered.hypotheses,
            prepare_hypotheses.VerifyBatch(*batch[:3]),
            blocks,
            shape.mask_token_id,
            MAX_MODEL_LEN,
        )
    slot, anchors = rows.slots[:num_reqs, 0], rows.input_ids[:num_reqs, 0]
    with recorded(take_up, "_take_up_kernel") as taken_up:
        outcome = take_up.Outcome(slot, empty(num_reqs), empty(num_reqs), anchors)
        take_up.launch(outcome, blocks.prefix_lengths, remembered, empty(len(take_up.COUNTERS)), shape.block)
    with recorded(take_rows, "_take_rows_kernel") as taken:
        hidden = empty(num_reqs, num_hypotheses, shape.block, HIDDEN, dtype=torch.bfloat16)
        kept = empty(shape.most_carried + 1, shape.block, HIDDEN, dtype=torch.bfloat16)
        place = empty(slots + 1)
        take_rows.launch(hidden, empty(num_reqs), slot, place, remembered.offset, kept, shape.drafts)
        carried = empty(num_reqs, num_hypotheses, shape.block, VOCABULARY, dtype=torch.bfloat16)
        kept = empty(shape.most_carried + 1, shape.block, VOCABULARY, dtype=torch.bfloat16)
        take_rows.launch(carried, empty(num_reqs), slot, place, remembered.offset, kept, shape.drafts)
    drafts, temperature = empty(num_reqs, shape.drafts), empty(num_reqs, dtype=float32)
    with recorded(most_probable, "_scan_kernel", "_merge_scans_kernel") as look:
        logits = empty(num_reqs * shape.verified, VOCABULARY, dtype=torch.bfloat16)
        said = most_probable.launch(logits, drafts, temperature, chances.LOOKED_AT)
    with recorded(most_probable, "_scan_kernel", "_merge_scans_kernel") as look_before:
        candidates = most_probable.launch_likeliest(logits, True, temperature, CANDIDATES)
    with recorded(select, "_select_kernel") as selected:
        keys, seeds, tables = (
            empty(num_reqs, shape.drafts),
            empty(slots + 1),
            (empty(VOCABULARY, RANK, dtype=torch.bfloat16),) * 2,
        )
        of_slots = (slots + 1, shape.drafts)
        kept_logits = empty(*of_slots, VOCABULARY, dtype=torch.bfloat16)
        written = empty(*of_slots, CANDIDATES, dtype=torch.int32)
        gates = empty(len(logits), RANK, dtype=torch.bfloat16)
        of_requests = select.Blocks(slot, anchors, empty(num_reqs), temperature, gates)
        drawn = select.Kept(seeds, keys, kept_logits, written)
        select.launch(candidates, of_requests, select.Tables(*tables), drafts, chances.LOOKED_AT, drawn)
    with recorded(choose, "_choose_kernel") as chosen:
        drafted = choose.Drafted(slot, rows.positions[:num_reqs, 0], anchors, drafts, temperature)
        values = empty(shape.block + 1, dtype=float32)
        choose.launch(drafted, said, values, remembered, shape.drafting_rows, shape.block)
    names = ("prepare", "prepare hypotheses", "take up", "take rows", "take logits")
    names += ("scan logits", "merge scans", "scan candidates", "merge candidates", "select", "choose")
    launches = (*prepare, *ride_along, *taken_up, *taken, *look, *look_before, *selected, *chosen)
    return dict(zip(names, launches, strict=True))


def remembered_slots(shape: DraftShape) -> Slots:
    int64, float32 = torch.int64, torch.float32

    def by_slot(*size: int, dtype: torch.dtype = int64) -> Tensor:
        return empty(shape.max_num_reqs + 1, *size, dtype=dtype)

    ranks, buckets = chances.CANDIDATES, len(chances.EDGES) + 1
    tables = [empty(2, kinds, buckets, dtype=float32) for kinds in (chances.KINDS, ranks) for _ in range(2)]
    return Slots(
        by_slot(),
        by_slot(dtype=torch.bool),
        Remembered(by_slot(), by_slot(shape.hypotheses), by_slot(shape.hypotheses)),
        chances.Drafts(
            by_slot(shape.drafts),
            by_slot(),
            by_slot(),
            by_slot(shape.drafts, dtype=float32),
            by_slot(shape.verified, ranks),
            by_slot(shape.verified, ranks, dtype=float32),
        ),
        chances.History(by_slot(dtype=float32), by_slot(dtype=float32)),
        chances.Calibration(*tables),
    )
