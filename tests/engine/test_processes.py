"""Across processes: spawned engine cores and workers, tensor parallelism, and the HTTP server."""

import json
import socket
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import other_release
from tests.engine.checkpoints import write_tokenizer
from tests.engine.conftest import Checkpoints
from tests.engine.harness import prompts
from tests.engine.subprocesses import result_of, run
from vllm_orthrus.demo.server import Server, serving
from vllm_orthrus.patches.metrics import METRICS
from vllm_orthrus.patches.versions import vllm_is

pytestmark = pytest.mark.slow

LAST_STEPS = int(vllm_is(">=0.33"))  # of a request that may draft nothing

ONE_PASS_OPTIONS = {"max_num_batched_tokens": 512}

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
    print("RESULT", json.dumps([run.tokens, run.counts, engine.one_pass]))
    engine.close()
"""


def generate(tmp_path: Path, model: Path, speculative: dict[str, Any] | None, options: dict[str, Any]) -> Any:
    """Run an engine whose core and workers are processes of their own."""
    return result_of(tmp_path, GENERATE, str(model), speculative, options, prompts(4), multiprocessing=True)


@pytest.fixture(scope="module")
def expected(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What vLLM without drafts says."""
    tokens, _, counted = generate(tmp_path_factory.mktemp("plain"), tiny.base, None, {})
    assert not counted
    return tokens


@pytest.fixture(scope="module")
def copying(tiny: Checkpoints) -> dict[str, Any]:
    """Oracle 1: every draft is accepted, on every rank."""
    head = {"model": str(tiny.copy_head), "num_speculative_tokens": 1}
    return {"method": "orthrus", "orthrus_passes": "two"} | head


