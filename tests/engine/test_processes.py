"""Across processes: spawned engine cores and workers, tensor parallelism, and the HTTP server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.engine.checkpoints import write_tokenizer
from tests.engine.conftest import Checkpoints
from tests.engine.harness import prompts
from tests.engine.subprocesses import result_of
from vllm_orthrus.demo.server import DraftCounters, Server, serving

pytestmark = pytest.mark.slow

GENERATE = """
import json, sys
from tests.engine.harness import Engine
if __name__ == "__main__":
    model, speculative, options, prompts = map(json.loads, sys.argv[1:])
    if options.pop("ray", False):
        from tests.engine.ray_on_cpu import RayOnCpu
        options["distributed_executor_backend"] = RayOnCpu
    engine = Engine(model, speculative, **options)
    run = engine.run(prompts, 24)
    print("RESULT", json.dumps([run.tokens, run.counts]))
    engine.close()
"""


def generate(tmp_path: Path, model: Path, speculative: dict[str, Any] | None, options: dict[str, Any]) -> Any:
    """Run an engine whose core and workers are processes of their own."""
    return result_of(tmp_path, GENERATE, str(model), speculative, options, prompts(4), multiprocessing=True)


@pytest.fixture(scope="module")
def expected(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What vLLM without drafts says."""
    tokens, _ = generate(tmp_path_factory.mktemp("plain"), tiny.base, None, {})
    return tokens


@pytest.fixture(scope="module")
def copying(tiny: Checkpoints) -> dict[str, Any]:
    """Oracle 1: every draft is accepted, on every rank."""
    head = {"model": str(tiny.copy_head), "num_speculative_tokens": 1}
    return {"method": "orthrus", "orthrus_passes": "two"} | head


@pytest.mark.parametrize("ranks", [1, 2])
def test_spawned_workers(ranks: int, tiny: Checkpoints, copying: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    tokens, (_, drafted, accepted) = generate(tmp_path, tiny.base, copying, {"tensor_parallel_size": ranks})
    assert tokens == expected
    assert 0 < drafted == accepted


def test_ray_workers(tiny: Checkpoints, copying: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    """The config travels to Ray's actors by name, before they have loaded any plugin."""
    pytest.importorskip("ray")
    tokens, (_, drafted, accepted) = generate(tmp_path, tiny.base, copying, {"tensor_parallel_size": 2, "ray": True})
    assert tokens == expected
    assert 0 < drafted == accepted


def test_one_pass_on_two_ranks(tiny: Checkpoints, expected: Any, tmp_path: Path) -> None:
    """Each rank guesses for itself; were their guesses to differ, their sums would be of different rows."""
    one_pass = {"method": "orthrus", "model": str(tiny.block_head), "orthrus_passes": "one", "orthrus_rows": 512}
    counts = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        options = {"tensor_parallel_size": ranks, "max_num_batched_tokens": 512}
        tokens, (_, *drafts) = generate(folder, tiny.base, one_pass, options)
        assert tokens == expected
        counts.append(drafts)
    assert counts[0] == counts[1]
    assert counts[0][1] > 0


@pytest.fixture(scope="module")
def server(tiny: Checkpoints, copying: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    write_tokenizer(tiny.base)
    log = tmp_path_factory.mktemp("server") / "log"
    options = [
        *("--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--max-num-seqs", "8"),
        *("--kv-cache-memory-bytes", str(32 << 20)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        with serving(tiny.base, log, copying, options) as server:
            yield server


def test_server_and_metrics(server: Server) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")

    def complete(prompt: list[int], stream: bool) -> Any:
        return client.completions.create(
            model="tiny", prompt=prompt, temperature=0, max_tokens=24, stream=stream, extra_body={"ignore_eos": True}
        )

    whole = [complete(prompt, stream=False) for prompt in prompts(3)]
    assert all(answer.usage.completion_tokens == 24 for answer in whole)
    # The prompt gives the first token; of the other 23 each step gives two.
    assert server.draft_counters() == DraftCounters(36, 36, 36, [36])
    streamed = ["".join(part.choices[0].text for part in complete(prompt, stream=True)) for prompt in prompts(3)]
    assert streamed == [answer.choices[0].text for answer in whole]
    assert server.draft_counters() == DraftCounters(72, 72, 72, [72])
