"""Evidence has its command and says where it comes from; pages tell its figures, the picture included."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import figures, renew
from benchmarks.evidence import FOLDER, ROOT
from benchmarks.sources import OUT, SOURCES, Source
from vllm_orthrus.cli.main import parser
from vllm_orthrus.errors import UserError

ENVIRONMENT = ("cpu", "gpu", "cores", "torch", "python", "packages", "variables", "sources", "commit", "date", "load")
# Found by formula and the reference model before such files named a machine. Whoever renews one takes it out here.
AFTERWARDS: tuple[str, ...] = ()
GPU_FILES = re.compile(r"(gpu_check|engine_check)-")  # of `make gpu-check` and `make engine-check`, named by the GPU
FILES = sorted(path.name for path in FOLDER.glob("*.json"))


def test_every_file_has_its_command() -> None:
    assert [file for file in FILES if not GPU_FILES.match(file)] == sorted(SOURCES)
    for file, source in SOURCES.items():
        assert source.minutes > 0 and source.commands
        assert OUT in source.commands[-1] or source.commands[-1].startswith("make "), file


@pytest.mark.parametrize("file", FILES)
def test_every_file_says_where_it_comes_from(file: str) -> None:
    facts = json.loads((FOLDER / file).read_text())["environment"]
    assert ("put_down" in facts) == (file in AFTERWARDS)
    if file in AFTERWARDS:
        assert len(facts["commit"]) == 40 and facts["date"] and facts["asked"]
        return
    assert [name for name in ENVIRONMENT if name not in facts] == []
    assert facts["cores"] > 0 and len(facts["sources"]) == 16


@pytest.mark.parametrize(("file", "source"), SOURCES.items(), ids=list(SOURCES))
def test_commands_are_commands(file: str, source: Source) -> None:
    """Modules are there, and our own command line takes what it is given."""
    for line in renew.shown(file, source):
        command = line.partition("|| ")[2] or line
        words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
        if words[0] == "vllm-orthrus":
            parser().parse_args(words[1:])
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        else:
            assert words[:2] == ["python", "-m"]
            module = (ROOT / words[2].replace(".", "/")).with_suffix(".py").read_text()
            assert [word for word in words if word.startswith("--") and f'"{word}"' not in module] == []


def test_pages_tell_what_is_in_the_files() -> None:
    stale = [path.name for path, text in figures.wanted().items() if path.read_text() != text]
    assert not stale and not figures.unsaid(), "python -m benchmarks.figures"


def test_blocks_are_all_in_a_page() -> None:
    names = [found[2] for path in figures.pages() for found in figures.BLOCK.finditer(path.read_text())]
    assert sorted(names) == sorted(figures.BLOCKS)


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(FOLDER, tmp_path / "evidence")
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "evidence")
    monkeypatch.setattr(renew, "FOLDER", tmp_path / "evidence")
    monkeypatch.setattr(renew, "UNFINISHED", tmp_path / "unfinished")
    monkeypatch.setattr(renew, "PICTURES", tmp_path)
    return tmp_path / "evidence"


def changed(path: Path, change: Any) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def test_planted_fault_another_figure_is_noticed(copied: Path) -> None:
    def faster(found: dict[str, Any]) -> None:
        found["summary"]["8"]["auto"]["all"]["times_plain"] = 1.26

    changed(copied / figures.MODES, faster)
    stale = {path.name for path, text in figures.wanted().items() if path.read_text() != text}
    assert {"benchmarks.md", "speedup.svg"} <= stale
    assert any("1.26 at eight" in line for line in figures.unsaid())


# Making it anew


def test_what_is_made_takes_the_old_ones_place(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = "import sys; from pathlib import Path; Path(sys.argv[1]).write_text('new'); sys.exit(int(sys.argv[2]))"
    for status in (0, 1):  # 1: RED is a finding, too
        command = f"{shlex.quote(sys.executable)} -c {shlex.quote(write)} {OUT} {status}"
        monkeypatch.setattr(renew, "SOURCES", {"made.json": Source("", (command,), 1)})
        assert renew.renew(["made.json"]) == status
        assert (copied / "made.json").read_text() == "new"
        (copied / "made.json").write_text("old")


def test_what_fails_leaves_the_old_one(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied / "made.json").write_text("old")
    monkeypatch.setattr(renew, "SOURCES", {"made.json": Source("", (f"true {OUT}",), 1)})
    assert renew.renew(["made.json"]) == 1, "nothing was written"
    assert (copied / "made.json").read_text() == "old"


def test_seconds_of_another_machine_are_left_alone(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(copied / figures.MODES, lambda found: found["environment"].update(cpu="another CPU"))
    before = (copied / figures.MODES).read_bytes()
    assert renew.renew([figures.MODES]) == 0
    assert "another CPU" in capsys.readouterr().out
    assert (copied / figures.MODES).read_bytes() == before


def test_an_unknown_file_is_named() -> None:
    with pytest.raises(UserError, match=r"nothing\.json: must be `all`"):
        renew.chosen(["nothing.json"])
    assert renew.chosen(["all"]) == list(SOURCES)


def test_commands_run_in_this_environment() -> None:
    """Behind what may stand in front of them as well."""
    line = renew.executable(f"test -d there || vllm-orthrus widen --like x {OUT}", Path("a b"))
    assert line == f"test -d there || {sys.executable} -m vllm_orthrus.cli.main widen --like x 'a b'"
    assert renew.executable("python -m benchmarks.traces", Path("x")) == f"{sys.executable} -m benchmarks.traces"
