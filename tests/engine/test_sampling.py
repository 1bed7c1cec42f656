"""Sampled text has the distribution that it has without drafts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.checkpoints import write_selector, write_with_vocabulary
from tests.engine.conftest import THOROUGH, StartEngine
from tests.engine.harness import Engine
from vllm_orthrus.heads import open_head, save_head
from vllm_orthrus.kernels import select

pytestmark = pytest.mark.slow

SAMPLES, LENGTH, VOCAB = 640 if THOROUGH else 160, 6, 12
CASES: list[tuple[dict[str, str], float]] = [
    ({"draft_sample_method": "greedy", "orthrus_passes": "two"}, 1.0),
    ({"draft_sample_method": "probabilistic", "orthrus_passes": "two"}, 0.8),
    ({"draft_sample_method": "probabilistic", "orthrus_passes": "one"}, 0.8),
    ({"draft_sample_method": "probabilistic", "orthrus_passes": "one"}, 1.0),
]
if THOROUGH:
    CASES += [
        ({"draft_sample_method": "probabilistic", "orthrus_passes": "two"}, 1.0),
        ({"draft_sample_method": "probabilistic", "orthrus_passes": "two", "rejection_sample_method": "block"}, 1.0),
        ({"draft_sample_method": "greedy", "orthrus_passes": "one"}, 0.8),
        ({"draft_sample_method": "greedy", "orthrus_passes": "one"}, 1.0),
    ]
SELECTED: list[tuple[dict[str, str], float]] = [
    ({"draft_sample_method": "probabilistic", "orthrus_passes": passes}, 0.8) for passes in ("two", "one")
]
ROWS = {"orthrus_rows": 64 * 4 * 6, "orthrus_hypotheses": 3}  # room for one pass with all requests at once
Tokens = np.ndarray[Any, np.dtype[np.int64]]  # [samples, length]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    return write_with_vocabulary(VOCAB, 6, tmp_path_factory.mktemp("small-vocabulary"))


def sample(engine: Engine, seed: int, temperature: float) -> Tokens:
    run = engine.run([[1, 5, 3, 7]] * SAMPLES, LENGTH, temperature=temperature, seed=seed * 10_000)
    if run.counts.drafted:
        assert 0 < run.counts.accepted < run.counts.drafted
    return np.array(run.tokens)


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


@pytest.fixture(scope="module")
def plain(start: StartEngine, small: tuple[Path, Path]) -> Engine:
    return start(None, model=small[0], max_num_seqs=64)


@pytest.fixture(scope="module")
def plain_samples(plain: Engine) -> dict[float, Tokens]:
    return {temperature: sample(plain, 1, temperature) for temperature in (0.8, 1.0)}


def name(case: Any) -> str:
    return "-".join(case.values()) if isinstance(case, dict) else str(case)


@pytest.mark.feature("temperature: the same distribution")
@pytest.mark.parametrize(("settings", "temperature"), CASES, ids=name)
def test_same_distribution(
    settings: dict[str, Any],
    temperature: float,
    start: StartEngine,
    small: tuple[Path, Path],
    plain_samples: dict[float, Tokens],
) -> None:
    base, head = small
    engine = start({"method": "orthrus", "model": str(head)} | ROWS | settings, model=base, max_num_seqs=64)
    assert probability_of_same_source(sample(engine, 2, temperature), plain_samples[temperature]) > 0.005


@pytest.fixture(scope="module")
def selector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a third of the vocabulary, so that most tokens are never drafted."""
    return write_selector(tmp_path_factory.mktemp("selector"), candidates=4)


@pytest.mark.feature("a selector beside the head")
@pytest.mark.parametrize(("settings", "temperature"), SELECTED, ids=name)
def test_same_distribution_with_a_selector(
    settings: dict[str, Any],
    temperature: float,
    start: StartEngine,
    small: tuple[Path, Path],
    selector: Path,
    plain_samples: dict[float, Tokens],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And another if the verification is told something else than what drafts are drawn from."""
    base, head = small
    settings = {"method": "orthrus", "model": str(head), "orthrus_selector": str(selector)} | ROWS | settings
    engine = start(settings, model=base, max_num_seqs=64)
    assert probability_of_same_source(sample(engine, 2, temperature), plain_samples[temperature]) > 0.005
    keep = select._keep
    monkeypatch.setattr(select, "_keep", lambda *drawn: keep(*drawn[:-1], -drawn[-1]))  # the likeliest as the least
    assert probability_of_same_source(sample(engine, 2, temperature), plain_samples[temperature]) < 0.005


def test_the_test_notices(
    start: StartEngine, small: tuple[Path, Path], plain: Engine, plain_samples: dict[float, Tokens]
) -> None:
    """Plain vLLM against itself passes; drafts accepted by a coin instead of by the target do not."""
    base, head = small
    assert probability_of_same_source(sample(plain, 3, 0.8), plain_samples[0.8]) > 0.005
    coin = {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 3.0, "orthrus_modes": []}
    lossy = start({"method": "orthrus", "model": str(head)} | coin, model=base, max_num_seqs=64)
    assert probability_of_same_source(sample(lossy, 2, 0.8), plain_samples[0.8]) < 0.005


NONSENSE = pytest.mark.parametrize(
    ("value", "passes"), [(1e38, "one"), (1e38, "two"), (float("nan"), "one")], ids=["one", "two", "NaN"]
)


@NONSENSE
def test_drafts_from_nonsense(
    value: float,
    passes: str,
    start: StartEngine,
    small: tuple[Path, Path],
    plain_samples: dict[float, Tokens],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Rows that overflow draft nothing that would be taken for sense. A head that is not finite says so once, and the
    text is as if it were not there."""
    base, head = small
    checkpoint = open_head(head)
    broken = {name: torch.full_like(tensor, value) for name, tensor in checkpoint.tensors()}
    save_head(tmp_path / "broken", broken, checkpoint.config)
    settings = {"orthrus_passes": passes, "draft_sample_method": "probabilistic"}
    engine = start(
        {"method": "orthrus", "model": str(tmp_path / "broken")} | ROWS | settings, model=base, max_num_seqs=64
    )
    said = {record.getMessage() for record in caplog.records if "not finite" in record.getMessage()}
    told = value != value
    assert len(said) == told
    assert probability_of_same_source(sample(engine, 2, 0.8), plain_samples[0.8]) > 0.005
    assert (engine.run([[1, 5, 3, 7]] * 8, 12).counts.drafted == 0) == told
