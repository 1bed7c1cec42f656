"""The likeliest tokens of a row and the confidence of its draft, against softmax and topk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from vllm_orthrus.kernels.most_probable import Probable, launch, naive


def case(
    reqs: int, places: int, vocabulary: int, dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    # All different, in any type: nothing depends on how ties are broken.
    order = torch.stack([torch.randperm(vocabulary, generator=gen) for _ in range(reqs * places)])
    logits = (order / 16 - 4).to(dtype)  # those of the rows behind last
    drafts = torch.randint(0, vocabulary, (reqs, places - 1), generator=gen)
    temperature = torch.rand(reqs, generator=gen) * 1.5
    temperature[::3] = 0
    return logits, drafts, temperature


def same(actual: Probable, expected: Probable) -> bool:
    return (
        torch.equal(actual.tokens, expected.tokens)
        and torch.allclose(actual.probability, expected.probability, rtol=1e-5, atol=1e-30)
        and torch.allclose(actual.confidence, expected.confidence, rtol=1e-5, atol=1e-30)
    )


@given(
    st.integers(1, 4),
    st.integers(2, 6),
    st.integers(2, 200),
    st.integers(1, 9),
    st.sampled_from([16, 32, 64]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 10**6),
)
@settings(max_examples=25, deadline=None, derandomize=True, phases=(Phase.generate,))
def test_equals_naive(
    reqs: int, places: int, vocabulary: int, count: int, stretch: int, dtype: torch.dtype, seed: int
) -> None:
    logits, drafts, temperature = case(reqs, places, vocabulary, dtype, seed)
    expected = naive(logits, drafts, temperature, count)
    assert same(launch(logits, drafts, temperature, count, stretch), expected)


def test_a_vocabulary_as_large_as_they_come() -> None:
    logits, drafts, temperature = case(1, 2, 151936, torch.float32, 3)
    assert same(launch(logits, drafts, temperature, 9), naive(logits, drafts, temperature, 9))


@pytest.mark.parametrize("masked", [1, 150])
def test_tokens_that_are_ruled_out(masked: int) -> None:
    """-inf, as a mask leaves it, is no probability, not even where a whole stretch has nothing else."""
    logits, drafts, temperature = case(2, 3, 160, torch.float32, 7)
    logits[..., :masked] = float("-inf")
    actual = launch(logits, drafts, temperature, 5, stretch=32)
    expected = naive(logits, drafts, temperature, 5)
    assert same(actual, expected)
    assert (actual.tokens >= masked).all()
