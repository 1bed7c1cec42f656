"""Every query of the dashboard and of the alerts, asked of a server that works."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from scripts import dashboard, dashboard_picture
from tests.serve import traffic
from tests.serve.soak import Soaked
from tests.serve.traffic import Pool
from vllm_orthrus.demo.server import Server, free_port
from vllm_orthrus.patches.metrics import MODE_METRICS

ALERTS = dashboard.DASHBOARD.with_name("alerts.yml")
# Of a Debian package of this name, for example. Not part of this project's environment.
PROMETHEUS = os.environ.get("ORTHRUS_TEST_PROMETHEUS") or shutil.which("prometheus")

# Where modes are chosen, which this server does not: tests/engine/test_modes.py has one that does.
OF_MODES = {f"{metric.name}_total" for metric in MODE_METRICS.values()}


def alerts() -> list[str]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def shown() -> list[str]:
    panels = json.loads(dashboard.DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def test_the_file_is_current() -> None:
    assert dashboard.DASHBOARD.read_text() == dashboard.text(), "python scripts/dashboard.py"


def test_all_that_is_asked_for_is_counted(server: Server, soaked: Soaked) -> None:
    names = {sample.name for sample in server.metrics("vllm:")}
    asked = {name for query in shown() + alerts() for name in re.findall(r"vllm:\w+", query)}
    assert len(asked) >= 20 and OF_MODES <= asked <= names | OF_MODES


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address, with half a minute of traffic in it."""
    assert PROMETHEUS is not None
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    scraped = [{"job_name": "vllm", "static_configs": [{"targets": [server.url.removeprefix("http://")]}]}]
    config = {"global": {"scrape_interval": "2s"}, "rule_files": [str(ALERTS)], "scrape_configs": scraped}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [PROMETHEUS, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=log, stdout=log)
        try:
            asyncio.run(traffic.send(server.url, Pool(seed=2).requests(), rate=3, seconds=20, seed=2))
            time.sleep(4)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


@pytest.mark.skipif(PROMETHEUS is None, reason="no prometheus on PATH or in ORTHRUS_TEST_PROMETHEUS")
def test_every_panel_has_data(prometheus: str) -> None:
    for query in shown():
        if any(name in query for name in OF_MODES):
            continue
        asked = dashboard_picture.filled(query)
        found = [float(one["value"][1]) for one in dashboard_picture.ask(prometheus, "query", query=asked)["result"]]
        assert found and all(value == value for value in found), f"nothing, or no number, for {query}"


def test_every_panel_is_drawn(tmp_path: Path) -> None:
    def curves(count: int) -> list[dashboard_picture.Line]:
        return [dashboard_picture.Line(f"curve {place}", [0, 5], [0.5, 1.0]) for place in range(count)]

    lines = {
        panel.title: curves(len(panel.curves) * (place > 0))
        for row in dashboard.ROWS
        for place, panel in enumerate(row.panels)
    }
    out = tmp_path / "dashboard.svg"
    dashboard_picture.draw(dashboard.ROWS, lines, "two points", out)
    drawn = out.read_text()
    assert all(f"<!-- {panel.title} -->" in drawn for row in dashboard.ROWS for panel in row.panels)
    assert drawn.count("<!-- no data -->") == len(dashboard.ROWS)


@pytest.mark.skipif(PROMETHEUS is None, reason="no prometheus on PATH or in ORTHRUS_TEST_PROMETHEUS")
def test_alerts_are_rules(prometheus: str) -> None:
    rules = [rule for group in dashboard_picture.ask(prometheus, "rules")["groups"] for rule in group["rules"]]
    assert len(rules) == len(alerts()) and all(rule["health"] != "err" for rule in rules)
    assert not any(rule["state"] == "firing" for rule in rules), "a server that works"
