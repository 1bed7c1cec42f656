"""The choice of hypotheses against a brute-force one, and the chances that it works with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_orthrus.kernels import chances
from vllm_orthrus.kernels.hypotheses import NONE, Hypotheses, choose_hypotheses, count_covered, match_outcome
from vllm_orthrus.kernels.most_probable import from_probabilities

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def problem(reqs: int, drafts: int, ranks: int, seed: int) -> Problem:
    gen = torch.Generator().manual_seed(seed)
    real = torch.randint(0, drafts + 1, (reqs, 1), generator=gen)
    outcome = torch.where(torch.arange(drafts + 1) <= real, torch.rand(reqs, drafts + 1, generator=gen) ** 3, 0)
    outcome = outcome / outcome.sum(1, keepdim=True)
    bonus = torch.rand(reqs, drafts + 1, ranks, generator=gen)
    bonus = bonus / (bonus.sum(2, keepdim=True) * 1.2)
    candidates = 50 + torch.arange(ranks).expand_as(bonus)
    tokens = torch.randint(0, 50, (reqs, drafts), generator=gen)
    offset = torch.randint(0, drafts + 2, (reqs,), generator=gen)
    return outcome, bonus, candidates, tokens, torch.randint(0, 50, (reqs,), generator=gen), offset


VALUES = torch.tensor([1.0, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.2, 0.0])


def worth(chosen: list[tuple[int, int]], request: int, given_problem: Problem) -> float:
    """What a set of hypotheses is worth, straight from the definition."""
    outcome, bonus, candidates, tokens, _, offset = (part[request] for part in given_problem)
    total = 0.0
    for a in range(len(outcome)):
        usable = [j for j, c in chosen if j == -1 or (j < a and tokens[j] == c)]
        offsets = [a - j for j in usable] + [int(offset) + a + 1]
        tail = max(float(VALUES[min(o, len(VALUES) - 1)]) for o in offsets)
        covered = sum(float(bonus[a, r]) for r, c in enumerate(candidates[a].tolist()) if (a, c) in chosen)
        total += float(outcome[a]) * (covered * float(VALUES[0]) + (1 - covered) * tail)
    return total


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_each_choice_is_the_best_next_one(drafts: int, ranks: int, num_hypotheses: int, seed: int) -> None:
    given_problem = problem(2, drafts, ranks, seed)
    *_, candidates, tokens, anchors, _ = given_problem
    chosen = choose_hypotheses(*given_problem, VALUES, num_hypotheses)
    for request in range(2):
        every = [(-1, int(anchors[request]))]
        every += [(a, int(tokens[request, a])) for a in range(drafts)]
        every += [(a, c) for a in range(drafts + 1) for c in candidates[request, a].tolist()]
        taken: list[tuple[int, int]] = []
        pairs = zip(chosen.accepted[request].tolist(), chosen.token[request].tolist(), strict=True)
        for accepted, token in pairs:
            before = worth(taken, request, given_problem)
            best = max(worth([*taken, other], request, given_problem) for other in every) - before
            if accepted == NONE:
                assert best < 1e-5
                continue
            assert (accepted, token) in every
            taken.append((accepted, token))
            assert worth(taken, request, given_problem) - before == pytest.approx(best, abs=1e-5)
        assert len(set(taken)) == len(taken)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_match_is_the_newest_hypothesis_that_came_true(reqs: int, drafts: int, num_hypotheses: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)

    def random(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=gen)

    hypotheses = Hypotheses(random(NONE, drafts + 1, reqs, num_hypotheses), random(0, 3, reqs, num_hypotheses))
    tokens, num_sampled = random(0, 3, reqs, drafts), random(0, drafts + 2, reqs)
    last, offset = random(0, 3, reqs), random(0, 9, reqs)
    found = match_outcome(hypotheses, tokens, num_sampled, last, offset)
    for r in range(reqs):
        sampled = [*tokens[r, : max(0, int(num_sampled[r]) - 1)].tolist(), int(last[r])][: int(num_sampled[r])]
        true = [
            (a, -h)
            for h, (a, c) in enumerate(zip(*(part[r].tolist() for part in hypotheses), strict=True))
            if sampled and (a == -1 or (0 <= a < len(sampled) and sampled[a] == c))
        ]
        if not true:
            assert (int(found.which[r]), int(found.offset[r])) == (-1, int(offset[r]) + len(sampled))
            continue
        assert int(hypotheses.accepted[r, found.which[r]]) == max(true)[0]
        assert int(found.offset[r]) == len(sampled) - 1 - max(true)[0]


def test_the_two_kinds_of_miss() -> None:
    hypotheses = Hypotheses(torch.tensor([[0, 1, 2]] * 4), torch.tensor([[9, 7, 9]] * 4))
    drafts, real = torch.tensor([[6, 7, 8]] * 4), torch.tensor([3, 3, 3, 1])
    # An exact block; the block of the draft that was rejected; none; all drafts accepted, so any block is exact.
    assert count_covered(hypotheses, drafts, real, torch.tensor([0, 1, 3, 1])).tolist() == [True, False, False, True]
    assert not count_covered(hypotheses, drafts, real, torch.full((4,), -1)).any(), "nothing sampled, nothing covered"


def test_requests_do_not_disturb_each_other() -> None:
    whole = problem(6, 5, 3, 0)
    chosen = choose_hypotheses(*whole, VALUES, 4)
    for r in range(6):
        outcome, bonus, candidates, tokens, anchors, offset = (part[r : r + 1] for part in whole)
        alone = choose_hypotheses(outcome, bonus, candidates, tokens, anchors, offset, VALUES, 4)
        assert torch.equal(alone.accepted[0], chosen.accepted[r])
        assert torch.equal(alone.token[0], chosen.token[r])


def test_an_exact_block_at_hand_needs_no_other() -> None:
    """Drafts of a hit: the anchor's block would be the one they came from, so it is never asked for."""
    outcome, bonus, candidates, tokens, anchors, _ = problem(50, 6, 4, 1)
    chosen = choose_hypotheses(
        outcome, bonus, candidates, tokens, anchors, torch.zeros(50, dtype=torch.int64), VALUES, 8
    )
    assert not (chosen.accepted == -1).any()


