"""What becomes of requests whose server is hit while it works on them.

python -m tests.serve.faults --fault terminate --times 3 [--plain] [-- --shutdown-timeout 10]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.serve import servers, traffic
from tests.serve.traffic import Outcome, Request
from vllm_orthrus.demo.server import Server

BODY = {"model": servers.MODEL, "temperature": 0, "extra_body": {"ignore_eos": True}}


def terminate(server: Server) -> None:
    server.process.send_signal(signal.SIGTERM)


def terminate_all(server: Server) -> None:
    """As a terminal or a service manager does it: everybody at once."""
    for one in servers.processes(server):
        one.send_signal(signal.SIGTERM)


def kill_engine(server: Server) -> None:
    servers.process(server, "EngineCore").kill()


def kill_worker(server: Server) -> None:
    servers.process(server, "Worker").kill()


FAULTS: Mapping[str, Callable[[Server], None]] = {
    "terminate": terminate,
    "terminate-all": terminate_all,
    "kill-engine": kill_engine,
    "kill-worker": kill_worker,
}


class Aftermath(NamedTuple):
    answered: int
    told: list[str]  # errors that clients got
    hanging: int  # requests that had neither, after all patience
    seconds: float  # until the last client knew
    status: int | None  # of the server's process; none: it had not ended
    left_behind: list[str]  # processes that outlived it


def requests(count: int, tokens: int) -> list[Request]:
    """Half of them streams."""
    bodies = (
        {**BODY, "max_tokens": tokens, "messages": [{"role": "user", "content": f"Count from {n} to 999."}]}
        for n in range(count)
    )
    return [Request("short", body, stream=bool(n % 2)) for n, body in enumerate(bodies)]


def strike(
    server: Server, fault: Callable[[Server], None], count: int = 24, tokens: int = 800, patience: float = 25
) -> Aftermath:
    """The server is hit while it answers some and, if there are more than run at a time, others wait."""
    family = servers.processes(server)

    async def struck() -> tuple[list[Outcome], int, float]:
        async with traffic.client(server.url, timeout=10 * patience) as to:
            tasks = [asyncio.create_task(traffic.ask(to, request)) for request in requests(count, tokens)]
            busy = asyncio.to_thread(
                servers.until,
                lambda: servers.counters(server),
                lambda now: now["num_requests_running"] >= min(16, count) and now["generation_tokens"] > 0,
                60,
            )
            await busy
            fault(server)
            begun = time.monotonic()
            done, pending = await asyncio.wait(tasks, timeout=patience)
            seconds = time.monotonic() - begun
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
            return [task.result() for task in done], len(pending), seconds

    outcomes, hanging, seconds = asyncio.run(struck())
    status = servers.until(server.process.poll, lambda found: found is not None, 60)
    left_behind = servers.until(lambda: [one for one in family if _lives(one)], lambda found: not found, 10)
    told = [one.error or "" for one in outcomes if one.error or any(answer.finish == "abort" for answer in one.answers)]
    return Aftermath(len(outcomes) - len(told), told, hanging, seconds, status, [one.name() for one in left_behind])


def _lives(one: psutil.Process) -> bool:
    return bool(one.is_running() and one.status() != psutil.STATUS_ZOMBIE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", choices=FAULTS, default="terminate")
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="stock vLLM instead of ours")
    parser.add_argument("options", nargs="*", help="of `vllm serve`")
    asked = parser.parse_args()
    for _ in range(asked.times):
        folder = Path(tempfile.mkdtemp(prefix="vllm-orthrus-fault-"))
        start = servers.plain if asked.plain else servers.drafting
        with start(folder, options=asked.options) as server:
            found: dict[str, Any] = strike(server, FAULTS[asked.fault])._asdict()
        found["told"] = {text: found["told"].count(text) for text in found["told"]}
        print(json.dumps({"fault": asked.fault, "plain": asked.plain, "log": str(server.log), **found}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
