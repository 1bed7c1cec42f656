"""Norms, rotation and the write to the cache of both views' rows, against the PyTorch twin."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_orthrus.kernels import norm_rotate
from vllm_orthrus.kernels.norm_rotate import CacheSlots, Heads, Projected

POSITIONS, PAGE, PAGES, EPS = 50, 4, 5, 1e-6
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def view(rows: int, heads: Heads, norm: bool, dtype: torch.dtype, gen: torch.Generator) -> Projected:
    width = (heads.queries + 2 * heads.keys) * heads.dim
    weights = [(torch.rand(heads.dim, generator=gen) + 0.5).to(dtype) if norm else None for _ in range(2)]
    qkv = torch.randn(rows, width, generator=gen).to(dtype)
    return Projected(qkv, torch.randint(0, POSITIONS, (rows,), generator=gen), *weights)


def angles(heads: Heads, dtype: torch.dtype) -> Tensor:
    turns = torch.arange(POSITIONS)[:, None] / 10000 ** (torch.arange(heads.dim // 2) / (heads.dim // 2))
    return torch.cat((turns.cos(), turns.sin()), dim=-1).to(dtype)


def cache_of(rows: int, heads: Heads, dtype: torch.dtype, keys_innermost: bool, gen: torch.Generator) -> CacheSlots:
    """Keys may stand with the positions innermost. Some rows go nowhere, and the last has no slot at all."""
    keys, values = (torch.full((PAGES, heads.keys, PAGE, heads.dim), torch.nan, dtype=dtype) for _ in range(2))
    if keys_innermost:
        keys = keys.transpose(2, 3).contiguous().transpose(2, 3)
    slots = torch.randperm(PAGES * PAGE, generator=gen)[: max(rows - 1, 0)]
    return CacheSlots(keys, values, torch.where(torch.rand(len(slots), generator=gen) < 0.3, -1, slots))


def both(views: tuple[Projected, ...], heads: Heads, cache: CacheSlots | None, dtype: torch.dtype) -> list[Tensor]:
    """Either form leaves the same behind: that of the kernel is returned."""
    ended = []
    for form in (norm_rotate.naive, norm_rotate.launch):
        own = tuple(one._replace(qkv=one.qkv.clone()) for one in views)
        kept = None if cache is None else cache._replace(k=cache.k.clone(), v=cache.v.clone())
        form(own, heads, angles(heads, dtype), EPS, kept)
        ended.append([*(one.qkv for one in own), *([] if kept is None else kept[:2])])
    for expected, found in zip(*ended, strict=True):
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)
    return ended[1]


@given(
    st.integers(1, 4),
    st.integers(0, 4),
    st.sampled_from([(1, 1), (4, 2), (9, 3)]),
    st.sampled_from([16, 64]),
    st.sampled_from(list(TOLERANCE)),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=15)
def test_equals_naive(
    verified: int,
    drafted: int,
    sizes: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    norm: bool,
    writes: bool,
    innermost: bool,
    seed: int,
) -> None:
    gen, heads = torch.Generator().manual_seed(seed), Heads(*sizes, dim)
    views = tuple(view(rows, heads, norm, dtype, gen) for rows in (verified, drafted) if rows or not drafted)
    both(views[: 1 + (drafted > 0)], heads, cache_of(verified, heads, dtype, innermost, gen) if writes else None, dtype)


def test_what_it_computes() -> None:
    """By hand: rows of norm 1 after the norm, turned by their angle; values as they were; keys and values cached."""
    gen, heads = torch.Generator().manual_seed(3), Heads(2, 1, 16)
    views = tuple(view(3, heads, True, torch.float32, gen) for _ in range(2))
    cache = CacheSlots(*(torch.zeros(2, 1, PAGE, 16) for _ in range(2)), torch.tensor([6, -1]))
    verified, drafted, keys, values = both(views, heads, cache, torch.float32)
    for before, after in zip(views, (verified, drafted), strict=True):
        assert before.q_weight is not None
        q = before.qkv[1, 16:32]
        q = q / (q.square().mean() + EPS).sqrt() * before.q_weight
        turned = torch.view_as_complex(torch.stack((q[:8], q[8:]), dim=-1))
        turned = turned * torch.polar(torch.ones(8), before.positions[1] / 10000 ** (torch.arange(8) / 8))
        torch.testing.assert_close(after[1, 16:32], torch.cat((turned.real, turned.imag)))
        assert torch.equal(after[:, 48:], before.qkv[:, 48:]), "values are not touched"
    assert torch.equal(keys[1, 0, 2], verified[0, 32:48])
    assert torch.equal(values[1, 0, 2], verified[0, 48:])
    assert keys.count_nonzero() == values.count_nonzero() == 16, "row 1 goes nowhere, row 2 has no slot"


def test_a_cache_of_another_type() -> None:
    gen, heads = torch.Generator().manual_seed(5), Heads(2, 2, 16)
    views = (view(3, heads, True, torch.float32, gen),)
    both(views, heads, cache_of(3, heads, torch.float16, False, gen), torch.float32)
