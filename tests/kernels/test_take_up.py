"""What an outcome changes, on the device, against its PyTorch twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.slots import Sizes, assert_same, changed, remembered, whole_numbers
from vllm_orthrus.kernels import take_up
from vllm_orthrus.kernels.slots import Slots
from vllm_orthrus.kernels.take_up import COUNTERS, Outcome

BLOCK = 7


def outcomes(size: Sizes, reqs: int, carried: int, seed: int) -> tuple[Outcome, Tensor]:
    """Of requests in some order; the last of more than one is nobody's, and some have sampled nothing."""
    random = whole_numbers(seed + 1)
    slot = torch.randperm(size.slots, generator=torch.Generator().manual_seed(seed))[:reqs]
    num_sampled = random(0, size.drafts + 2, reqs)
    rejected = torch.minimum(random(0, size.drafts + 1, reqs), size.drafts + 1 - num_sampled)
    if reqs > 1:
        slot[-1], num_sampled[-1] = -1, 0
    outcome = Outcome(slot, num_sampled, rejected, random(0, size.vocabulary, reqs))
    return outcome, random(-1, 3, reqs, carried).int()


def both(outcome: Outcome, prefix_lengths: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
    """After either form everything is the same. Returns which hypotheses came true, and the counters."""
    ended = []
    for form in (take_up.naive, take_up.launch):
        own, counters = changed(slots, torch.clone), torch.arange(len(COUNTERS))
        ended.append((own, form(outcome, prefix_lengths, own, counters, BLOCK), counters))
    (expected, *numbers), (actual, *found) = ended
    assert_same(actual, expected)
    assert all(torch.equal(one, other) for one, other in zip(found, numbers, strict=True))
    return numbers[0], numbers[1]


@given(st.integers(1, 5), st.integers(1, 17), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
@settings(deadline=None, max_examples=15)
def test_equals_naive(reqs: int, drafts: int, hypotheses: int, ranks: int, seed: int) -> None:
    size = Sizes(drafts=drafts, hypotheses=hypotheses, ranks=ranks)
    carried = 1 + seed % hypotheses  # larger batches have room for fewer than a slot remembers
    both(*outcomes(size, reqs, carried, seed), remembered(size, seed))


def test_all_kinds_of_outcomes_were_met() -> None:
    """Or the test above would compare little."""
    counters, found = torch.zeros(len(COUNTERS), dtype=torch.int64), set[int]()
    for seed in range(8):
        which, counted = both(*outcomes(Sizes(), 4, 4, seed), remembered(Sizes(), seed))
        counters += counted - torch.arange(len(COUNTERS))
        found |= set(which.tolist())
    assert (counters > 1).all(), dict(zip(COUNTERS, counters.tolist(), strict=True))
    assert found == {-1, 0, 1, 2, 3}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_takes_columns_and_the_runner_s_types(dtype: torch.dtype) -> None:
    """Slots and anchors are columns of the buffers that hold the blocks' rows."""
    outcome, prefix_lengths = outcomes(Sizes(), 4, 4, 3)
    slots = remembered(Sizes(), 3)
    wide = [torch.stack((part, part + 77), dim=1)[:, 0] for part in (outcome.slot, outcome.bonus)]
    counts = [part.to(dtype) for part in (outcome.num_sampled, outcome.num_rejected)]
    own = [changed(slots, torch.clone) for _ in range(2)]
    counters = [torch.zeros(len(COUNTERS), dtype=torch.int64) for _ in range(2)]
    expected = take_up.launch(outcome, prefix_lengths, own[0], counters[0], BLOCK)
    found = take_up.launch(Outcome(wide[0], *counts, wide[1]), prefix_lengths, own[1], counters[1], BLOCK)
    assert torch.equal(found, expected)
    assert torch.equal(*counters)
    assert_same(*own)


def test_where_nothing_was_sampled_tables_only_fade() -> None:
    outcome, prefix_lengths = outcomes(Sizes(), 3, 4, 5)
    nothing, slots = outcome._replace(num_sampled=torch.zeros(3, dtype=torch.int64)), remembered(Sizes(), 5)
    for form in (take_up.naive, take_up.launch):
        own, counters = changed(slots, torch.clone), torch.zeros(len(COUNTERS), dtype=torch.int64)
        assert (form(nothing, prefix_lengths, own, counters, BLOCK) == -1).all()
        assert not counters.any()
        faded = type(slots.calibration)(*(0.999 * table for table in slots.calibration))
        assert_same(own, slots._replace(calibration=faded))
