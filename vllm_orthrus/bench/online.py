"""Ways to decode as users meet them: `vllm serve`, with vLLM's own benchmark as the client."""

from __future__ import annotations

import json
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch

from vllm_orthrus.bench import cpu_wheel
from vllm_orthrus.bench.process import AnsweringProcess
from vllm_orthrus.bench.prompts import Prompt
from vllm_orthrus.bench.settings import Settings
from vllm_orthrus.bench.texts import Texts
from vllm_orthrus.bench.turns import Decoder, Drafts, Turn
from vllm_orthrus.bench.ways import Way
from vllm_orthrus.demo.server import Server, ServerError, free_port, serve_command
from vllm_orthrus.errors import UserError

PATIENCE = 3600.0  # large models take their time to load
LATENCIES = ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms")


class Served:
    """One way, behind its server."""

    def __init__(self, server: Server, name: str, client: AnsweringProcess, settings: Settings) -> None:
        self.server, self.name, self.client, self.settings = server, name, client, settings

    def answers(self, prompts: Sequence[Prompt], tokens: int) -> Texts:
        return [self._answer(prompt, tokens) for prompt in prompts]

    def _answer(self, prompt: Prompt, tokens: int) -> list[int]:
        asked = {"model": self.name, "prompt": prompt.tokens, "max_tokens": tokens, "temperature": 0}
        asked |= {"return_token_ids": True, "ignore_eos": self.settings.ignore_eos}
        request = urllib.request.Request(
            f"{self.server.url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as reply:
                return list(json.load(reply)["choices"][0]["token_ids"])
        except urllib.error.HTTPError as error:
            raise UserError(
                f"{self.name} refuses a prompt of {len(prompt.tokens)} tokens with --tokens {tokens}: "
                f"{error.read().decode(errors='replace')} Fewer --tokens help, or a larger --max-model-len behind --."
            ) from error

    def turn(self, prompts: Sequence[Prompt], at_once: int) -> Turn:
        before = self.server.draft_counters()
        with tempfile.TemporaryDirectory() as folder:
            found = self.client.ask(self._arguments(prompts, at_once, Path(folder)))
        if found["completed"] < len(prompts):
            failed = f"{len(prompts) - found['completed']} of {len(prompts)} requests failed"
            raise UserError(f"{self.name}: {failed}. Its log says why: {self.server.log}")
        drafts = self.server.draft_counters() - before
        counted = Drafts(drafts.cycles, drafts.drafted, drafts.accepted)
        latencies = {name: found[name] for name in LATENCIES}
        return Turn(found["total_output_tokens"], found["duration"], counted, latencies)

    def _arguments(self, prompts: Sequence[Prompt], at_once: int, folder: Path) -> list[str]:
        """Of `vllm bench serve`. Prompts are rendered already, and the same for all ways."""
        dataset = folder / "prompts.jsonl"
        dataset.write_text("".join(json.dumps({"prompt": prompt.text}) + "\n" for prompt in prompts))
        return [
            *("--base-url", self.server.url, "--model", self.settings.model, "--served-model-name", self.name),
            *("--dataset-name", "custom", "--dataset-path", str(dataset), "--num-prompts", str(len(prompts))),
            *("--skip-chat-template", "--disable-shuffle", "--extra-body", json.dumps({"add_special_tokens": False})),
            *("--output-len", str(self.settings.tokens), "--temperature", str(self.settings.temperature)),
            *("--max-concurrency", str(at_once), "--percentile-metrics", "ttft,tpot", "--metric-percentiles", "99"),
            *("--save-result", "--result-dir", str(folder), "--result-filename", "result.json", "--disable-tqdm"),
            *(["--ignore-eos"] if self.settings.ignore_eos else []),
        ]


@contextmanager
def client(settings: Settings) -> Iterator[AnsweringProcess]:
    """One for all servers and all turns."""
    with closing(AnsweringProcess("vllm_orthrus.bench.client", {}, log=settings.logs / "client.log")) as process:
        yield process


@contextmanager
def serving(settings: Settings, client: AnsweringProcess, ways: Sequence[Way]) -> Iterator[Mapping[str, Decoder]]:
    """On a GPU they come up one after the other, as each looks how much memory is left before it takes its share."""
    options = settings.serve_options(len(ways))
    found: dict[str, Decoder] = {}
    servers = []
    with ExitStack() as stack:
        try:
            for way in ways:
                port = free_port()
                command = serve_command(settings.model, port, way.speculative, options, way.name)
                stock = cpu_wheel.variables(settings.logs / "cpu-wheel") if way.variables else {}
                log = settings.logs / f"{way.name}.log"
                server = Server(command, port, log, PATIENCE, settings.variables | way.variables | stock)
                server.begin()
                stack.callback(server.stop)
                if torch.cuda.is_available():
                    server.wait()
                servers.append(server)
                found[way.name] = Served(server, way.name, client, settings)
            for server in servers:
                server.wait()
        except ServerError as error:
            raise UserError(
                f"{error}\nA way did not come up. If it was for lack of memory: --one-at-a-time gives each all of it."
            ) from error
        yield found
