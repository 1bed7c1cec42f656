"""Consensus rules, and the distribution that sampling leaves behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.unit.conftest import make_base, make_reference
from vllm_orthrus.training.rejection import verify_greedy, verify_sampling

DRAWS = 20_000


@given(st.integers(1, 6), st.integers(1, 5), st.integers(2, 9), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_greedy_keeps_the_longest_agreed_prefix(batch: int, drafts: int, vocab: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, drafts + 1, vocab, generator=generator)
    drafted = torch.randint(0, vocab, (batch, drafts), generator=generator)
    verdict = verify_greedy(drafted, logits)
    for row in range(batch):
        choice = logits[row].argmax(-1).tolist()
        kept = 0
        while kept < drafts and drafted[row, kept] == choice[kept]:
            kept += 1
        assert (int(verdict.accepted[row]), int(verdict.bonus[row])) == (kept, choice[kept])


def test_equal_distributions_accept_everything() -> None:
    p = torch.softmax(torch.randn(500, 4, 16, generator=torch.Generator().manual_seed(0)), -1)
    drafts = torch.multinomial(p[:, :3].flatten(0, 1), 1).view(500, 3)
    assert (verify_sampling(drafts, p[:, :3], p).accepted == 3).all()


def test_one_token_follows_p_exactly() -> None:
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.softmax(2 * torch.randn(16, generator=generator), -1) for _ in range(2))
    drafts = torch.multinomial(q.expand(DRAWS, -1), 1, generator=generator)
    target = p.expand(DRAWS, 2, -1)
    verdict = verify_sampling(drafts, q.expand(DRAWS, 1, -1), target, generator)
    first = torch.where(verdict.accepted > 0, drafts[:, 0], verdict.bonus)
    assert chi_square(first, p) > 0.001
    assert chi_square(drafts[:, 0], p) < 1e-6, "q is too near p for this test to tell them apart"


@pytest.mark.slow
@pytest.mark.parametrize("drafting", ["probabilistic", "greedy"])
def test_generated_text_follows_the_model(drafting: str) -> None:
    """Vocabulary of 16, 20,000 draws of three tokens: each position against its exact distribution."""
    reference = make_reference(make_base(vocab_size=16, num_hidden_layers=2, initializer_range=0.15), 4, noise=0.1)
    prompt, temperature = [3, 9, 1], 0.8
    generator = torch.Generator().manual_seed(2)
    drawn: list[list[int]] = []
    accepted = 0
    while len(drawn) < DRAWS:
        part = reference.generate([prompt] * 2000, 3, temperature, drafting=drafting, generator=generator)  # type: ignore[arg-type]
        drawn += [generation.tokens for generation in part]
        accepted += sum(cycle.accepted for generation in part for cycle in generation.cycles)
    assert accepted > DRAWS / 10, "drafts were hardly ever accepted, so this tests only the AR view"
    tokens = torch.tensor(drawn)

    expected = exact_distribution(reference.base, prompt, temperature)  # [16, 16, 16]
    joint = tokens[:, 0] * 256 + tokens[:, 1] * 16 + tokens[:, 2]
    assert chi_square(tokens[:, 0], expected.sum((1, 2))) > 0.001
    assert chi_square(tokens[:, 1], expected.sum((0, 2))) > 0.001
    assert chi_square(joint, expected.flatten()) > 0.001
    hotter = exact_distribution(reference.base, prompt, 1.0)
    assert chi_square(joint, hotter.flatten()) < 1e-6, "the test cannot tell a wrong temperature"


def exact_distribution(base: torch.nn.Module, prompt: list[int], temperature: float) -> torch.Tensor:
    """P(x1, x2, x3 | prompt) by running the model on all 256 continuations."""
    vocab = 16
    pairs = torch.cartesian_prod(torch.arange(vocab), torch.arange(vocab))
    ids = torch.cat((torch.tensor(prompt).expand(vocab * vocab, -1), pairs), 1)
    with torch.no_grad():
        p = torch.softmax(base(input_ids=ids).logits[:, len(prompt) - 1 :].double() / temperature, -1)
    first = p[0, 0]  # [16]
    second = p[::vocab, 1]  # [16, 16]
    third = p[:, 2].view(vocab, vocab, vocab)
    return first[:, None, None] * second[..., None] * third


def chi_square(drawn: torch.Tensor, probabilities: torch.Tensor) -> float:
    """p-value; cells with fewer than 5 expected draws are pooled."""
    expected = probabilities.double().numpy() * len(drawn)
    observed = np.bincount(drawn.numpy(), minlength=len(expected)).astype(float)
    rare = expected < 5
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        observed = np.append(observed[~rare], observed[rare].sum())
    expected *= observed.sum() / expected.sum()
    return float(stats.chisquare(observed, expected).pvalue)
