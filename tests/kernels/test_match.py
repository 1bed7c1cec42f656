"""The newest hypothesis that came true, found on the device, against its PyTorch twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_orthrus.kernels import match
from vllm_orthrus.kernels.hypotheses import NONE, Hypotheses


@given(st.integers(1, 5), st.integers(1, 17), st.integers(1, 16), st.integers(0, 10**6))
@settings(deadline=None, max_examples=100)
def test_equals_naive(reqs: int, drafts: int, num_hypotheses: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)

    def random(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=gen)

    hypotheses = Hypotheses(random(NONE, drafts + 1, reqs, num_hypotheses), random(0, 3, reqs, num_hypotheses))
    arguments = (random(0, 3, reqs, drafts), random(0, drafts + 2, reqs), random(0, 3, reqs), random(0, 20, reqs))
    expected, actual = match.naive(hypotheses, *arguments), match.launch(hypotheses, *arguments)
    assert torch.equal(actual.which, expected.which)
    assert torch.equal(actual.offset, expected.offset)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_takes_the_runner_s_types(dtype: torch.dtype) -> None:
    hypotheses = Hypotheses(torch.tensor([[1, -1, 0]]), torch.tensor([[9, 4, 6]]))
    drafts, slots = torch.tensor([[6, 7]]), torch.tensor([[9], [0]])
    found = match.launch(hypotheses, drafts, torch.tensor([2], dtype=dtype), slots[:1, 0].to(dtype), torch.tensor([0]))
    assert (found.which.tolist(), found.offset.tolist()) == ([0], [0])
