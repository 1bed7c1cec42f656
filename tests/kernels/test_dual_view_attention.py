from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from benchmarks.cases import CPU_LAYOUT, LAYOUTS, Case, build, check, judge, launch
from vllm_orthrus.kernels.dual_view_plan import Tiles

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    page = draw(st.sampled_from((16, 32, 64, 128, 256)))
    ratio = draw(st.sampled_from((1, 2, 3, 8)))
    block = page * ratio
    edges = [0, 1, page - 1, page, page + 1, block - 1, block, block + 1, 2 * block + 3]
    lengths = st.one_of(st.sampled_from(edges), st.integers(0, 300), st.just(-1))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    cache_dtype = draw(st.sampled_from((None, None, *FP8)))
    blocks = draw(st.sampled_from((1, 1, 2, 5)))
    positions = draw(st.sampled_from((16, 64, 256)))
    return Case(
        prefixes=tuple(draw(st.lists(lengths, min_size=1, max_size=3))),
        width=draw(st.sampled_from((1, 2, 3, 5, 8, 13, 16) if blocks > 1 else (1, 2, 7, 16, 31, 64))),
        blocks=blocks,
        verify=draw(st.sampled_from((0, 0, 1, 4, 9))),
        ragged=draw(st.booleans()),
        kv_heads=draw(st.sampled_from((1, 2))),
        groups=draw(st.sampled_from((1, 2, 3, 4, 8, 16))),
        head_dim=draw(st.sampled_from((64, 128, 256))),
        page=page,
        ratio=ratio,
        layout=draw(st.sampled_from((*LAYOUTS, CPU_LAYOUT))),
        dtype=dtype,
        cache_dtype=cache_dtype,
        scales="none" if cache_dtype is None else draw(st.sampled_from(("none", "tensor", "head"))),
        splits=draw(st.sampled_from((1, 2, 3, 7))),
        tiles=Tiles(draw(st.sampled_from((64, 256, 1024))), positions, 1, 1, 1),
        out_dtype=torch.float32,  # the interpreter cuts bfloat16 off where devices round
        seed=draw(st.integers(0, 2**16)),
    )


@given(cases())
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=(Phase.generate,),  # a case is small enough to read as it is found
    suppress_health_check=list(HealthCheck),
)
def test_any_case(case: Case) -> None:
    verdict = check(case)
    assert not verdict, verdict


@pytest.mark.parametrize("layout", (*LAYOUTS, CPU_LAYOUT))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    """Default tiles, as the engine on a CPU uses them."""
    case = Case((37, -1, 0), width=5, verify=3, layout=layout, dtype=dtype, ratio=2, out_dtype=torch.float32)
    verdict = check(case)
    assert not verdict, verdict


@pytest.mark.parametrize("cache_dtype", FP8)
@pytest.mark.parametrize("scales", ("tensor", "head"))
def test_quantized_cache(cache_dtype: torch.dtype, scales: str) -> None:
    case = Case(
        (70, 16), dtype=torch.bfloat16, cache_dtype=cache_dtype, scales=scales, splits=3, out_dtype=torch.float32
    )
    verdict = check(case)
    assert not verdict, verdict


def test_verification_and_hypotheses_share_a_launch() -> None:
    """K + 1 verification rows and H blocks of each request, more rows than one tile holds."""
    tiles = Tiles(64, 32, 1, 1, 1)
    case = Case((90, 3, -1), width=8, blocks=4, verify=9, groups=4, splits=2, tiles=tiles)
    verdict = check(case)
    assert not verdict, verdict


def test_longest_context() -> None:
    case = Case((131072,), width=3, kv_heads=1, groups=1, splits=2, tiles=Tiles(16, 4096, 1, 1, 1), ratio=8, page=256)
    verdict = check(case)
    assert not verdict, verdict


@pytest.mark.slow
def test_many_requests() -> None:
    prefixes = tuple(5 if req % 64 == 0 else -1 for req in range(1024))
    verdict = check(Case(prefixes, width=2, kv_heads=1, groups=1))
    assert not verdict, verdict


def test_padded_requests_read_nothing() -> None:
    """A batch in which no request is real: no page is read, though every page is NaN, and all rows become zero."""
    case = Case((-1, -1), width=3, verify=2, splits=2, tiles=Tiles(16, 16, 1, 1, 1))
    inputs = build(case)
    inputs.cache.keys.fill_(torch.nan)
    inputs.k.fill_(torch.nan)
    launch(inputs, case)
    assert (inputs.out == 0).all()
    assert inputs.verification is not None
    assert (inputs.verification.out == 0).all()


@pytest.mark.parametrize("splits", (1, 2, 5))
def test_deterministic(splits: int) -> None:
    case = Case((100, 17), blocks=2, verify=3, splits=splits, tiles=Tiles(16, 16, 1, 1, 1))
    first, second = build(case), build(case)
    launch(first, case)
    launch(second, case)
    assert torch.equal(first.out, second.out)
    assert not judge(first, case)


def test_lengths_beyond_the_table_are_cut() -> None:
    """A wrong length costs a wrong answer and never a read past the table."""
    case = Case((32,), splits=1)
    inputs = build(case)
    table = inputs.cache.block_table[:, :2].clone()
    inputs = inputs._replace(cache=inputs.cache._replace(block_table=table))
    inputs.prefix_lengths.fill_(10**6)
    launch(inputs, case)
    inputs.prefix_lengths.fill_(32)
    assert not judge(inputs, case)
