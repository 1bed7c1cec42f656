"""The check kit must be right the first time it meets a GPU, so it is run here on a processor that poses as one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import cases, gpu_check
from vllm_orthrus.kernels.dual_view_attention import launch

SMALL = gpu_check.Model("small", 4, 2, 64)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    def once(launches: list[Callable[[], Any]], budget: float = 0.0) -> float:
        launches[-1]()
        return 1e-5

    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_check, "HALF", torch.float32)
    monkeypatch.setattr(gpu_check, "seconds_per_launch", once)
    monkeypatch.setattr(gpu_check, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(gpu_check, "environment", lambda: {"gpu": "none", "torch": "-", "triton": "-"})
    monkeypatch.setattr(gpu_check, "correctness_cases", lambda: [cases.Case((20, -1), width=3)])
    monkeypatch.setattr(gpu_check, "sweep", lambda: [(SMALL, 40, 2, 5)])
    monkeypatch.setattr(gpu_check, "BASELINES", ("flash", "sdpa"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=2**16))
    out = tmp_path / "evidence.json"
    monkeypatch.setattr("sys.argv", ["gpu_check", "--out", str(out)])
    return out


def test_everything_right(pretended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main() == 0
    evidence = json.loads(pretended.read_text())
    assert evidence["finished"]
    assert [entry["problems"] for entry in evidence["correctness"]] == [[]]
    (entry,) = evidence["speed"]
    assert set(entry["seconds"]) == {"ours", "sdpa"}
    assert list(evidence["not_compared"]) == ["flash"]  # there is none here, and the evidence says so
    assert "microseconds" in capsys.readouterr().out


def test_no_speed_when_the_result_is_wrong(
    pretended: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any) -> torch.Tensor:
        out = launch(*args)
        return out.mul_(1.01)

    monkeypatch.setattr(gpu_check, "check", lambda case, device: cases.check(case, device, wrong))
    assert gpu_check.main() == 1
    assert "microseconds" not in capsys.readouterr().out
    assert json.loads(pretended.read_text())["speed"] == []


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    assert gpu_check.main() == 2
    assert "found none" in capsys.readouterr().out


def test_all_compute_the_same(pretended: Path) -> None:
    """Ours and the baseline on gathered keys and values; the gathered ones must end with the block's own."""
    setting = gpu_check.Setting(SMALL, 40, 2, 5)
    assert setting.copies > 1
    for which in range(setting.copies):
        setting.ours()[which]()
        _, pairs = setting.gathered()
        keys, values = pairs[which]
        keys[:, :, 40:] = setting.k.view(2, 5, 2, 64).transpose(1, 2)
        values[:, :, 40:] = setting.v.view(2, 5, 2, 64).transpose(1, 2)
        queries = setting.q.view(2, 5, 4, 64).transpose(1, 2)
        wanted = torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, scale=setting.scale, enable_gqa=True
        )
        torch.testing.assert_close(setting.out.view(2, 5, 4, 64).transpose(1, 2), wanted, atol=1e-5, rtol=1e-4)


def test_every_point_of_the_sweep_is_wanted_once() -> None:
    points = gpu_check.sweep()
    assert len(points) == len(set(points)) == 2 * 6 * 3 * 3
    assert points[0] == (gpu_check.MODELS[1], 512, 1, 16)
