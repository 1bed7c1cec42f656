"""`vllm-orthrus doctor --cluster` on two nodes of Ray, one of which has another release of the plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest

from tests import other_release
from vllm_orthrus.demo.server import free_port

cluster_utils = pytest.importorskip("ray.cluster_utils")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    other = other_release.write(tmp_path_factory.mktemp("other"))
    started = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        path = os.pathsep.join([str(other), *filter(None, [os.environ.get("PYTHONPATH")])])
        started.add_node(num_cpus=1, env_vars={"PYTHONPATH": path})
        yield started.address
    finally:
        started.shutdown()


def test_a_node_with_another_version_is_named(cluster: str) -> None:
    program = [sys.executable, "-m", "vllm_orthrus.cli.main", "doctor", "--json", "--cluster", cluster]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    assert not found["ready"]
    nodes = found["found"][f"Nodes of the Ray cluster {cluster}"]
    assert sorted(node["verdict"] for node in nodes) == ["RED", "ok"]
    red = next(node for node in nodes if node["verdict"] == "RED")
    assert (
        f"vllm-orthrus {other_release.RELEASE}" in red["found"]
        and f"vllm-orthrus=={version('vllm-orthrus')}" in red["advice"]
    )
    others = [one for title, list in found["found"].items() if "cluster" not in title for one in list]
    assert not any(one["verdict"] == "RED" for one in others), "without the cluster all is well"


def test_no_cluster_is_said() -> None:
    program = [sys.executable, "-m", "vllm_orthrus.cli.main", "doctor", "--cluster", f"127.0.0.1:{free_port()}"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "no Ray cluster there" in done.stderr
