"""Engines are expensive: each configuration is started once and shared by the tests that need just that."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine import checkpoints
from tests.engine.harness import Engine

THOROUGH = bool(os.environ.get("ORTHRUS_TEST_THOROUGH"))

StartEngine = Callable[..., Engine]


def one_pass(head: Any, **settings: Any) -> dict[str, Any]:
    few = {"orthrus_passes": "one", "orthrus_hypotheses": 4, "orthrus_rows": 512, "num_speculative_tokens": 5}
    return {"method": "orthrus", "model": str(head)} | few | settings


class Checkpoints:
    def __init__(self, folder: Path) -> None:
        self.base = checkpoints.write_base(folder / "base")
        self.copy_head = checkpoints.write_head(folder / "copy-head", block_size=1)
        self.block_head = checkpoints.write_head(folder / "block-head", block_size=8, noise=0.05)
        self.merged = checkpoints.write_merged(folder / "merged", block_size=32)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session", params=["gather", "write_through", pytest.param("kernel", marks=pytest.mark.once)])
def path(request: pytest.FixtureRequest) -> str:
    """How a block reads the cache.

    The kernel is ours, and minutes of interpreting; what vLLM gives it is what tests/rehearsal run on every version.
    """
    return str(request.param)


@pytest.fixture
def compiled(path: str) -> None:
    """For tests that say nothing of the kernel beyond what others say: interpreted, it would take minutes in each."""
    if path == "kernel" and not THOROUGH:
        pytest.skip("a matter for the other ways to read the cache; ORTHRUS_TEST_THOROUGH=1 runs it all the same")


@pytest.fixture(scope="session")
def oracle_config(tiny: Checkpoints, path: str) -> dict[str, Any]:
    """One row per block, one draft, head = copy of the base: the diffusion view *is* the autoregressive one.

    So every draft must be accepted, and a wrong slot, position, prefix length or layout shows as one that is not.
    """
    return {
        "method": "orthrus",
        "model": str(tiny.copy_head),
        "num_speculative_tokens": 1,
        "orthrus_attention": path,
        "orthrus_passes": "two",
    }


@pytest.fixture(scope="module")
def start(tiny: Checkpoints) -> Iterator[StartEngine]:
    """Start an engine on the tiny base; closed with the module."""
    running: list[Engine] = []

    def start_engine(speculative: dict[str, Any] | None = None, model: Path | None = None, **options: Any) -> Engine:
        engine = Engine(model or tiny.base, speculative, **options)
        running.append(engine)
        return engine

    yield start_engine
    for engine in running:
        engine.close(collect=False)
    gc.collect()


@pytest.fixture(scope="session")
def plain(tiny: Checkpoints) -> Iterator[Engine]:
    """vLLM without speculation."""
    engine = Engine(tiny.base)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def oracle(start: StartEngine, oracle_config: dict[str, Any]) -> Engine:
    return start(oracle_config)


@pytest.fixture
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines started in this test schedule ahead, which vLLM switches off on CPUs, where it gains nothing."""
    from vllm.engine.arg_utils import EngineArgs  # once the harness has said how vLLM is to run

    create = EngineArgs.create_engine_config

    def create_asynchronous(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        config = create(self, *args, **kwargs)
        config.scheduler_config.async_scheduling = True
        return config

    monkeypatch.setattr(EngineArgs, "create_engine_config", create_asynchronous)
