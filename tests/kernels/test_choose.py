"""The choice of hypotheses on the device, against its PyTorch twin."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_orthrus.kernels import choose
from vllm_orthrus.kernels.hypotheses import NONE


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


@given(st.integers(1, 5), st.integers(1, 17), st.sampled_from([1, 3, 8]), st.integers(1, 16), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_equals_naive(reqs: int, drafts: int, ranks: int, num_hypotheses: int, seed: int) -> None:
    chances, *others = state(reqs, drafts, ranks, seed)
    arguments = (*chances, *others, falling(drafts), num_hypotheses)
    expected = choose.naive(*arguments)
    actual = choose.launch(*arguments)
    assert torch.equal(actual.accepted, expected.accepted)
    assert torch.equal(actual.token, expected.token)


def test_garbage_in_a_padded_row_stays_there() -> None:
    chances, drafts, anchors, offset = state(3, 7, 4, 5)
    sound = choose.launch(*chances, drafts, anchors, offset, falling(7), 6)
    chances[0][1] = float("nan")
    chances[1][1] = float("nan")
    drafts[1], anchors[1], offset[1] = -(10**6), -1, 10**6
    for function in (choose.launch, choose.naive):
        soiled = function(*chances, drafts, anchors, offset, falling(7), 6)
        for row in (0, 2):
            assert torch.equal(soiled.accepted[row], sound.accepted[row])
            assert torch.equal(soiled.token[row], sound.token[row])
        assert (soiled.accepted[1] == NONE).all(), "chances that are no numbers call for no block"
        assert (soiled.token[1] == 0).all()


def test_no_requests() -> None:
    chances, drafts, anchors, offset = state(2, 3, 2, 0)
    none = [part[:0] for part in chances]
    assert choose.launch(*none, drafts[:0], anchors[:0], offset[:0], falling(3), 4).token.shape == (0, 4)
