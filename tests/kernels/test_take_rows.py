"""The block that comes to hand and its rows that draft, against the PyTorch twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_orthrus.kernels import take_rows

SLOTS = 5


def case(reqs: int, hypotheses: int, block: int, size: int, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Blocks that no outcome asks for are NaN, and so are those that are kept of nobody who has one."""
    gen = torch.Generator().manual_seed(seed)
    which = torch.randint(-1, hypotheses, (reqs,), generator=gen)
    slot = torch.randperm(SLOTS, generator=gen)[:reqs]
    if reqs > 1:
        slot[-1], which[-1] = -1, -1
    hidden = torch.full((reqs, hypotheses, block, size), torch.nan, dtype=dtype)
    kept = torch.full((reqs + 1, block, size), torch.nan, dtype=dtype)
    place = torch.full((SLOTS + 1,), reqs)
    for r in range(reqs):
        place[slot[r]] = reqs if slot[r] < 0 else r
        fresh = torch.randn(block, size, generator=gen).to(dtype)
        if which[r] >= 0:
            hidden[r, which[r]] = fresh
        else:
            kept[place[slot[r]]] = fresh
    offset = torch.randint(0, 2 * block, (SLOTS + 1,), generator=gen)
    return {"hidden": hidden, "which": which, "slot": slot, "place": place, "offset": offset, "kept": kept}


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 8),
    st.sampled_from([1, 7, 64, 2500]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=15)
def test_equals_naive(
    reqs: int, hypotheses: int, block: int, drafts: int, size: int, dtype: torch.dtype, seed: int
) -> None:
    given_case = case(reqs, hypotheses, block, size, dtype, seed)
    kept = [given_case["kept"].clone() for _ in range(2)]
    expected = take_rows.naive(**given_case | {"kept": kept[0]}, num_drafts=drafts)
    found = take_rows.launch(**given_case | {"kept": kept[1]}, num_drafts=drafts)
    assert found.isfinite().all()
    assert torch.equal(found, expected)
    assert torch.equal(*(part.nan_to_num(99) for part in kept))


@pytest.mark.parametrize("form", [take_rows.naive, take_rows.launch])
def test_rows_that_draft_come_first(form: object) -> None:
    """One request takes its second block, from row 1; the other keeps its own, from row 2. Blocks of 4, 2 drafts."""
    hidden = torch.arange(16.0).view(2, 2, 4, 1)
    kept = 100 + torch.arange(12.0).view(3, 4, 1)
    which, slot, place, offset = torch.tensor([[1, -1], [3, 1], [9, 0], [1, 2]])
    place, offset = torch.tensor([9, 0, 9, 1, 2]), torch.tensor([9, 2, 9, 1, 0])
    picked = form(hidden, which, slot, place, offset, kept, 2)  # type: ignore[operator]
    assert picked.flatten().tolist() == [5, 6, 102, 103, 7, 103]
    assert kept[1].flatten().tolist() == [4, 5, 6, 7]
    assert kept[0].flatten().tolist() == [100, 101, 102, 103]