# Chances


def drafts(reqs: int, places: int, seed: int = 0, vocab: int = 32) -> tuple[chances.Drafts, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    q = torch.softmax(3 * torch.randn(reqs, places + 1, vocab, generator=gen), -1)
    tokens = torch.multinomial(q[:, :-1].flatten(0, 1), 1, generator=gen).view(reqs, places)
    offset = torch.randint(0, places + 2, (reqs,), generator=gen)
    real = chances.draft_count(offset, places, places)
    said = from_probabilities(q, tokens, chances.LOOKED_AT)
    return chances.describe_drafts(said, tokens, real, offset, block=places + 1), q


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_chances_are_chances(reqs: int, places: int, seed: int) -> None:
    described, _ = drafts(reqs, places, seed)
    calibration, history = chances.new_calibration(), chances.new_history(reqs)
    sampled = torch.arange(reqs) % 2 == 0
    gen = torch.Generator().manual_seed(seed)
    for _ in range(3):
        outcome = chances.outcome_chances(calibration, history, described, sampled)
        bonus = chances.bonus_chances(calibration, described, sampled)
        torch.testing.assert_close(outcome.sum(1), torch.ones(reqs))
        assert (outcome >= 0).all()
        assert (bonus >= 0).all()
        assert (bonus <= 1).all()
        for r in range(reqs):
            assert (outcome[r, int(described.real[r]) + 1 :] == 0).all()
            for a in range(int(described.real[r])):
                assert described.tokens[r, a] not in described.candidates[r, a]
        accepted = (torch.rand(reqs, generator=gen) * (described.real + 1)).long()
        calibration, history = chances.update_calibration(
            calibration, history, described, sampled, accepted + 1, torch.full((reqs,), 3)
        )


def test_shares_are_conditional_on_the_draft_being_wrong() -> None:
    described, q = drafts(4, 3)
    for r in range(4):
        for a in range(int(described.real[r])):
            left = q[r, a].clone()
            left[described.tokens[r, a]] = 0
            best = (left / left.sum()).topk(chances.CANDIDATES)
            torch.testing.assert_close(described.share[r, a], best.values)
            assert torch.equal(described.candidates[r, a], best.indices)


def test_an_overconfident_head_is_found_out() -> None:
    """Drafts that call themselves 90 % sure are accepted half of the time."""
    reqs = 256
    confidence = torch.full((reqs, 1), 0.9)
    tokens = torch.zeros(reqs, 1, dtype=torch.int64)
    nothing = torch.zeros(reqs, dtype=torch.int64)
    share = torch.full((reqs, 2, 2), 0.4)
    described = chances.Drafts(tokens, nothing + 1, nothing, confidence, torch.ones(reqs, 2, 2).long(), share)
    calibration, sampled = chances.new_calibration(candidates=2), torch.zeros(reqs, dtype=torch.bool)
    gen = torch.Generator().manual_seed(0)
    before = chances.outcome_chances(calibration, chances.new_history(reqs), described, sampled)
    for _ in range(20):
        accepted = torch.randint(0, 2, (reqs,), generator=gen)
        calibration, _ = chances.update_calibration(
            calibration, chances.new_history(reqs), described, sampled, accepted + 1, torch.ones(reqs).long()
        )
    after = chances.outcome_chances(calibration, chances.new_history(reqs), described, sampled)
    assert before[0, 1] == pytest.approx(0.9)
    assert after[0, 1] == pytest.approx(0.5, abs=0.03)
    assert chances.bonus_chances(calibration, described, sampled)[0, 0, 0] > 0.95, "candidate 1 always came"
    other = chances.outcome_chances(calibration, chances.new_history(reqs), described, ~sampled)
    assert other[0, 1] == pytest.approx(0.9), "sampled requests are counted apart"


def test_a_request_s_own_history_moves_only_that_request() -> None:
    described, _ = drafts(2, 4)
    described = described._replace(real=torch.tensor([4, 4]), confidence=torch.full((2, 4), 0.8))
    calibration, sampled = chances.new_calibration(), torch.zeros(2, dtype=torch.bool)
    history = chances.new_history(2)
    for _ in range(10):
        _, history = chances.update_calibration(
            calibration, history, described, sampled, torch.tensor([1, 5]), torch.tensor([0, 0])
        )
    outcome = chances.outcome_chances(calibration, history, described, sampled)
    plain = chances.outcome_chances(calibration, chances.new_history(2), described, sampled)
    assert outcome[0, 0] > plain[0, 0] > outcome[1, 0]


@pytest.mark.parametrize(("num_sampled", "real"), [(0, 3), (1, 0)])
def test_nothing_is_learnt_where_nothing_was_judged(num_sampled: int, real: int) -> None:
    described, _ = drafts(3, 3)
    described = described._replace(real=torch.full((3,), real))
    calibration, history = chances.new_calibration(), chances.new_history(3)
    after, own = chances.update_calibration(
        calibration, history, described, torch.zeros(3, dtype=torch.bool), torch.full((3,), num_sampled), torch.ones(3)
    )
    assert all((table == 0).all() for table in (*after, *own))


@pytest.mark.parametrize("num_hypotheses", [1, 2, 16])
def test_block_values_fall_and_end(num_hypotheses: int) -> None:
    values = chances.block_values(16, 15, num_hypotheses)
    assert values[0] == 1
    assert (values[1:] < values[:-1])[:15].all()
    assert (values[15:] == 0).all(), "past its taught rows a block gives nothing"


# Modelled time
