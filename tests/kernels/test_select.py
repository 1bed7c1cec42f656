"""Choosing drafts from left to right: the kernel against its twin, the twin against the formula, and the draws."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from vllm_orthrus.kernels import most_probable
from vllm_orthrus.kernels.most_probable import Likeliest, Probable
from vllm_orthrus.kernels.select import Blocks, Kept, Tables, launch, naive
from vllm_orthrus.kernels.uniform import uniform

SLOTS = 7
EXHAUSTIVE = settings(max_examples=25, deadline=None, derandomize=True, phases=(Phase.generate,))


class Case(NamedTuple):
    said: Likeliest
    blocks: Blocks
    tables: Tables
    drafts: torch.Tensor
    kept: Kept


def case(
    reqs: int, drafts: int, behind: bool, vocabulary: int, candidates: int, rank: int, dtype: torch.dtype, seed: int
) -> Case:
    gen = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=gen)

    logits = normal(reqs * (drafts + behind), vocabulary) * 2
    temperature = torch.rand(reqs, generator=gen) * 1.5
    temperature[::3] = 0
    slots = torch.randperm(SLOTS, generator=gen)[:reqs]
    slots[1::4] = -1
    blocks = Blocks(
        # As the engine has them: columns of wider buffers.
        slots[:, None].repeat(1, 3)[:, 0],
        torch.randint(0, vocabulary, (reqs, 2), generator=gen)[:, 0],
        torch.randint(0, 3, (reqs,), generator=gen),
        temperature,
        normal(len(logits), rank).to(dtype),
    )
    kept = Kept(
        torch.randint(0, 2**62, (SLOTS,), generator=gen),
        torch.arange(reqs * (drafts + 2)).view(reqs, -1)[:, :drafts],
        torch.full((SLOTS, drafts + 1, vocabulary), float("-inf")),
        torch.full((SLOTS, drafts + 1, min(candidates, vocabulary)), -1, dtype=torch.int32),
    )
    tables = Tables(normal(vocabulary, rank).to(dtype), normal(vocabulary, rank).to(dtype))
    said = most_probable.naive_likeliest(logits, behind, temperature, candidates)
    return Case(said, blocks, tables, torch.zeros(reqs, drafts + 1, dtype=torch.int64)[:, :drafts], kept)


def copied(kept: Kept) -> Kept:
    return kept._replace(logits=kept.logits.clone(), tokens=kept.tokens.clone())


def assert_same(actual: Probable, expected: Probable) -> None:
    torch.testing.assert_close(actual.probability, expected.probability, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(actual.confidence, expected.confidence, rtol=1e-3, atol=1e-6)
    assert torch.equal(actual.tokens, expected.tokens)


@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.booleans(),
    st.integers(12, 90),
    st.sampled_from([2, 11, 16]),
    st.sampled_from([5, 16]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 10**6),
)
@EXHAUSTIVE
def test_equals_naive(
    reqs: int,
    drafts: int,
    behind: bool,
    vocabulary: int,
    candidates: int,
    rank: int,
    dtype: torch.dtype,
    draws: bool,
    seed: int,
) -> None:
    """Over two steps, so that what the first has kept is taken back."""
    one = case(reqs, drafts, behind, vocabulary, candidates, rank, dtype, seed)
    two = case(reqs, drafts, behind, vocabulary, candidates, rank, dtype, seed + 1)
    mine, theirs = copied(one.kept), copied(one.kept)
    for said, blocks, tables, _, kept in (one, two):
        found, expected = (torch.full((reqs, drafts), -1) for _ in range(2))
        kept_so_far = [kept._replace(logits=k.logits, tokens=k.tokens) if draws else None for k in (mine, theirs)]
        actual = launch(said, blocks, tables, found, 9, kept_so_far[0])
        assert_same(actual, naive(said, blocks, tables, expected, 9, kept_so_far[1]))
        assert torch.equal(found, expected)
        assert torch.equal(mine.tokens.sort(-1).values, theirs.tokens.sort(-1).values)
        torch.testing.assert_close(mine.logits, theirs.logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(("vocabulary", "stretch"), [(50, 64), (200, 64)])
def test_the_likeliest_equal_naive(behind: bool, vocabulary: int, stretch: int) -> None:
    gen = torch.Generator().manual_seed(vocabulary)
    logits = torch.stack([torch.randperm(vocabulary, generator=gen) for _ in range(3 * (4 + behind))]) / 16
    temperature = torch.tensor([0.0, 0.7, 1.3])
    expected = most_probable.naive_likeliest(logits, behind, temperature, 16)
    actual = most_probable.launch_likeliest(logits, behind, temperature, 16, stretch)
    assert torch.equal(actual.tokens, expected.tokens)
    torch.testing.assert_close(actual.probability, expected.probability)


@pytest.mark.parametrize("form", [naive, launch])
def test_scores_are_those_of_the_formula(form: object) -> None:
    """One row, by hand: a first row is left alone, and a later one knows the draft before it."""
    said, blocks, tables, drafts, _ = case(1, 3, False, 40, 16, 8, torch.float32, 5)
    blocks = blocks._replace(temperature=torch.zeros(1), offset=torch.zeros(1, dtype=torch.int64))
    found = form(said, blocks, tables, drafts, 9)  # type: ignore[operator]
    previous, probability = int(blocks.anchor[0]), []
    for place in range(3):
        tokens, score = said.tokens[0, place], said.probability[0, place].log()
        if place > 0:
            score = score + tables.candidate[tokens] @ (tables.previous[previous] * blocks.gate[place])
        previous = int(tokens[score.argmax()])
        assert int(drafts[0, place]) == previous
        probability.append(score.softmax(-1).max())
    torch.testing.assert_close(found.confidence[0], torch.stack(probability))


@pytest.mark.parametrize("form", [naive, launch])
def test_what_is_said_is_what_is_kept(form: object) -> None:
    """However coarsely: it is rounded before anything is drawn from it."""
    said, blocks, tables, drafts, kept = case(3, 3, False, 40, 16, 8, torch.bfloat16, 9)
    kept = kept._replace(logits=kept.logits.bfloat16())
    found = form(said, blocks, tables, drafts, 9, kept)  # type: ignore[operator]
    for req, slot in enumerate(blocks.slot.tolist()):
        if slot >= 0:
            degrees = blocks.temperature[req] if blocks.temperature[req] > 0 else 1
            q = (kept.logits[slot, :3].float() / degrees).softmax(-1)
            torch.testing.assert_close(q.gather(1, found.tokens[req]), found.probability[req])
            torch.testing.assert_close(q.gather(1, drafts[req, :, None])[:, 0], found.confidence[req])


def test_draws_follow_what_is_kept() -> None:
    """Chi-square over seeds, of the second draft given the first: what the verification is told is what was drawn.

    The kernel's draws equal the twin's, which is fast enough for as many.
    """
    n = 4000
    said, blocks, tables, _, _ = case(1, 2, False, 6, 4, 4, torch.float32, 3)
    many = Blocks(
        torch.arange(n),
        blocks.anchor.repeat(n),
        torch.zeros(n, dtype=torch.int64),
        torch.full((n,), 0.8),
        blocks.gate.view(1, 2, -1).repeat(n, 1, 1).flatten(0, 1),
    )
    kept = Kept(
        torch.arange(n) * 7919,
        torch.tensor([[10, 11]]).repeat(n, 1),
        torch.full((n, 2, 6), float("-inf")),
        torch.full((n, 2, 4), -1, dtype=torch.int32),
    )
    drafts = torch.zeros(n, 2, dtype=torch.int64)
    repeated = Likeliest(said.tokens.repeat(n, 1, 1), said.probability.repeat(n, 1, 1))
    naive(repeated, many, tables, drafts, 9, kept)
    first = kept.logits[0, 0].div(0.8).softmax(-1)
    _agree(drafts[:, 0], first)
    likely = int(first.argmax())
    of_these = drafts[:, 0] == likely
    _agree(drafts[of_these, 1], kept.logits[of_these][0, 1].div(0.8).softmax(-1))
    other = kept.logits[~of_these][0, 1].div(0.8).softmax(-1)
    assert not torch.allclose(other, kept.logits[of_these][0, 1].div(0.8).softmax(-1)), "it knows the draft before it"


def _agree(drawn: torch.Tensor, expected: torch.Tensor) -> None:
    counts = torch.bincount(drawn, minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0
    there = expected > 0
    wanted = expected[there].double()
    assert chisquare(counts[there].numpy(), (wanted / wanted.sum() * counts.sum()).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("form", [naive, launch])
def test_a_row_that_says_nothing_leaves_a_distribution_all_the_same(form: object) -> None:
    said, blocks, tables, drafts, kept = case(3, 3, True, 40, 16, 8, torch.float32, 11)
    said.probability[:, 1] = float("nan")
    blocks.gate[2] = float("inf")
    found = form(said, blocks, tables, drafts, 9, kept)  # type: ignore[operator]
    assert found.confidence.isfinite().all() and found.probability.isfinite().all()
    assert ((drafts >= 0) & (drafts < 40)).all()
    mine = kept.logits[blocks.slot[blocks.slot >= 0], :3]
    assert not mine.isnan().any() and (mine > float("-inf")).any(-1).all()


def test_draws_are_even_and_different_by_all_that_they_depend_on() -> None:
    seeds, keys, tokens = torch.meshgrid(torch.arange(20) * 2**33, torch.arange(20), torch.arange(50), indexing="ij")
    drawn = uniform(seeds, keys, tokens).flatten()
    assert (drawn > 0).all() and len(drawn.unique()) > 0.999 * len(drawn)
    assert chisquare(torch.histc(drawn, 50, 0, 1).numpy()).pvalue > 1e-3
