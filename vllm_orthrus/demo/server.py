"""`vllm serve` as a child process that is ready when the block begins and gone when it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from prometheus_client.samples import Sample


class ServerError(RuntimeError):
    """The server did not come up; the message holds the end of what it said."""


class DraftCounters(NamedTuple):
    """vLLM's own counters, from `/metrics`."""

    cycles: int
    drafted: int
    accepted: int
    accepted_at: list[int]  # per draft position

    def __sub__(self, earlier: DraftCounters) -> DraftCounters:
        positions = [now - before for now, before in zip_longest(self.accepted_at, earlier.accepted_at, fillvalue=0)]
        totals = (self.cycles - earlier.cycles, self.drafted - earlier.drafted, self.accepted - earlier.accepted)
        return DraftCounters(*totals, positions)

    @property
    def tokens_per_cycle(self) -> float:
        return 1 + self.accepted / self.cycles if self.cycles else 1.0


def serve_command(
    model: Path | str,
    port: int,
    speculative: Mapping[str, object] | None,
    options: Sequence[str],
    name: str = "tiny",
) -> list[str]:
    """The command line a user would type, with this environment's `vllm`."""
    vllm = str(Path(sys.executable).with_name("vllm"))
    command = [vllm, "serve", str(model), "--port", str(port), "--served-model-name", name, *options]
    return [*command, "--speculative-config", json.dumps(dict(speculative))] if speculative else command


class Server:
    def __init__(
        self,
        command: Sequence[str],
        port: int,
        log: Path,
        patience: float = 300,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.command, self.port, self.log, self.patience = command, port, log, patience
        self.environment = os.environ | (variables or {})
        self.url = f"http://127.0.0.1:{port}"

    def __enter__(self) -> Server:
        self.begin()
        self.wait()
        return self

    def begin(self) -> None:
        self.process = subprocess.Popen(
            self.command, env=self.environment, stdout=self.log.open("w"), stderr=subprocess.STDOUT
        )

    def wait(self) -> None:
        """Until it is ready. One that does not come up is stopped."""
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait(self) -> None:
        started = time.monotonic()
        while time.monotonic() - started < self.patience:
            if self.process.poll() is not None:
                raise ServerError(f"vllm serve ended with status {self.process.returncode}:\n{self._said()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        raise ServerError(f"vllm serve was not ready after {self.patience:.0f} s:\n{self._said()}")

    def _said(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join([*lines[-30:], f"(all of it: {self.log})"])

    def stop(self) -> None:
        """Interrupt it, as Ctrl-C does; kill it if it is still there half a minute later."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def metrics(self, prefix: str) -> list[Sample]:
        """Everything under `/metrics` whose name starts with this, except when counting began."""
        from prometheus_client.parser import text_string_to_metric_families

        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as reply:
            families = text_string_to_metric_families(reply.read().decode())
        samples = (sample for family in families for sample in family.samples)
        return [found for found in samples if found.name.startswith(prefix) and not found.name.endswith("_created")]

    def draft_counters(self) -> DraftCounters:
        totals: dict[str, float] = {}
        by_position: dict[int, float] = {}
        for sample in self.metrics("vllm:spec_decode_"):
            if sample.name == "vllm:spec_decode_num_accepted_tokens_per_pos_total":
                position = int(sample.labels["position"])
                by_position[position] = by_position.get(position, 0) + sample.value
            else:
                totals[sample.name] = totals.get(sample.name, 0) + sample.value
        return DraftCounters(
            int(totals.get("vllm:spec_decode_num_drafts_total", 0)),
            int(totals.get("vllm:spec_decode_num_draft_tokens_total", 0)),
            int(totals.get("vllm:spec_decode_num_accepted_tokens_total", 0)),
            [int(by_position[position]) for position in sorted(by_position)],
        )


@contextmanager
def serving(
    model: Path, log: Path, speculative: Mapping[str, object] | None = None, options: Sequence[str] = ()
) -> Iterator[Server]:
    port = free_port()
    with Server(serve_command(model, port, speculative, options), port, log) as server:
        yield server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
