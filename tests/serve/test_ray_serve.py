"""examples/ray_serve by its README: from nothing to two replicas, and one of them killed while they have much to do."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.serve import servers, traffic
from tests.serve.readmes import ROOT, changed, commands
from tests.serve.servers import until
from tests.serve.traffic import Outcome, Pool, Request
from vllm_orthrus.demo.server import Server, ServerError, free_port
from vllm_orthrus.patches.versions import vllm_is

README = ROOT / "examples" / "ray_serve" / "README.md"
FOLLOWS = 60.0  # seconds until Ray Serve has found out and made up for it

pytestmark = [
    pytest.mark.slow,
    pytest.mark.thorough,
    pytest.mark.skipif(vllm_is(">=0.33"), reason="Ray 2.60 looks for vLLM's servers where 0.33 has none"),
]
ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve", reason="of Ray only a part is installed: pip install 'vllm-orthrus[ray]'")


class Replica(NamedTuple):
    name: str
    process: int
    under_way: int  # requests


class App(Server):
    """`serve run`: a cluster of Ray's with one node, and the application on it."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        starts, *self.others = [changed(one, {"8000": str(self.port)}) for one in commands(README)]  # the port apart
        file = folder / "app.yaml"
        file.write_text((ROOT / starts[-1]).read_text().replace("8000", str(self.port)))
        # A cluster of its own, whatever else runs here. Without a token: this process asks it, which has settled by now
        # that it has none. Nor are its workers to be behind all other work, which is where Ray puts them.
        variables = {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
        variables["RAY_USAGE_STATS_ENABLED"] = "0"
        super().__init__([*starts[:-1], str(file)], self.port, folder / "app.log", servers.PATIENCE, variables)

    def _wait(self) -> None:
        """Until somebody answers; replicas may still be on their way."""
        end = time.monotonic() + self.patience
        while time.monotonic() < end and "DEPLOY_FAILED" not in self.log.read_text(errors="replace"):
            if self.process.poll() is not None:
                raise ServerError(f"serve run ended with status {self.process.returncode}:\n{self._said()}")
            try:
                with urllib.request.urlopen(f"{self.url}/v1/models", timeout=2):
                    return
            except OSError:
                time.sleep(0.5)
        raise ServerError(f"serve run was not ready after {self.patience:.0f} s:\n{self._said()}")

    def stop(self) -> None:
        """And whatever it has left behind, which the test asks before."""
        left = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        super().stop()
        for one in left:
            if one.is_running():
                one.kill()

    @property
    def address(self) -> str:
        """Of its cluster."""
        words = [word for one in servers.processes(self) for word in one.cmdline()]
        return next(word.partition("=")[2] for word in words if word.startswith("--gcs-address="))


class Cluster:
    """What can be seen of it by whoever is connected."""

    def __init__(self, app: App) -> None:
        self.app = app

    def __enter__(self) -> Cluster:
        context = ray.init(self.app.address, namespace="serve", log_to_driver=False, logging_level="ERROR")
        self.dashboard = context.dashboard_url
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()

    def replicas(self) -> list[Replica]:
        """Of the model, by what they say themselves."""
        found = []
        for name in ray.util.list_named_actors():
            if name.startswith("SERVE_REPLICA::llm#LLMServer"):
                actor = ray.get_actor(name)
                asked = [actor.__ray_call__.remote(lambda _: os.getpid()), actor.get_num_ongoing_requests.remote()]
                found.append(Replica(name, *ray.get(asked, timeout=FOLLOWS)))
        return found

    def running(self) -> int:
        """Replicas of the model that Ray Serve takes for sound."""
        deployments = serve.status().applications["llm"].deployments
        return next(one.replica_states.get("RUNNING", 0) for name, one in deployments.items() if "LLMServer" in name)

    def counted(self, name: str) -> float:
        """By all replicas, as Ray tells a Prometheus."""
        [node] = ray.nodes()
        with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10) as told:
            families = text_string_to_metric_families(told.read().decode())
        samples = [sample for family in families for sample in family.samples]
        return sum(sample.value for sample in samples if sample.name.removesuffix("_total") == name)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    with App(tmp_path_factory.mktemp("ray-serve")) as app:
        yield app


@pytest.fixture(scope="module")
def cluster(app: App) -> Iterator[Cluster]:
    with Cluster(app) as cluster:
        assert until(cluster.running, lambda running: running == 2, servers.PATIENCE) == 2
        yield cluster


