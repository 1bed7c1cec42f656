"""Inputs for the dual-view attention that are as nasty as an engine's, and the check of a result against `naive`.

Slots that hold no position are NaN, block tables are shuffled and hold garbage behind each length, outputs are NaN with
a margin that must stay untouched, and the physical order of the cache is any of vLLM's.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_orthrus.kernels import dual_view_attention as dual_view
from vllm_orthrus.kernels.dual_view_attention import PagedCache, Tiles, Verification, make_plan

# Outermost to innermost: layer, block (page), head, slot N, content (key then value).
LAYOUTS = ("LBNHC", "LBHNC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
CPU_LAYOUT = "CPU"  # per page and head all keys, dimension by dimension, and then all values
GARBAGE = (2**31 - 1, -1, -(2**31), 12345678)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3}


@dataclass(frozen=True)
class Case:
    prefixes: tuple[int, ...]  # cached positions before each request's newest rows; -1: a padded request
    width: int = 4
    blocks: int = 1
    verify: int = 0
    ragged: bool = False
    kv_heads: int = 2
    groups: int = 2
    head_dim: int = 64
    page: int = 16
    ratio: int = 1  # pages per block of the table
    layout: str = "LBNHC"
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None  # None: dtype
    scales: str = "none"  # none, tensor, head
    splits: int | None = 1
    tiles: Tiles | None = None
    out_dtype: torch.dtype | None = None  # None: dtype
    harmless: bool = False  # garbage in the table points at an unused page, so that following it does not crash
    seed: int = 0


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    cache: PagedCache
    prefix_lengths: Tensor
    scale: float
    verification: Verification | None
    out: Tensor  # inside out_margin
    out_margin: Tensor
    verify_margin: Tensor | None


@dataclass
class Verdict:
    """What is wrong with a result; falsy if nothing is."""

    worst: float = 0.0  # the largest error of a row and head, relative to that row's norm
    overall: float = 0.0  # the norm of all errors relative to the norm of all rows
    problems: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.problems)


def build(case: Case, device: torch.device | str = "cpu") -> Inputs:
    gen = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen)

    def rows(num: int, heads: int) -> Tensor:
        """[num, heads, dim] whose rows stand inside wider ones, as the q of a packed projection does."""
        return normal(num, heads + 1, case.head_dim).to(case.dtype).to(device)[:, :heads]

    num_reqs, heads = len(case.prefixes), case.kv_heads * case.groups
    written = [max(p, 0) + case.verify for p in case.prefixes]  # verification rows stand in the cache already
    cache = _cache(case, written, normal, gen, device)

    lengths = torch.full((num_reqs, case.blocks), -1, dtype=torch.int32)
    for req, prefix in enumerate(case.prefixes):
        if prefix >= 0:
            spread = torch.randint(0, case.verify + 1, (case.blocks,), generator=gen)
            absent = torch.rand(case.blocks, generator=gen) < (0.2 if case.blocks > 1 else 0.0)
            lengths[req] = torch.where(absent, -1, prefix + spread)

    num_rows = num_reqs * case.blocks * case.width
    margin = torch.full((num_rows + 2, heads + 1, case.head_dim), math.nan, dtype=case.out_dtype or case.dtype)
    margin = margin.to(device)
    verification, verify_margin = None, None
    if case.verify:
        counts = torch.full((num_reqs,), case.verify)
        if case.ragged:
            counts = torch.randint(0, case.verify + 1, (num_reqs,), generator=gen)
        starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).int()
        visible = [
            prefix + row + 1 if prefix >= 0 else -1
            for prefix, count in zip(case.prefixes, counts.tolist(), strict=True)
            for row in range(count)
        ]
        verify_margin = torch.full((len(visible) + 2, heads, case.head_dim), math.nan, dtype=margin.dtype).to(device)
        verification = Verification(
            rows(len(visible), heads),
            torch.tensor(visible, dtype=torch.int64, device=device),
            case.verify,
            verify_margin[1:-1],
            starts.to(device) if case.ragged else None,
        )
    return Inputs(
        rows(num_rows, heads),
        rows(num_rows, case.kv_heads),
        rows(num_rows, case.kv_heads),
        cache,
        lengths.to(device),
        case.head_dim**-0.5,
        verification,
        margin[1:-1, :heads],
        margin,
        verify_margin,
    )


def _cache(
    case: Case, written: list[int], normal: Callable[..., Tensor], gen: torch.Generator, device: torch.device | str
) -> PagedCache:
    block_size = case.page * case.ratio
    needed = [-(-length // block_size) for length in written]
    num_blocks = sum(needed) + 2  # block 0 belongs to nobody, and one more that nobody uses
    ids = (torch.randperm(num_blocks - 1, generator=gen) + 1).tolist()
    garbage = itertools.cycle(ids[:1] if case.harmless else GARBAGE)
    table = torch.tensor([[next(garbage) for _ in range(max(needed) + 2)] for _ in written], dtype=torch.int32)
    used = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    for req, length in enumerate(written):
        for block in range(needed[req]):
            table[req, block] = ids.pop()
            used[int(table[req, block]), : length - block * block_size] = True

    num_pages, dim = num_blocks * case.ratio, case.head_dim
    content = normal(num_pages, case.kv_heads, case.page, 2 * dim)
    content[~used.view(num_pages, case.page)[:, None].expand(-1, case.kv_heads, -1)] = math.nan
    dtype = case.cache_dtype or case.dtype
    if case.layout == CPU_LAYOUT:
        keys, values = content.split(dim, dim=-1)
        stored = torch.stack([keys.transpose(2, 3).flatten(2), values.flatten(2)], dim=2).to(dtype).to(device)
        keys = stored[:, :, 0].view(num_pages, case.kv_heads, dim, case.page).transpose(2, 3)
        values = stored[:, :, 1].view(num_pages, case.kv_heads, case.page, dim)
    else:
        layers = torch.stack([torch.full_like(content, math.nan), content])  # named "LBHNC"
        order = ["LBHNC".index(axis) for axis in case.layout]
        physical = layers.permute(order).contiguous().to(dtype).to(device)
        logical = physical.permute([case.layout.index(axis) for axis in "LBHNC"])
        keys, values = logical[1].split(dim, dim=-1)

    scales: list[Tensor | None] = [None, None]
    if case.scales != "none":
        shape = () if case.scales == "tensor" else (case.kv_heads,)
        scales = [(torch.rand(shape, generator=gen) + 0.5).to(device) for _ in range(2)]
    return PagedCache(keys, values, table.to(device), block_size, *scales)


def launch(inputs: Inputs, case: Case, attention: Callable[..., Tensor] = dual_view.launch) -> None:
    heads, dim = inputs.q.shape[1:]
    rows = case.verify + case.blocks * case.width
    cache = inputs.cache
    plan = make_plan(
        len(case.prefixes),
        rows,
        heads,
        case.kv_heads,
        dim,
        inputs.q.dtype,
        cache.keys.dtype,
        inputs.q.device,
        case.splits,
        case.tiles,
    )
    if plan.partial is not None and plan.lse is not None:
        plan.partial.fill_(math.nan)
        plan.lse.fill_(math.nan)
    attention(
        inputs.q, inputs.k, inputs.v, cache, inputs.prefix_lengths, inputs.scale, inputs.out, plan, inputs.verification
    )


def judge(inputs: Inputs, case: Case) -> Verdict:
    """Compare what a launch left in the outputs with `naive` in float64 on the same inputs."""
    verdict, verification = Verdict(), inputs.verification
    if verification is not None:
        verification = verification._replace(out=torch.zeros_like(verification.q, dtype=torch.float64))
    expected = torch.empty_like(inputs.q, dtype=torch.float64)
    given = (inputs.q, inputs.k, inputs.v, inputs.cache, inputs.prefix_lengths, inputs.scale)
    dual_view.naive(*given, out=expected, verification=verification)
    pairs = [("block rows", inputs.out, expected, inputs.out_margin)]
    if inputs.verification is not None and verification is not None and inputs.verify_margin is not None:
        pairs.append(("verification rows", inputs.verification.out, verification.out, inputs.verify_margin))
    tolerance = TOLERANCE[case.dtype]
    for name, found, wanted, margin in pairs:
        if not found.numel():
            continue
        if not found.isfinite().all():
            verdict.problems.append(f"{name}: {int((~found.isfinite()).sum())} elements are not finite")
            continue
        error = found.double() - wanted
        row_error = error.norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-6)
        verdict.worst = max(verdict.worst, float(row_error.max()))
        overall = float(error.norm() / wanted.norm().clamp(min=1e-6))
        verdict.overall = max(verdict.overall, overall)
        if overall > tolerance:
            verdict.problems.append(f"{name}: relative error {overall:.2e} > {tolerance:.0e}")
        if float(row_error.max()) > 4 * tolerance:
            verdict.problems.append(f"{name}: relative error of one row {float(row_error.max()):.2e}")
        if (wanted.norm(dim=-1) == 0).logical_and(found.double().norm(dim=-1) != 0).any():
            verdict.problems.append(f"{name}: rows that see nothing must be zero")
        untouched = int(margin.isnan().sum()) == margin.numel() - found.numel()
        if not untouched:
            verdict.problems.append(f"{name}: wrote outside the output")
    return verdict


def check(
    case: Case, device: torch.device | str = "cpu", attention: Callable[..., Tensor] = dual_view.launch
) -> Verdict:
    inputs = build(case, device)
    launch(inputs, case, attention)
    return judge(inputs, case)
