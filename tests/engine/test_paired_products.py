"""What times one product for both views must be right the first time it meets a GPU: here a processor poses as one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import paired_products
from vllm_orthrus.engine.onepass import pairs
from vllm_orthrus.policy.cost import Model

SMALL = Model(2, 32, 64, 4, 2, 8, 100)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    def once(launches: list[Callable[[], Any]], budget: float = 0.0) -> float:
        for launch in launches:
            launch()
        return 1e-5

    monkeypatch.setattr(paired_products, "DEVICE", "cpu")
    monkeypatch.setattr(paired_products, "HALF", torch.float32)
    monkeypatch.setattr(paired_products, "MODEL", SMALL)
    monkeypatch.setattr(paired_products, "seconds_per_launch", once)
    monkeypatch.setattr(paired_products, "environment", lambda: {"gpu": "NVIDIA H200"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    out = tmp_path / "evidence.json"
    monkeypatch.setattr("sys.argv", ["paired_products", "--out", str(out)])
    return out


def test_times_beside_those_of_the_cost_model(pretended: Path) -> None:
    assert paired_products.main() == 0
    sizes = json.loads(pretended.read_text())["sizes"]
    assert [(one["verified"], one["drafted"]) for one in sizes][:2] == [(16, 64), (32, 128)]
    for one in sizes:
        assert one["difference"] < 1e-5
        assert one["apart"] == one["paired"] == 1e-5
        assert one["apart_foretold"] > one["paired_foretold"] > 0, "launches are all that so small a model has"


def test_no_time_when_the_result_is_wrong(
    pretended: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = pairs.Room.results
    monkeypatch.setattr(pairs.Room, "results", lambda room, weights: results(room, weights.flip(0)))
    assert paired_products.main() == 1
    assert "RED" in capsys.readouterr().out
    (one,) = json.loads(pretended.read_text())["sizes"]
    assert "apart" not in one


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["paired_products"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert paired_products.main() == 2
