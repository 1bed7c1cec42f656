"""A short soak, and a server that is hit while it serves. `make soak` takes as long as one likes."""

from __future__ import annotations

import socket
import subprocess
from collections import Counter

import pytest

from tests.serve import faults, servers, soak, traffic
from tests.serve.conftest import LAST_WORDS
from tests.serve.soak import Soaked
from tests.serve.traffic import Outcome
from vllm_orthrus.demo.server import Server, serve_command

pytestmark = pytest.mark.slow


def test_traffic_is_mixed(soaked: Soaked) -> None:
    outcomes = soaked.traffic.outcomes
    assert {one.request.kind for one in outcomes} == set(traffic.RATES)
    for how in ([one.request.stream for one in outcomes], [one.left for one in outcomes]):
        assert 0 < sum(how) < len(how)
    assert max(one.counted["num_requests_running"] for one in soaked.samples) > 1
    assert len({one.request.key for one in outcomes}) < len(outcomes), "nothing was asked twice"


def test_every_greedy_answer_is_stock_vllms(soaked: Soaked, expected: dict[str, Outcome]) -> None:
    greedy = [one for one in soaked.traffic.outcomes if one.request.greedy]
    assert [found for one in greedy if (found := traffic.difference(one, expected[one.request.key]))] == []
    whole = Counter(one.request.kind for one in greedy if one.whole)
    assert whole["short"] and whole["json"] and whole["long"], "hardly anything was compared"


def test_nothing_fails_and_nothing_is_kept(soaked: Soaked) -> None:
    assert soak.wrong(soaked) == []
    assert soaked.new["orthrus_verifications"] > 100, "our counters were not there to be compared"


def test_answers_are_right_when_the_cache_is_nearly_empty(
    burst: tuple[list[Outcome], int], expected: dict[str, Outcome]
) -> None:
    outcomes, preempted = burst
    assert preempted > 0, "there was room for all"
    assert [found for one in outcomes if (found := traffic.difference(one, expected[one.request.key]))] == []


def test_a_terminated_server_answers_what_it_has_begun(server: Server) -> None:
    """The last test of this server."""
    found = faults.strike(server, faults.terminate, count=6, tokens=300, patience=LAST_WORDS)
    assert (found.answered, found.told, found.hanging) == (6, [], 0)
    assert found.status == 0 and not found.left_behind


def test_a_port_that_is_taken() -> None:
    """Said before anything is loaded."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        speculative = {"method": "orthrus", "model": str(servers.TINY / "head")}
        options = [*servers.OPTIONS, "--host", "127.0.0.1"]
        command = serve_command(servers.TINY / "base", taken.getsockname()[1], speculative, options)
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "Address already in use" in done.stderr
    assert "EngineCore" not in done.stdout + done.stderr
