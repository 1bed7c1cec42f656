"""What is remembered of drafts and which hypotheses are chosen, on the device, against the PyTorch twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.slots import Sizes, assert_same, changed, parts, remembered
from vllm_orthrus.kernels import chances, choose
from vllm_orthrus.kernels.choose import Drafted
from vllm_orthrus.kernels.hypotheses import NONE
from vllm_orthrus.kernels.most_probable import Probable, from_probabilities
from vllm_orthrus.kernels.slots import Slots

Case = tuple[Drafted, Probable, Tensor, Slots, int, int]


def case(reqs: int, size: Sizes, seed: int, block: int | None = None) -> Case:
    """Drafts of real distributions: mostly the likeliest token, sometimes another, and sometimes one of no rank."""
    gen = torch.Generator().manual_seed(seed)
    block = block or size.drafts + 1
    logits = 3 * torch.randn(reqs, size.drafts + 1, 40, generator=gen)
    tokens = logits[:, :-1].argmax(-1)
    odd = torch.rand(tokens.shape, generator=gen) < 0.4
    tokens = torch.where(odd, torch.randint(0, 40, tokens.shape, generator=gen), tokens)
    slot = torch.randperm(size.slots, generator=gen)[:reqs]
    if reqs > 1:
        slot[-1] = -1
    temperature = torch.where(torch.rand(reqs, generator=gen) < 0.5, 0.0, 0.8)
    anchors = torch.randint(0, 40, (reqs,), generator=gen)
    said = from_probabilities(logits.softmax(-1), tokens, size.ranks + 1)
    drafted = Drafted(slot, torch.randint(0, 999, (reqs,), generator=gen), anchors, tokens, temperature)
    return (
        drafted,
        said,
        chances.block_values(block, block - 1, size.hypotheses),
        remembered(size, seed),
        block - 1,
        block,
    )


def both(given_case: Case) -> Slots:
    drafted, said, values, slots, *rows = given_case
    ended = []
    for form in (choose.naive, choose.launch):
        own = changed(slots, torch.clone)
        form(drafted, said, values, own, *rows)
        ended.append(own)
    assert_same(ended[1], ended[0])
    return ended[1]


@given(
    st.integers(1, 5),
    st.integers(1, 17),
    st.sampled_from([1, 3, 8]),
    st.integers(1, 16),
    st.integers(0, 3),
    st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=12)
def test_equals_naive(reqs: int, drafts: int, ranks: int, hypotheses: int, more: int, seed: int) -> None:
    """Also where a block is wider, or narrower, than its drafts."""
    both(case(reqs, Sizes(drafts=drafts, hypotheses=hypotheses, ranks=ranks), seed, max(2, drafts - 1 + more)))


def test_every_sort_of_hypothesis_was_chosen() -> None:
    """Or the test above would compare little."""
    accepted = torch.cat([both(case(5, Sizes(), seed)).hypotheses.accepted[:-1] for seed in range(4)])
    assert set(accepted.flatten().tolist()) >= {NONE, -1, 0, 1, 2}


@pytest.mark.parametrize("form", [choose.naive, choose.launch])
def test_rows_that_say_nothing_stay_alone(form: object) -> None:
    """Nothing that is no number is kept of their request, and others don't notice."""
    drafted, said, values, slots, *rows = case(3, Sizes(), 2)
    drafted = drafted._replace(slot=torch.tensor([4, 0, 2]))
    sound, soiled = changed(slots, torch.clone), changed(slots, torch.clone)
    form(drafted, said, values, sound, *rows)  # type: ignore[operator]
    for part in (said.confidence, said.probability):
        part[1] = float("nan")
    form(drafted, said, values, soiled, *rows)  # type: ignore[operator]
    for name, part in parts(soiled).items():
        assert not part.isnan().any(), name
        if not name.startswith(("tried", "accepted", "offered", "came")):
            assert torch.equal(part[[4, 2]], parts(sound)[name][[4, 2]]), name
    assert (soiled.drafts.share[0] == 0).all()
    assert (soiled.drafts.confidence[0] == 0).all()


def test_anchors_are_a_column_of_the_blocks_rows() -> None:
    drafted, *others = case(3, Sizes(), 4)
    sound = both((drafted, *others))  # type: ignore[arg-type]

    def column(part: Tensor) -> Tensor:
        return torch.stack((part, part + 7), dim=1)[:, 0]

    slot, position, anchor = map(column, drafted[:3])
    found = both((drafted._replace(slot=slot, anchor_position=position, anchor=anchor), *others))  # type: ignore[arg-type]
    assert_same(found, sound)


def test_one_more_token_than_candidates() -> None:
    drafted, said, *others = case(2, Sizes(), 0)
    with pytest.raises(ValueError, match="8 likeliest tokens of each row for 8 candidates"):
        choose.launch(drafted, said._replace(tokens=said.tokens[..., :-1]), *others)


def test_no_requests() -> None:
    drafted, said, values, slots, *rows = case(2, Sizes(), 0)
    before = changed(slots, torch.clone)
    none = Drafted(*(part[:0] for part in drafted)), Probable(*(part[:0] for part in said))
    choose.launch(*none, values, slots, *rows)
    assert_same(slots, before)
