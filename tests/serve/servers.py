"""Real servers with the tiny model, and what can be seen of them from outside."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from vllm_orthrus.bench import cpu_wheel
from vllm_orthrus.demo.server import Server, free_port, serve_command

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-orthrus"
MODEL = "tiny"
PATIENCE = 900.0  # for a server to come up, on a machine that has other things to do
# Between what a form asks for there may be any number of blanks, and a model as small as this one writes nothing else.
FEW_BLANKS = {"frequency_penalty": 2.0}
OPTIONS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16"),
    *("--max-num-batched-tokens", "1024", "--kv-cache-memory-bytes", str(48 << 20)),
)
ONE_PASS = {"orthrus_passes": "one", "orthrus_rows": 512}  # rows for hypotheses in the batches that traffic makes


def drafting(folder: Path, settings: Mapping[str, object] = ONE_PASS, options: Sequence[str] = ()) -> Server:
    """With the tiny head. Not yet started: that is what `with` does."""
    port = free_port()
    speculative = {"method": "orthrus", "model": str(TINY / "head")} | dict(settings)
    return Server(
        serve_command(TINY / "base", port, speculative, [*OPTIONS, *options], MODEL),
        port,
        folder / "orthrus.log",
        PATIENCE,
    )


def plain(folder: Path, options: Sequence[str] = ()) -> Server:
    """Stock vLLM: no plugin has this name, so none is loaded."""
    port = free_port()
    variables = {"VLLM_PLUGINS": "none"} | cpu_wheel.variables(folder / "cpu-wheel")
    command = serve_command(TINY / "base", port, None, [*OPTIONS, *options], MODEL)
    return Server(command, port, folder / "plain.log", PATIENCE, variables)


def processes(server: Server) -> list[psutil.Process]:
    """The server's own and all that it started."""
    first = psutil.Process(server.process.pid)
    return [first, *first.children(recursive=True)]


def process(server: Server, name: str) -> psutil.Process:
    """By the name that vLLM gives it: EngineCore, Worker."""
    return next(one for one in processes(server) if any(f"VLLM::{name}" in word for word in one.cmdline()))


class Holdings(NamedTuple):
    """What a server must give back."""

    resident: dict[str, int]  # bytes, by process
    files: int  # open descriptors
    threads: int

    @property
    def memory(self) -> int:
        return sum(self.resident.values())


def holdings(server: Server) -> Holdings:
    resident: Counter[str] = Counter()
    files = threads = 0
    for one in processes(server):
        try:
            with one.oneshot():
                resident[one.name()] += one.memory_info().rss
                files += one.num_fds()
                threads += one.num_threads()
        except psutil.NoSuchProcess:
            continue
    return Holdings(dict(resident), files, threads)


def counters(server: Server) -> dict[str, float]:
    """All of vLLM's and our counters and gauges, added up over labels that tell no more than who counted."""
    found: Counter[str] = Counter()
    for sample in server.metrics("vllm:"):
        if sample.name.endswith(("_bucket", "_info")):
            continue
        told = [sample.labels[label] for label in ("position", "cause", "finished_reason") if label in sample.labels]
        found["/".join([sample.name.removeprefix("vllm:").removesuffix("_total"), *told])] += sample.value
    return dict(found)


def idle(now: Mapping[str, float]) -> bool:
    return not (now["num_requests_running"] or now["num_requests_waiting"] or now["kv_cache_usage_perc"])


def settle(server: Server, patience: float = 30) -> dict[str, float]:
    """Counters once nothing runs and no block of the cache is held."""
    return until(lambda: counters(server), idle, patience)


def until(look: Callable[[], Any], there: Callable[[Any], bool], patience: float) -> Any:
    """What is seen when it is there, or after so many seconds whatever is seen then."""
    end = time.monotonic() + patience
    while not there(seen := look()) and time.monotonic() < end:
        time.sleep(0.2)
    return seen
