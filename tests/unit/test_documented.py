"""Every command of the documentation is one, and somebody runs it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.sources import SOURCES
from tests.documented import EVIDENCE, GPU, ROOT, RUN_BY, TRAINED, Command, commands, run_by
from vllm_orthrus.cli.main import parser

ALL = list(commands())
OURS = [one for one in ALL if one.line.startswith("vllm-orthrus ") and " -" in one.line]


def test_every_command_is_run_by_somebody() -> None:
    assert [f"{one.page}: {one.line}" for one in ALL if run_by(one.line) is None] == []
    assert run_by("vllm-orthrus fly") is None and run_by("python -m tests.nothing") is None


def test_who_runs_a_command_is_there() -> None:
    rows = {begins: who for begins, who in RUN_BY if any(run_by(one.line) == who for one in ALL)}
    assert [begins for begins, _ in RUN_BY if begins not in rows] == [], "no page has these any more"
    for who in set(rows.values()) - {GPU, EVIDENCE, TRAINED}:
        file, _, test = who.partition("::")
        assert (ROOT / file).is_file(), who
        assert not test or f"def {test}(" in (ROOT / file).read_text(), who


def test_what_evidence_runs_is_in_its_list() -> None:
    made = " ".join(command for source in SOURCES.values() for command in source.commands)
    for one in ALL:
        if run_by(one.line) == EVIDENCE:
            program = " ".join(one.line.split()[: 3 if one.line.startswith("python") else 2])
            assert program in made, f"{one.page}: {one.line}"


@pytest.mark.parametrize("command", OURS, ids=lambda one: f"{one.page}:{one.line[:60]}")
def test_our_own_take_what_they_are_given(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        parser().parse_args(shlex.split(command.line)[1:])
    except SystemExit:
        pytest.fail(f"{command.page}: {command.line}\n{capsys.readouterr().err}")


def test_modules_and_targets_are_there() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for one in ALL:
        words = one.line.split()
        if words[0] == "make":
            assert words[1] in targets, f"{one.page}: {one.line}"
        elif words[:3] == ["python", "-m", "pytest"]:
            assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests/")), one.line
        elif words[:2] == ["python", "-m"]:
            module = (ROOT / words[2].replace(".", "/")).with_suffix(".py")
            assert module.is_file(), f"{one.page}: {one.line}"
            ours = one.line.partition(" -- ")[0].split()
            told = module.read_text()
            assert [word for word in ours if word.startswith("--") and f'"{word}"' not in told] == [], one.line
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), f"{one.page}: {one.line}"


def test_commands_are_found_where_pages_have_them() -> None:
    lines = {one.line for one in ALL if one.page == "docs/heads.md"}
    assert "vllm-orthrus head inspect HEAD" in lines, "without what it is, which is said beside it"
    assert any(Path(one.page).name == "cascades.md" and one.line.endswith("0.2}}'") for one in ALL), "over two lines"