@pytest.mark.feature("tensor parallelism")
@pytest.mark.parametrize("ranks", [1, 2])
def test_spawned_workers(ranks: int, tiny: Checkpoints, copying: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    tokens, (_, drafted, accepted), counted = generate(tmp_path, tiny.base, copying, {"tensor_parallel_size": ranks})
    assert tokens == expected
    assert 0 < drafted == accepted
    assert not counted


def test_a_spawned_engine_times_its_steps(
    tiny: Checkpoints, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As every server's is. vLLM loads plugins there while `EngineCore.__init__`, which times them, is under way."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    tokens, _, _ = generate(tmp_path, tiny.base, {"method": "orthrus", "model": str(tiny.block_head)}, {})
    assert tokens == expected
    (file,) = tmp_path.rglob("steps-*.json")
    assert len(json.loads(file.read_text())["steps"]) == 6, "three modes, with one request and with four"


@pytest.fixture(scope="module")
def one_pass(tiny: Checkpoints) -> dict[str, Any]:
    many = {"orthrus_hypotheses": 8, "orthrus_rows": 512}  # fewer foresee nothing of what this head gets wrong
    return {"method": "orthrus", "model": str(tiny.block_head), "orthrus_passes": "one"} | many


def agree(steps: int, accepted: int, counted: dict[str, int], requests: int) -> bool:
    """Whether one-pass drafting's counts fit together, and fit vLLM's.

    vLLM 0.33 drafts nothing in a step that ends all its requests, so that verification carries nothing.
    """
    new = counted["verifications"] + counted["draft_passes"]
    return (
        counted["hits"] + counted["accepted_count_missed"] + counted["bonus_missed"] == counted["verifications"]
        # New drafts come of each prompt and of each verification: of what it carried, or of a pass of their own.
        and steps + requests - LAST_STEPS * requests <= new <= steps + requests
        and 0 < counted["verifications"] <= counted["tokens"] <= steps + accepted
        and counted["rows"] > 2 * counted["tokens"]
    )


@pytest.fixture(scope="module")
def on_one_rank(
    tiny: Checkpoints, one_pass: dict[str, Any], expected: Any, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    tokens, counts, counted = generate(tmp_path_factory.mktemp("one"), tiny.base, one_pass, ONE_PASS_OPTIONS)
    assert tokens == expected
    assert agree(counts[0], counts[2], counted, requests=4), (counts, counted)
    return counts


@pytest.mark.feature("tensor parallelism")
@pytest.mark.feature("Ray")
@pytest.mark.parametrize("workers", ["spawned", "ray"])
def test_one_pass_on_two_ranks(
    workers: str, tiny: Checkpoints, one_pass: dict[str, Any], expected: Any, on_one_rank: Any, tmp_path: Path
) -> None:
    """Each rank guesses for itself; were their guesses to differ, their sums would be of different rows.

    Ray's actors get the config by its name, before they have loaded any plugin.
    """
    options: dict[str, Any] = {"tensor_parallel_size": 2} | ONE_PASS_OPTIONS
    if workers == "ray":
        pytest.importorskip("ray")
        options["ray"] = True
    tokens, counts, counted = generate(tmp_path, tiny.base, one_pass, options)
    assert tokens == expected
    assert counts == on_one_rank
    assert agree(counts[0], counts[2], counted, requests=4), "both ranks count, and one of them is to be heard"


SKEWED = """
import json, os, sys
from tests.engine.harness import Engine
if __name__ == "__main__":
    model, speculative, other = map(json.loads, sys.argv[1:])
    # Processes that are started from here on find another version first.
    os.environ["PYTHONPATH"] = os.pathsep.join([other, os.environ["PYTHONPATH"]])
    try:
        Engine(model, speculative)
        print("RESULT", json.dumps("started"))
    except Exception as error:
        print("RESULT", json.dumps(repr(error)))
"""


def test_workers_with_another_version_are_named(tiny: Checkpoints, copying: dict[str, Any], tmp_path: Path) -> None:
    """A process of the engine runs another release of the plugin: it says so, with both versions and its node."""
    other = tmp_path / "other"
    other.mkdir()
    arguments = (str(tiny.base), copying, str(other_release.write(other)))
    done = run(tmp_path, SKEWED, *arguments, multiprocessing=True)
    assert "RESULT" in done.stdout and 'RESULT "started"' not in done.stdout
    said = done.stdout + done.stderr
    assert f"node {socket.gethostname()} has vllm-orthrus {other_release.RELEASE} and vLLM" in said, said[-3000:]
    assert f"the engine was configured with vllm-orthrus {version('vllm-orthrus')} and vLLM" in said


@pytest.mark.thorough
@pytest.mark.feature("tensor parallelism")
def test_a_head_in_fp8_on_two_ranks(tiny: Checkpoints, one_pass: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    """Scales are of whole rows, also of the projection whose rows are cut: both ranks know the head of a single one."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    settings = one_pass | {"orthrus_head_quantization": "fp8"}
    alone = generate(tmp_path / "one", tiny.base, settings, ONE_PASS_OPTIONS)
    both = generate(tmp_path / "two", tiny.base, settings, {"tensor_parallel_size": 2} | ONE_PASS_OPTIONS)
    assert both[:2] == alone[:2]  # draft passes depend on which requests had come when the first step began
    assert alone[0] == expected
    assert alone[1][2] > 0
    for _, counts, counted in (alone, both):
        assert agree(counts[0], counts[2], counted, requests=4), (counts, counted)


@pytest.mark.thorough
@pytest.mark.feature("tensor parallelism")
def test_one_product_on_two_ranks(
    tiny: Checkpoints, one_pass: dict[str, Any], expected: Any, on_one_rank: Any, tmp_path: Path
) -> None:
    """Each rank keeps its part of the logits, and what is taken of them is gathered."""
    once = one_pass | {"orthrus_vocabulary": "once"}
    tokens, counts, counted = generate(tmp_path, tiny.base, once, {"tensor_parallel_size": 2} | ONE_PASS_OPTIONS)
    assert tokens == expected
    assert counts == on_one_rank
    assert agree(counts[0], counts[2], counted, requests=4)


@pytest.fixture(scope="module", params=[1, 2])
def server(
    tiny: Checkpoints,
    one_pass: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Server]:
    """With one front end, and with two, which share the counting."""
    write_tokenizer(tiny.base)
    log = tmp_path_factory.mktemp("server") / "log"
    options = [
        *("--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--max-num-seqs", "8"),
        *("--max-num-batched-tokens", "512", "--kv-cache-memory-bytes", str(32 << 20)),
        *("--api-server-count", str(request.param)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        with serving(tiny.base, log, one_pass, options) as server:
            yield server


def one_pass_counters(server: Server) -> dict[str, int]:
    """Added up over the front ends, which answer for each other."""
    found = server.metrics("vllm:orthrus_")
    by_name = {(sample.name, sample.labels.get("cause")): int(sample.value) for sample in found}
    assert len(by_name) == len(found) == len(METRICS)
    return {name: by_name[metric.name + "_total", metric.cause] for name, metric in METRICS.items()}


@pytest.mark.feature("completions, streamed and not")
@pytest.mark.feature("several API servers")
def test_server_and_metrics(server: Server) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")

    def complete(prompt: list[int], stream: bool) -> Any:
        return client.completions.create(
            model="tiny", prompt=prompt, temperature=0, max_tokens=24, stream=stream, extra_body={"ignore_eos": True}
        )

    given = prompts(4, shortest=20)
    whole = [complete(prompt, stream=False) for prompt in given]
    assert all(answer.usage.completion_tokens == 24 for answer in whole)
    first, counted = server.draft_counters(), one_pass_counters(server)
    assert agree(first.cycles, first.accepted, counted, requests=4)
    # One request at a time: no step reads prompts beside others.
    assert 0 <= first.cycles + first.accepted - counted["tokens"] <= LAST_STEPS * 4 * 16
    assert 0 < first.accepted < first.drafted
    assert counted["draft_passes"] == 4
    assert all(counted.values()), "something was never counted"
    streamed = ["".join(part.choices[0].text for part in complete(prompt, stream=True)) for prompt in given]
    assert streamed == [answer.choices[0].text for answer in whole]
    both = server.draft_counters()
    assert agree(both.cycles, both.accepted, one_pass_counters(server), requests=8)
