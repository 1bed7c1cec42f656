"""The rules of speculative cascades, the distribution that their verification leaves behind, and what may be asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from vllm_orthrus.cascades import verify
from vllm_orthrus.cascades.choice import Cascade, obstacle, read, read_request, read_server
from vllm_orthrus.cascades.rules import NEEDS_Q, RULES, Judged, Knobs, greedy_choice, judge, target
from vllm_orthrus.errors import UserError

VOCAB, DRAWS = 16, 20_000
rules = st.sampled_from(sorted(RULES))
alphas = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.floats(0, 1))


def knobs(alpha: float = 0.0, k: int = 1, ratio: float = 1.0, rows: int = 1) -> Knobs:
    return Knobs(*(torch.full((rows, 1), value) for value in (alpha, k, ratio)))


@st.composite
def distributions(draw: Any) -> tuple[Tensor, Tensor]:
    """p, with tokens that it forbids, and q; sometimes nearly one token each, sometimes equal."""
    vocab = draw(st.integers(2, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    p, q = (draw(st.sampled_from([0.3, 2.0, 9.0])) * torch.randn(1, vocab, generator=generator) for _ in range(2))
    if draw(st.booleans()):
        q = p.clone()
    forbidden = torch.rand(1, vocab, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8]))
    forbidden[0, int(p.argmax())] = False
    return p.masked_fill(forbidden, -torch.inf).double().softmax(-1), q.double().softmax(-1)


def by_the_paper(rule: str, p: list[float], q: list[float], alpha: float, k: int, ratio: float) -> list[float]:
    """pi as the paper writes it, one token at a time."""
    left = sum(b for a, b in zip(p, q, strict=True) if a > 0)
    if left == 0:
        return p
    q = [b / left if a > 0 else 0.0 for a, b in zip(p, q, strict=True)]
    distance = sum(max(a - b, 0) for a, b in zip(p, q, strict=True))
    asked = {
        "chow": lambda v: max(q) < 1 - alpha,
        "diff": lambda v: max(q) < max(p) - alpha,
        "opt": lambda v: max(q) < max(p) - alpha * distance,
        "token_v1": lambda v: q[v] < max(p) - alpha,
        "token_v2": lambda v: p[v] < max(p) - alpha,
        "token_v3": lambda v: p[v] < max(p) * (1 - alpha),
        "relaxed": lambda v: p[v] < max(p) * ratio or sum(a > p[v] for a in p) >= k,
    }[rule]
    eta = sum(b for v, b in enumerate(q) if asked(v))
    return [(0 if asked(v) else q[v]) + p[v] * eta for v in range(len(p))]


@given(rules, distributions(), alphas, st.integers(1, 14), st.floats(0, 1))
@settings(deadline=None, max_examples=400)
def test_pi_is_the_papers(rule: str, pq: tuple[Tensor, Tensor], alpha: float, k: int, ratio: float) -> None:
    p, q = pq
    # A rule compares; where both sides are equal but for rounding, either answer is right.
    given = Knobs(*(torch.full((1, 1), value, dtype=torch.float64) for value in (alpha, k, ratio)))
    found = target(p, judge(rule, p, q, given))[0]
    nudged = [by_the_paper(rule, p[0].tolist(), q[0].tolist(), alpha + by, k, ratio + by) for by in (0.0, -1e-9, 1e-9)]
    assert any(np.allclose(found, expected, atol=1e-8) for expected in nudged)


@given(rules, distributions(), alphas, st.integers(1, 14), st.floats(0, 1))
@settings(deadline=None, max_examples=200)
def test_pi_is_a_distribution_that_p_allows(
    rule: str, pq: tuple[Tensor, Tensor], alpha: float, k: int, ratio: float
) -> None:
    p, q = pq
    judged = judge(rule, p, q, knobs(alpha, k, ratio))
    pi = target(p, judged)
    assert pi.sum() == pytest.approx(1) and (pi >= 0).all()
    assert (pi[p == 0] == 0).all() and not judged.kept[p == 0].any()
    assert (pi >= q - 1e-12)[judged.kept].all(), "a token that is left to the draft could be rejected"


@given(st.sampled_from(sorted(set(RULES) - {"relaxed"})), distributions(), alphas, alphas)
@settings(deadline=None, max_examples=200)
def test_more_alpha_leaves_more_to_the_draft(rule: str, pq: tuple[Tensor, Tensor], one: float, two: float) -> None:
    less, more = (judge(rule, *pq, knobs(alpha)).kept for alpha in sorted((one, two)))
    assert (more | ~less).all()


@given(rules, distributions(), st.booleans())
@settings(deadline=None, max_examples=300)
def test_what_is_called_lossless_is(rule: str, pq: tuple[Tensor, Tensor], greedy: bool) -> None:
    p, q = pq
    asked = Cascade(rule, 0.0, 1, 1.0)
    judged = judge(rule, p, q, knobs(0.0))
    if not asked.lossless(greedy) or float(judged.q.max()) == 1:
        return
    if not greedy:
        assert torch.allclose(target(p, judged), p)
        return
    choice, chosen = greedy_choice(judged)
    assert not chosen or choice == p.argmax(-1)


def test_some_are_lossless_and_others_are_not() -> None:
    found = {(rule, greedy) for rule in RULES for greedy in (True, False) if Cascade(rule).lossless(greedy)}
    greedily = {("token_v2", True), ("token_v3", True), ("relaxed", True)}
    assert found == {("chow", True), ("chow", False)} | greedily
    assert not any(Cascade(rule, 0.1, 2, 0.5).lossless(greedy) for rule in RULES for greedy in (True, False))


# The text that a verification leaves behind

SETTINGS: dict[str, Knobs] = {
    # With `pair`, each of them leaves something to the draft.
    "chow": knobs(0.75),
    "diff": knobs(0.2),
    "opt": knobs(0.5),
    "token_v1": knobs(0.15),
    "token_v2": knobs(0.15),
    "token_v3": knobs(0.6),
    "relaxed": knobs(k=5, ratio=0.3),
}


def pair() -> tuple[Tensor, Tensor]:
    """p [1, V], which forbids three tokens, and q [1, V], which is about as sure."""
    generator = torch.Generator().manual_seed(5)
    p, q = (1.2 * torch.randn(1, VOCAB, generator=generator) for _ in range(2))
    p[0, [2, 7, 11]] = -torch.inf
    return p.softmax(-1), (0.5 * q + 0.5 * p.clamp(min=-1)).softmax(-1)


def drawn(tested: Tensor, q: Tensor, drafts: Tensor, renormalise: bool = True) -> Tensor:
    """[n] tokens: x if u < tested(x) / q(x), else from norm(max(tested - q, 0)). tested, q [n, V]."""
    generator = torch.Generator().manual_seed(9)
    accept, resample = torch.rand(2, len(drafts), 1, generator=generator)
    at = drafts[:, None]
    residual = (tested - q).clamp(min=0)
    total = residual.sum(-1, keepdim=True) if renormalise else 1
    instead = (residual.cumsum(-1) < resample * total).sum(-1).clamp(max=VOCAB - 1)
    return torch.where((accept < tested.gather(1, at) / q.gather(1, at)).squeeze(1), drafts, instead)


def chi_square(tokens: Tensor, expected: Tensor) -> float:
    """The probability of counts at least as far off, if the tokens were drawn from `expected` [V]."""
    counts = np.bincount(tokens.numpy(), minlength=VOCAB)
    wanted = expected.double().numpy() * len(tokens)
    if counts[wanted == 0].any():
        return 0.0
    counts, wanted = counts[wanted > 0], wanted[wanted > 0]
    return float(stats.chisquare(counts, wanted * counts.sum() / wanted.sum()).pvalue)


def text_of(rule: str, p: Tensor, q: Tensor, **how: Any) -> Tensor:
    drafts = q.expand(DRAWS, -1).multinomial(1, generator=torch.Generator().manual_seed(3)).squeeze(1)
    rows = (p.log().expand(DRAWS, -1), q.log().expand(DRAWS, -1))
    greedy = torch.zeros(DRAWS, dtype=torch.bool)
    tested = verify.targets(rule, SETTINGS[rule], *rows, drafts, greedy).logits.softmax(-1)
    return drawn(tested, q.expand(DRAWS, -1), drafts, **how)


@pytest.mark.parametrize("rule", RULES)
def test_text_follows_pi(rule: str) -> None:
    p, q = pair()
    pi = target(p, judge(rule, p, q, SETTINGS[rule]))[0]
    assert chi_square(text_of(rule, p, q), pi) > 0.001
    assert chi_square(text_of(rule, p, q), p[0]) < 1e-6, "pi is too near p for this test to tell them apart"


def _swapped(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(verify, "judge", lambda rule, p, q, knobs: judge(rule, q, p, knobs))
    return {}


def _mixed_the_other_way(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(verify, "target", lambda p, judged: target(judged.q, Judged(p, judged.kept)))
    return {}


def _kept_what_is_asked(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    def faulty(rule: str, p: Tensor, q: Tensor, knobs: Knobs) -> Judged:
        judged = judge(rule, p, q, knobs)
        return Judged(judged.q, ~judged.kept & (p > 0))

    patch.setattr(verify, "judge", faulty)
    return {}


def _not_renormalised(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"renormalise": False}


Fault = Callable[[pytest.MonkeyPatch], dict[str, Any]]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fault", [_swapped, _kept_what_is_asked, _not_renormalised])
def test_faults_are_noticed(rule: str, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = pair()
    pi = target(p, judge(rule, p, q, SETTINGS[rule]))[0]
    assert chi_square(text_of(rule, p, q, **fault(monkeypatch)), pi) < 1e-6


@pytest.mark.parametrize("rule", ["token_v1", "token_v2", "token_v3", "relaxed"])
def test_a_mixture_the_other_way_round_is_noticed(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = pair()
    pi = target(p, judge(rule, p, q, SETTINGS[rule]))[0]
    _mixed_the_other_way(monkeypatch)
    assert chi_square(text_of(rule, p, q), pi) < 1e-6


@pytest.mark.parametrize("rule", sorted(set(RULES) - {*NEEDS_Q}))
def test_greedy_drafts_are_a_q_of_one_token(rule: str) -> None:
    """The draft is all that is known: it is left its token, or the text follows p."""
    p, q = pair()
    for draft in range(VOCAB):
        one = torch.tensor([draft])
        made = verify.targets(rule, SETTINGS[rule], p.log(), None, one, torch.zeros(1, dtype=torch.bool))
        kept = bool(judge(rule, p, q, SETTINGS[rule]).kept[0, draft])
        assert bool(made.taken) == kept
        expected = torch.nn.functional.one_hot(one, VOCAB).float() if kept else p
        assert torch.allclose(made.logits.softmax(-1), expected)


@given(rules, distributions(), alphas, st.integers(1, 14), st.floats(0, 1), st.booleans())
@settings(deadline=None, max_examples=200)
def test_rows(rule: str, pq: tuple[Tensor, Tensor], alpha: float, k: int, ratio: float, greedy: bool) -> None:
    """Of every possible draft: what is tested is pi, a token that is taken has all of it, and rows that are p's own
    are so to the last bit."""
    p, q = pq
    vocab = p.shape[1]
    logits, q_logits = (x.float().log().expand(vocab + 1, -1) for x in (p, q))
    drafts = torch.arange(-1, vocab)
    made = verify.targets(
        rule, knobs(alpha, k, ratio, len(drafts)), logits, q_logits, drafts, torch.full((vocab + 1,), greedy)
    )
    judged = judge(rule, logits[:1].softmax(-1), q_logits[:1].softmax(-1), knobs(alpha, k, ratio))
    assert torch.equal(made.logits[0], logits[0]) and not made.taken[0], "there is no draft"
    choice, chosen = greedy_choice(judged)
    for draft in range(vocab):
        row, kept = made.logits[draft + 1], bool(judged.kept[0, draft])
        assert bool(made.taken[draft + 1]) == kept
        if greedy:
            assert torch.equal(row, logits[0]) if not chosen else row.isfinite().nonzero().flatten().equal(choice)
        elif kept:
            assert row.isfinite().nonzero().flatten().tolist() == [draft]
        elif judged.kept.any():
            assert torch.allclose(row.softmax(-1), target(logits[:1].softmax(-1), judged)[0], atol=1e-6)
        else:
            assert torch.equal(row, logits[0])


# What may be asked


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rule": "tokenv3", "alpha": 0.1}, "rule='tokenv3'. It may be one of chow, diff, opt, token_v1"),
        ({"alpha": 0.1}, "rule=None. It may be one of"),
        ({"rule": ["chow"], "alpha": 0.1}, "It may be one of"),
        ({"rule": "chow"}, "alpha=None with rule 'chow'. It must be a number from 0 to 1"),
        ({"rule": "chow", "alpha": 1.5}, "alpha=1.5"),
        ({"rule": "chow", "alpha": float("nan")}, "alpha=nan"),
        ({"rule": "chow", "alpha": "0.1"}, "alpha='0.1'"),
        ({"rule": "chow", "alpha": True}, "alpha=True"),
        ({"rule": "chow", "alpha": 0.1, "k": 3}, "has no k with rule 'chow': it takes alpha"),
        ({"rule": "relaxed", "k": 3}, "ratio=None with rule 'relaxed'"),
        ({"rule": "relaxed", "k": 0, "ratio": 0.3}, "k=0 with rule 'relaxed'. It must be a whole number from 1"),
        ({"rule": "relaxed", "k": 2.0, "ratio": 0.3}, "k=2.0"),
        ({"rule": "relaxed", "alpha": 0.3}, "has no alpha with rule 'relaxed': it takes k and ratio"),
        ("chow", "must be an object such as"),
        (3, "must be an object such as"),
    ],
)
def test_what_is_refused(given: Any, says: str) -> None:
    with pytest.raises(UserError) as raised:
        read(given)
    assert says in str(raised.value)


def test_what_a_server_says() -> None:
    assert read_server(None) is read_server("refuse") is None
    assert read_server({"rule": "chow", "alpha": 1}) == Cascade("chow", 1)
    for wrong in ("chow", "off", ""):
        with pytest.raises(UserError, match="'refuse' to allow none, or leave it out"):
            read_server(wrong)


def test_what_a_request_says() -> None:
    server, own = Cascade("chow", 0.3), Cascade("relaxed", 0.0, 4, 0.5)
    for nothing in (None, {}, {"other": 3}):
        assert read_request(nothing, server) == server
    assert read_request({"orthrus_cascade": "off"}, server) is None
    asked = {"rule": "relaxed", "k": 4, "ratio": 0.5}
    assert read_request({"orthrus_cascade": asked}, server) == own
    assert read_request({"orthrus_cascade": '{"rule": "relaxed", "k": 4, "ratio": 0.5}'}, None) == own
    for wrong in ("on", "chow", "{", "null", "[]", {"rule": "?"}, None):
        with pytest.raises(UserError):
            read_request({"orthrus_cascade": wrong}, None)
    with pytest.raises(UserError, match="no extra argument is called orthrus_cascad"):
        read_request({"orthrus_cascad": "off"}, None)


def test_what_an_engine_cannot_follow() -> None:
    for rule in RULES:
        found = obstacle(Cascade(rule), "greedy", "standard", adaptive=False)
        assert (found is not None) == (rule in NEEDS_Q)
        assert obstacle(Cascade(rule), "probabilistic", "standard", adaptive=False) is None
        assert "'block'" in str(obstacle(Cascade(rule), "probabilistic", "block", adaptive=False))
        assert "adaptive" in str(obstacle(Cascade(rule), "probabilistic", "standard", adaptive=True))
