"""`vllm-orthrus doctor` where everything is in place, and where the head is not."""

import pytest

from tests.engine.trained import TINY
from vllm_orthrus.cli.main import main

ASKED = ["doctor", str(TINY / "base"), "--explain", "--head"]


def test_ready(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, str(TINY / "head")]) == 0
    told = capsys.readouterr().out
    assert told.endswith("Ready to serve.\n") and "  RED " not in told
    assert all(section in told for section in ("Versions", "Plugin", "Patches", f"Head for {TINY / 'base'}"))
    assert "goes when" in told.lower(), "--explain says of each patch when it can go"


def test_not_ready(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, str(TINY / "base")]) == 1
    assert capsys.readouterr().out.endswith("Something above is red.\n")
