"""The command line itself: what it says of errors, and what it loads before it knows what to do."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from vllm_orthrus.cli.main import COMMANDS, main
from vllm_orthrus.errors import UserError
from vllm_orthrus.heads import HeadError
from vllm_orthrus.training.config import ConfigError


@pytest.mark.parametrize("kind", [UserError, ConfigError, HeadError])
def test_what_a_user_can_act_on_is_said_in_one_line(
    kind: type[UserError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: argparse.Namespace) -> int:
        raise kind("size=9 must be at most 8. Give 8.")

    monkeypatch.setattr("vllm_orthrus.cli.doctor.run", run)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "vllm-orthrus doctor: size=9 must be at most 8. Give 8.\n"


def test_any_other_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: argparse.Namespace) -> int:
        raise ValueError("a fault of ours")

    monkeypatch.setattr("vllm_orthrus.cli.doctor.run", run)
    with pytest.raises(ValueError, match="a fault of ours"):
        main(["doctor"])


def test_help_loads_no_libraries() -> None:
    code = "import sys; from vllm_orthrus.cli.main import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert all(f" {command} " in done.stdout for command in COMMANDS)
    assert not {"torch", "transformers", "pydantic", "vllm"} & set(done.stdout.splitlines()[-1].split())
