"""One server with the tiny head, and stock vLLM for what its answers must be."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.serve import servers, traffic
from tests.serve.soak import Soaked, soak
from tests.serve.traffic import Outcome, Pool, Request
from vllm_orthrus.demo.server import Server

# So few blocks that a burst of requests has to be stopped and started again, and all of them are soon in use.
FEW_BLOCKS = ("--kv-cache-memory-bytes", str(12 << 20))
# Seconds that a server which is told to stop may take for what it has begun. By default vLLM takes none, and lets its
# clients wait; so it may if this time is over before they have their answers.
LAST_WORDS = 120
OPTIONS = (
    *FEW_BLOCKS,
    *("--shutdown-timeout", str(LAST_WORDS), "--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)


@pytest.fixture(scope="session", autouse=True)
def separate_processes() -> Iterator[None]:
    """As they are served, whatever other tests asked for in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        yield


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with servers.drafting(tmp_path_factory.mktemp("drafting"), options=OPTIONS) as server:
        yield server


@pytest.fixture(scope="session")
def soaked(server: Server) -> Soaked:
    return soak(server, rate=4, seconds=20, run_in=8)


@pytest.fixture(scope="session")
def burst(soaked: Soaked, server: Server) -> tuple[list[Outcome], int]:
    """Requests all at once, and how many had to be stopped and started again.

    The long ones take nearly all blocks and the short ones, which begin with one each, the rest, so that some wait and
    none is free. Each then asks for another block at least, as none may end before: the first that does stops one,
    however fast they are.
    """
    pool = Pool(seed=1)
    begun = [pool.request(kind) for kind in 4 * ["long"] + 12 * ["short"]]
    asked = [
        Request(one.kind, {**one.body, "max_tokens": 150 + n, "extra_body": {"ignore_eos": True}}, stream=False)
        for n, one in enumerate(begun)
    ]
    before = servers.counters(server)["num_preemptions"]
    answers = asyncio.run(traffic.answer_all(server.url, asked, at_once=len(asked)))
    outcomes = [Outcome(one, 0.0, answers[one.key].answers, error=answers[one.key].error) for one in asked]
    return outcomes, int(servers.counters(server)["num_preemptions"] - before)


@pytest.fixture(scope="session")
def expected(
    soaked: Soaked, burst: tuple[list[Outcome], int], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """What stock vLLM says to each greedy request, by its key."""
    greedy = [one.request for one in soaked.traffic.outcomes + burst[0] if one.request.greedy]
    with servers.plain(tmp_path_factory.mktemp("plain")) as server:
        return asyncio.run(traffic.answer_all(server.url, greedy))
