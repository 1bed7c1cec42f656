"""Sampled text has the distribution that it has without drafts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine import checkpoints
from tests.engine.conftest import THOROUGH, StartEngine
from tests.engine.harness import Engine

pytestmark = pytest.mark.slow

SAMPLES, LENGTH, VOCAB = 320, 8, 12
TEMPERATURES = (0.8, 1.0)
MORE = [
    {"draft_sample_method": "probabilistic", "orthrus_passes": "two", "rejection_sample_method": "block"},
    {"draft_sample_method": "greedy", "orthrus_passes": "one"},
]
ROWS = {"orthrus_rows": 64 * 4 * 6, "orthrus_hypotheses": 3}  # room for one pass with all requests at once
Tokens = np.ndarray[Any, np.dtype[np.int64]]  # [samples, length]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A vocabulary small enough that a few hundred samples fill it."""
    patch = pytest.MonkeyPatch()
    patch.setitem(checkpoints.CONFIG, "vocab_size", VOCAB)
    patch.setattr(checkpoints, "VOCAB", VOCAB)
    patch.setattr(checkpoints, "MASK", VOCAB - 1)
    folder = tmp_path_factory.mktemp("small-vocabulary")
    base = checkpoints.write_base(folder / "base")
    head = checkpoints.write_head(folder / "head", block_size=6, noise=0.1)
    patch.undo()
    return base, head


def sample(engine: Engine, seed: int) -> list[Tokens]:
    """One sample for each temperature."""
    samples = []
    for temperature in TEMPERATURES:
        run = engine.run([[1, 5, 3, 7]] * SAMPLES, LENGTH, temperature=temperature, seed=seed * 10_000)
        if run.counts.drafted:
            assert 0 < run.counts.accepted < run.counts.drafted
        samples.append(np.array(run.tokens))
    return samples


def distance(one: Tokens, two: Tokens) -> float:
    """Chi-square between two samples, over the token at each position and over each pair of neighbours."""
    total = 0.0
    pairs = [(sample[:, :-1] * VOCAB + sample[:, 1:]) for sample in (one, two)]
    for left, right in ((one, two), (pairs[0], pairs[1])):
        for position in range(left.shape[1]):
            a = np.bincount(left[:, position], minlength=VOCAB * VOCAB)
            b = np.bincount(right[:, position], minlength=VOCAB * VOCAB)
            seen = a + b > 0
            total += float((((a - b) ** 2)[seen] / (a + b)[seen]).sum())
    return total


def probability_of_same_source(one: Tokens, two: Tokens, shuffles: int = 400) -> float:
    """Permutation test: how often two random halves of the pool differ at least as much."""
    generator = np.random.default_rng(0)
    pool, found, at_least = np.concatenate([one, two]), distance(one, two), 0
    for _ in range(shuffles):
        shuffled = pool[generator.permutation(len(pool))]
        at_least += distance(shuffled[: len(one)], shuffled[len(one) :]) >= found
    return (at_least + 1) / (shuffles + 1)


def least_probability(engine: Engine, seed: int, plain_samples: list[Tokens]) -> float:
    """Of the same source, over the temperatures."""
    return min(probability_of_same_source(*pair) for pair in zip(sample(engine, seed), plain_samples, strict=True))


@pytest.fixture(scope="module")
def plain_samples(start: StartEngine, small: tuple[Path, Path]) -> list[Tokens]:
    return sample(start(None, model=small[0], max_num_seqs=64), seed=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"draft_sample_method": "greedy", "orthrus_passes": "two"},
        {"draft_sample_method": "probabilistic", "orthrus_passes": "two"},
        {"draft_sample_method": "probabilistic", "orthrus_passes": "one"},
        *(MORE if THOROUGH else []),
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_same_distribution(
    settings: dict[str, Any], start: StartEngine, small: tuple[Path, Path], plain_samples: list[Tokens]
) -> None:
    base, head = small
    engine = start({"method": "orthrus", "model": str(head)} | ROWS | settings, model=base, max_num_seqs=64)
    assert least_probability(engine, 2, plain_samples) > 0.005


def test_the_test_notices(start: StartEngine, small: tuple[Path, Path], plain_samples: list[Tokens]) -> None:
    """Plain vLLM against itself passes; drafts accepted by a coin instead of by the target do not."""
    base, head = small
    plain = start(None, model=base, max_num_seqs=64)
    assert least_probability(plain, 3, plain_samples) > 0.005
    coin = {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 3.0}
    lossy = start({"method": "orthrus", "model": str(head)} | coin, model=base, max_num_seqs=64)
    assert least_probability(lossy, 2, plain_samples) < 0.005
