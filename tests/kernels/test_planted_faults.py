"""The check that every other test relies on must turn red for each way in which the kernel could be wrong."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.cases import Case, check
from vllm_orthrus.kernels import dual_view_attention
from vllm_orthrus.kernels.dual_view_plan import Tiles

PLAIN = Case((37, 96, 0), harmless=True)
DRAFTS = replace(PLAIN, width=5, splits=2, tiles=Tiles(16, 32, 1, 1, 1), ratio=2)
MIXED = replace(PLAIN, width=5, blocks=3, verify=4, groups=4, splits=2, tiles=Tiles(32, 16, 1, 1, 1))
STEPS = replace(MIXED, prefixes=(94, 30, -1))  # rows of one tile whose prefixes end in different steps
QUANTIZED = replace(
    PLAIN, dtype=torch.bfloat16, cache_dtype=torch.float8_e4m3fn, scales="head", out_dtype=torch.float32
)
LARGE_PAGES = replace(PLAIN, page=32, ratio=2, tiles=Tiles(16, 16, 1, 1, 1))

# name: (a case that shows it, the code, the code with the fault)
FAULTS = {
    "prefix one too long": (DRAFTS, "position[None, :] < length[:, None]", "position[None, :] <= length[:, None]"),
    "prefix one too short": (DRAFTS, "position[None, :] < length[:, None]", "position[None, :] < length[:, None] - 1"),
    "unused slots read": (DRAFTS, "exists = (position < longest)", "exists = (position < longest + 1)"),
    "values of unused slots kept": (DRAFTS, "v = tl.load(value_at, mask=exists, other=0.0)", "v = tl.load(value_at)"),
    "look-up of the step before": (DRAFTS, "block = following", "block = block"),
    "look-up of the step before, short rows": (
        STEPS,
        "block = _look_up(table, at + TILE_N",
        "block = _look_up(table, at",
    ),
    "block keys zeroed": (DRAFTS, "_dot(q, tl.trans(k),", "_dot(q, tl.trans(k * 0),"),
    "block values zeroed": (DRAFTS, "scores, v, WIDEN)", "scores, v * 0, WIDEN)"),
    "causal inside the block": (DRAFTS, "seen = same_block", "seen = (column[None, :] <= own[:, None]) & same_block"),
    "blocks see each other": (MIXED, "seen = same_block &", "seen ="),
    "verification rows see a block": (MIXED, "exists[None, :] & in_block[:, None]", "exists[None, :]"),
    "verification row without its own key": (
        MIXED,
        "mask=verifies, other=-1).to(tl.int32)",
        "mask=verifies, other=-1).to(tl.int32) - 1",
    ),
    "absent rows not zeroed": (MIXED, "tl.where((length >= 0)[:, None], result, 0.0)", "result"),
    "heads of a group mixed up": (DRAFTS, "head = kv_head * SHAPE.groups + m", "head = kv_head + m"),
    "heads interleaved": (
        DRAFTS,
        "head = kv_head * SHAPE.groups + m % SHAPE.groups",
        "head = m % SHAPE.groups * 2 + kv_head",
    ),
    "wrong key-value head of the cache": (DRAFTS, "cached.k + kv_head.to", "cached.k + (1 - kv_head).to"),
    "wrong key-value head of the block": (DRAFTS, "(row * fresh.k_row + kv_head", "(row * fresh.k_row + (1 - kv_head)"),
    "request's table row forgotten": (DRAFTS, "table += req.to(tl.int64) * table_row", "table += 0"),
    "pages of a block not told apart": (DRAFTS, "first % LAYOUT.block_size // LAYOUT.page", "first * 0"),
    "pages of a block not told apart, one look-up": (
        LARGE_PAGES,
        "first % LAYOUT.block_size // LAYOUT.page",
        "first * 0",
    ),
    "place in a large page forgotten": (LARGE_PAGES, "slot = position % LAYOUT.page", "slot = tl.arange(0, TILE_N)"),
    "key scale forgotten": (QUANTIZED, "if LAYOUT.k_scales > 0:", "if LAYOUT.k_scales > 99:"),
    "value scale forgotten": (QUANTIZED, "if LAYOUT.v_scales > 0:", "if LAYOUT.v_scales > 99:"),
    "one head's scale for all": (QUANTIZED, "kv_head if LAYOUT.v_scales > 1 else 0", "0"),
    "value scale on the block too": (QUANTIZED, "result = acc / tl", "result = acc * tl.load(cached.v_scale) / tl"),
    "key scale on the block too": (QUANTIZED, "WIDEN) * scale  # [TILE_M, TILE_C]", "WIDEN) * prefix_scale"),
    "accumulator not shrunk": (DRAFTS, "acc * shrink[:, None], WIDEN)", "acc, WIDEN)"),
    "sum not shrunk": (DRAFTS, "total = total * shrink + tl.sum(weights, 1)", "total = total + tl.sum(weights, 1)"),
    "a split left out": (DRAFTS, "holding = tl.load(out.active + tile)", "holding = tl.load(out.active + tile) - 1"),
    "splits not weighed": (DRAFTS, "weight = tl.exp2(weight - base[None, :])", "weight = tl.exp2(weight * 0)"),
    "block of another request": (DRAFTS, "row = req.to(tl.int64)", "row = (req // 2).to(tl.int64)"),
    "blocks of a later tile missed": (MIXED, "// SHAPE.groups - SHAPE.verify, 0)", "// SHAPE.groups, 0)"),
}


@pytest.fixture
def mutant(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ModuleType]:
    """The operator with one piece of its code replaced, which must occur in it. Triton reads kernels from a file."""
    source = Path(str(dual_view_attention.__file__)).read_text()
    before, after = request.param
    assert before in source, "this fault no longer exists; plant it where the code is now"
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(before, after))
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutant"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mutant"]


@pytest.mark.parametrize("case", (DRAFTS, MIXED, STEPS, QUANTIZED, LARGE_PAGES))
def test_without_a_fault(case: Case) -> None:
    verdict = check(case)
    assert not verdict, verdict


@pytest.mark.parametrize(
    ("case", "mutant"), [(case, change) for case, *change in FAULTS.values()], ids=FAULTS, indirect=["mutant"]
)
def test_fault_is_caught(case: Case, mutant: ModuleType) -> None:
    assert check(case, attention=mutant.launch)
