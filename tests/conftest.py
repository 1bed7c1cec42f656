"""Which features a run has evidence for, and which tests are for long runs only."""

import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from vllm_orthrus.bench.environment import environment
from vllm_orthrus.bench.files import write_json

THOROUGH = bool(os.environ.get("ORTHRUS_TEST_THOROUGH"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--features", type=Path, help="a folder for what was found of each feature")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--features"):
        config.pluginmanager.register(Findings(config.getoption("--features")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if THOROUGH or config.getoption("--features"):
        return
    long = [item for item in items if item.get_closest_marker("thorough")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


class Findings:
    """Of each marked test: whether it passed, how long it took, and what was said where something was refused."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found = folder, dict[str, dict[str, Any]]()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        report = yield
        for marker in item.iter_markers("feature"):
            feature, verdict = marker.args[0], (*marker.args[1:], "works")[0]
            row = self.found.setdefault(feature, {"verdict": verdict, "said": None, "thorough": True, "tests": {}})
            assert row["verdict"] == verdict, f"the tests of {feature!r} say different things of it"
            row["thorough"] &= item.get_closest_marker("thorough") is not None
            row["said"] = dict(item.user_properties).get("refusal", row["said"])
            test = row["tests"].setdefault(item.nodeid, {"outcome": "passed", "seconds": 0.0})
            test["seconds"] = round(test["seconds"] + report.duration, 2)
            if not report.passed:
                test["outcome"] = report.outcome
        return report

    def pytest_sessionfinish(self) -> None:
        release = metadata.version("vllm").partition("+")[0]
        file = self.folder / f"compatibility-{release}.json"
        rows = json.loads(file.read_text())["features"] if file.exists() else {}  # of runs of other tests
        for name, row in self.found.items():
            before = rows.get(name, {"thorough": True, "said": None, "tests": {}})
            told = {"said": row["said"] or before["said"], "thorough": row["thorough"] and before["thorough"]}
            rows[name] = row | told | {"tests": before["tests"] | row["tests"]}
        write_json(file, {"environment": environment(), "features": rows})
