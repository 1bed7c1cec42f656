"""Across processes: spawned engine cores and workers, tensor parallelism, and the HTTP server."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.engine.checkpoints import write_tokenizer
from tests.engine.conftest import Checkpoints
from tests.engine.harness import prompts

pytestmark = pytest.mark.slow

GENERATE = """
import json, sys
from tests.engine.harness import Engine
if __name__ == "__main__":
    model, speculative, options, prompts = map(json.loads, sys.argv[1:])
    engine = Engine(model, speculative, **options)
    run = engine.run(prompts, 24)
    print("RESULT", json.dumps([run.tokens, run.counts]))
    engine.close()
"""


def generate(tmp_path: Path, model: Path, speculative: dict[str, Any] | None, options: dict[str, Any]) -> Any:
    """Run an engine whose core and workers are processes of their own."""
    script = tmp_path / "generate.py"
    script.write_text(GENERATE)
    arguments = [json.dumps(value) for value in (str(model), speculative, options, prompts(4))]
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    done = subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert results, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(results[0].removeprefix("RESULT"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_spawned_workers(ranks: int, tiny: Checkpoints, oracle_config: dict[str, Any], tmp_path: Path) -> None:
    expected, _ = generate(tmp_path, tiny.base, None, {})
    tokens, (_, drafted, accepted) = generate(tmp_path, tiny.base, oracle_config, {"tensor_parallel_size": ranks})
    assert tokens == expected
    assert 0 < drafted == accepted


class Server:
    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=120) as answer:
            return str(answer.read().decode())

    def counter(self, name: str) -> float:
        metric = f"vllm:spec_decode_{name}_total"
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(metric)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


@pytest.fixture(scope="module")
def server(
    tiny: Checkpoints, oracle_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    write_tokenizer(tiny.base)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "serve", str(tiny.base), "--port", str(port)),
        *("--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "256"),
        *("--enforce-eager", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(32 << 20)),
        *("--speculative-config", json.dumps(oracle_config)),
    ]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-6000:]
            try:
                Server(url).get("/health")
                break
            except OSError:
                time.sleep(1)
        yield Server(url)
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_server_and_metrics(server: Server) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")

    def complete(prompt: list[int], stream: bool) -> Any:
        return client.completions.create(
            model="tiny", prompt=prompt, temperature=0, max_tokens=24, stream=stream, extra_body={"ignore_eos": True}
        )

    whole = [complete(prompt, stream=False) for prompt in prompts(3)]
    assert all(answer.usage.completion_tokens == 24 for answer in whole)
    drafted, accepted = server.counter("num_draft_tokens"), server.counter("num_accepted_tokens")
    # The prompt gives the first token; of the other 23 each step gives two.
    assert drafted == accepted == 3 * 12
    assert server.counter("num_drafts") == 3 * 12
    streamed = ["".join(part.choices[0].text for part in complete(prompt, stream=True)) for prompt in prompts(3)]
    assert streamed == [answer.choices[0].text for answer in whole]
    assert server.counter("num_draft_tokens") == 2 * drafted
