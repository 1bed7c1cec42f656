"""The rows that a verification carries, built on the device, against their PyTorch twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from vllm_orthrus.kernels.hypotheses import NONE
from vllm_orthrus.kernels.prepare_hypotheses import HypothesisBlocks, Remembered, VerifyBatch, launch, naive

MASK, UNTOUCHED, SLOTS, LONGEST = 999, -77, 9, 300


def batch(queries: list[int], chosen: int, drafts: int, seed: int) -> tuple[Remembered, VerifyBatch]:
    """Requests with these numbers of rows. Some slots speak of another step or of more drafts than there are."""
    gen = torch.Generator().manual_seed(seed)

    def random(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=gen)

    num_reqs = len(queries)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    anchors = [int(random(0, LONGEST - count, 1)) for count in queries]
    positions = torch.cat([torch.arange(p, p + count) for p, count in zip(anchors, queries, strict=True)])
    slots = torch.randperm(SLOTS, generator=gen)[:num_reqs]
    anchor_position = random(0, LONGEST, SLOTS + 1)
    anchor_position[slots] = torch.tensor(anchors) + (random(0, 4, num_reqs) == 0)  # one in four is out of date
    accepted = torch.where(random(0, 5, SLOTS + 1, chosen) == 0, NONE, random(-1, drafts + 1, SLOTS + 1, chosen))
    behind = torch.full((5,), -(10**6))  # the runner's buffers are longer than the batch
    return (
        Remembered(anchor_position, accepted, random(0, 900, SLOTS + 1, chosen)),
        VerifyBatch(slots, starts, torch.cat([positions, behind])),
    )


def blocks(capacity: int, num_hypotheses: int, width: int) -> HypothesisBlocks:
    def full(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.full(shape, UNTOUCHED, dtype=dtype)

    return HypothesisBlocks(
        full(capacity, num_hypotheses, width),
        full(capacity, num_hypotheses, width),
        full(capacity, num_hypotheses, dtype=torch.int32),
    )


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(0, 2),
    st.integers(1, 9),
    st.integers(1, 17),
    st.integers(0, 10**6),
    st.data(),
)
@settings(max_examples=30, deadline=None, derandomize=True, phases=(Phase.generate,))
def test_equals_naive(
    queries: list[int], padding: int, chosen: int, width: int, seed: int, data: st.DataObject
) -> None:
    num_hypotheses = data.draw(st.integers(1, chosen))
    remembered, to_verify = batch(queries, chosen, 5, seed)
    capacity = len(queries) + padding
    expected, actual = (blocks(capacity, num_hypotheses, width) for _ in range(2))
    naive(len(queries), remembered, to_verify, expected, MASK, LONGEST)
    launch(len(queries), remembered, to_verify, actual, MASK, LONGEST)
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert (actual.prefix_lengths[len(queries) :] == -1).all(), "padding has no blocks"
    assert (actual.positions >= 0).all()
    assert (actual.positions < LONGEST).all()


@pytest.mark.parametrize("build", [naive, launch])
def test_what_a_block_says(build: object) -> None:
    """Three hypotheses behind an anchor at 10 with two drafts; and a request whose slot speaks of another position."""
    none = torch.tensor([NONE, NONE, NONE])
    remembered = Remembered(
        torch.tensor([20, 10]), torch.stack([none + 3, torch.tensor([-1, 2, 3])]), torch.tensor([[7, 7, 7], [4, 5, 6]])
    )
    to_verify = VerifyBatch(torch.tensor([1, 0]), torch.tensor([0, 3, 4]), torch.tensor([10, 11, 12, 30]))
    out = blocks(2, 3, 4)
    assert callable(build)
    build(2, remembered, to_verify, out, MASK, 15)
    assert out.prefix_lengths.tolist() == [[10, 13, -1], [-1, -1, -1]], "three drafts were not scheduled"
    assert out.input_ids[0, :2].tolist() == [[4, MASK, MASK, MASK], [5, MASK, MASK, MASK]]
    assert out.positions[0, :2].tolist() == [[10, 11, 12, 13], [13, 14, 14, 14]]
