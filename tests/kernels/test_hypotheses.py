"""The choice of hypotheses and the look-up of an outcome on the device, against their PyTorch twins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_orthrus.kernels.hypotheses import (
    Hypotheses,
    choose_device,
    choose_naive,
    match_device,
    match_naive,
)

sizes = given(
    st.integers(1, 5), st.integers(1, 17), st.sampled_from([1, 3, 8]), st.integers(1, 16), st.integers(0, 10**6)
)


def state(
    reqs: int, drafts: int, ranks: int, seed: int
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    real = torch.randint(0, drafts + 1, (reqs, 1), generator=gen)
    outcome = torch.rand(reqs, drafts + 1, generator=gen) ** 3
    outcome = torch.where(torch.arange(drafts + 1) <= real, outcome, 0)
    outcome = outcome / outcome.sum(1, keepdim=True)
    bonus = torch.rand(reqs, drafts + 1, ranks, generator=gen)
    bonus = bonus / (bonus.sum(2, keepdim=True) * 1.2)
    tokens = torch.randint(0, 50, (reqs, drafts), generator=gen)
    candidates = torch.randint(50, 90, bonus.shape, generator=gen)
    chances = (outcome, bonus, candidates)
    offset = torch.randint(0, drafts + 2, (reqs,), generator=gen)
    return chances, tokens, torch.randint(0, 50, (reqs,), generator=gen), offset


def falling(length: int) -> torch.Tensor:
    return torch.cat((torch.ones(1), 0.8 * 0.9 ** torch.arange(length), torch.zeros(1)))


@sizes
@settings(deadline=None, max_examples=40)
def test_choice_equals_its_twin(reqs: int, drafts: int, ranks: int, count: int, seed: int) -> None:
    chances, *others = state(reqs, drafts, ranks, seed)
    arguments = (*chances, *others, falling(drafts), count)
    expected = choose_naive(*arguments)
    actual = choose_device(*arguments)
    assert torch.equal(actual.accepted, expected.accepted)
    assert torch.equal(actual.token, expected.token)


def test_garbage_in_a_padded_row_stays_there() -> None:
    chances, drafts, anchors, offset = state(3, 7, 4, 5)
    sound = choose_device(*chances, drafts, anchors, offset, falling(7), 6)
    chances[0][1] = float("nan")
    chances[1][1] = float("nan")
    drafts[1], anchors[1], offset[1] = -(10**6), -1, 10**6
    for function in (choose_device, choose_naive):
        soiled = function(*chances, drafts, anchors, offset, falling(7), 6)
        for row in (0, 2):
            assert torch.equal(soiled.accepted[row], sound.accepted[row])
            assert torch.equal(soiled.token[row], sound.token[row])
        assert (soiled.accepted[1] == -2).all(), "chances that are no numbers call for no block"
        assert (soiled.token[1] == 0).all()


@sizes
@settings(deadline=None, max_examples=100)
def test_match_equals_its_twin(reqs: int, drafts: int, _: int, count: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)

    def random(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=gen)

    hypotheses = Hypotheses(random(-2, drafts + 1, reqs, count), random(0, 3, reqs, count))
    arguments = (random(0, 3, reqs, drafts), random(0, drafts + 2, reqs), random(0, 3, reqs), random(0, 20, reqs))
    expected, actual = match_naive(hypotheses, *arguments), match_device(hypotheses, *arguments)
    assert torch.equal(actual.which, expected.which)
    assert torch.equal(actual.offset, expected.offset)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_match_takes_the_runner_s_types(dtype: torch.dtype) -> None:
    hypotheses = Hypotheses(torch.tensor([[1, -1, 0]]), torch.tensor([[9, 4, 6]]))
    drafts, slots = torch.tensor([[6, 7]]), torch.tensor([[9], [0]])
    found = match_device(hypotheses, drafts, torch.tensor([2], dtype=dtype), slots[:1, 0].to(dtype), torch.tensor([0]))
    assert (found.which.tolist(), found.offset.tolist()) == ([0], [0])


def test_no_requests() -> None:
    chances, drafts, anchors, offset = state(2, 3, 2, 0)
    none = [part[:0] for part in chances]
    assert choose_device(*none, drafts[:0], anchors[:0], offset[:0], falling(3), 4).token.shape == (0, 4)