def test_the_readme(app: App, cluster: Cluster) -> None:
    variables = os.environ | {"RAY_AUTH_TOKEN": 64 * "0", "RAY_DASHBOARD_ADDRESS": f"http://{cluster.dashboard}"}
    status, chat = [
        subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True).stdout
        for command in app.others
    ]
    deployments = yaml.safe_load(status)["applications"]["llm"]["deployments"]
    assert deployments["LLMServer:tiny"] | {"message": ""} == {
        "status": "HEALTHY",
        "status_trigger": "CONFIG_UPDATE_COMPLETED",
        "replica_states": {"RUNNING": 2},
        "message": "",
    }
    assert [line.split(": ")[0] for line in chat.splitlines()][:1] == ["stream"] and "turns: " in chat
    drafted = until(lambda: cluster.counted("ray_vllm_spec_decode_num_accepted_tokens"), bool, patience=30)
    assert drafted, "no draft was kept"


class Load:
    """Clients that ask one thing after another, as long as they are let."""

    def __init__(self, app: App, clients: int = 10) -> None:
        self.app, self.clients = app, clients
        self.outcomes: list[Outcome] = []
        self.open = asyncio.Event()
        self.over = False
        pool = Pool(seed=3)
        bodies = [{**pool.request("short").body, "max_tokens": 100} for _ in range(40)]
        self.requests = [Request("short", body, stream=bool(n % 2)) for n, body in enumerate(bodies)]

    async def __aenter__(self) -> Load:
        self.open.set()
        self.to = traffic.client(self.app.url)
        self.tasks = [asyncio.create_task(self._ask(number)) for number in range(self.clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.over = True
        self.open.set()
        await asyncio.gather(*self.tasks)
        await self.to.close()

    async def _ask(self, first: int) -> None:
        for number in count(first, self.clients):
            await self.open.wait()
            if self.over:
                return
            self.outcomes.append(await traffic.ask(self.to, self.requests[number % len(self.requests)]))

    async def answers(self, more: int) -> None:
        """Wait for so many."""
        there = len(self.outcomes) + more
        async with asyncio.timeout(servers.PATIENCE):
            while len(self.outcomes) < there:
                await asyncio.sleep(0.05)


class Killed(NamedTuple):
    outcomes: list[Outcome]
    at: float
    victim: Replica
    left: list[Replica]  # some time after


async def kill_one(app: App, cluster: Cluster) -> Killed:
    async with Load(app) as load:
        await load.answers(30)
        # Nothing new comes while it is counted what the victim has; only what it has got can be lost with it.
        load.open.clear()
        victim = max(await asyncio.to_thread(cluster.replicas), key=lambda replica: replica.under_way)
        os.kill(victim.process, signal.SIGKILL)
        at = time.monotonic()
        load.open.set()
        await load.answers(30)
        load.open.clear()  # whose work would be in the way of a replica that starts
        two = await asyncio.to_thread(until, cluster.running, lambda running: running == 2, servers.PATIENCE)
        assert two == 2, "Ray Serve has not made up for it"
        load.open.set()
        await load.answers(30)
    return Killed(load.outcomes, at, victim, cluster.replicas())


@pytest.fixture(scope="module")
def killed(app: App, cluster: Cluster) -> Killed:
    return asyncio.run(kill_one(app, cluster))


def test_only_what_the_replica_had_is_lost(killed: Killed) -> None:
    lost = [outcome for outcome in killed.outcomes if not outcome.whole]
    assert 1 <= len(lost) <= killed.victim.under_way, [outcome.error for outcome in lost]
    assert all(outcome.begun < killed.at < outcome.begun + outcome.seconds for outcome in lost)
    assert killed.victim.name not in {replica.name for replica in killed.left} and len(killed.left) == 2


def test_texts_are_a_plain_engines(killed: Killed, tmp_path: Path) -> None:
    whole = [outcome for outcome in killed.outcomes if outcome.whole]
    with servers.plain(tmp_path) as server:
        expected = asyncio.run(traffic.answer_all(server.url, [outcome.request for outcome in whole]))
    others = [traffic.difference(outcome, expected[outcome.request.key]) for outcome in whole]
    assert not any(others), next(filter(None, others))


def test_its_engine_goes_with_it(app: App, killed: Killed) -> None:
    """An engine is a process of its own, and would hold a GPU that the new replica needs."""
    left = [word for one in servers.processes(app) for word in one.cmdline() if "VLLM::EngineCore" in word]
    assert len(left) == 2


def test_what_is_called_wrong() -> None:
    from examples.ray_serve.app import Arguments, config  # it brings vLLM

    with pytest.raises(ValueError, match="replica"):
        Arguments(model="some", replica=2)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="Unknown engine argument: max_model_length"):
        config(Arguments(engine={"max_model_length": 5})).get_engine_config()
