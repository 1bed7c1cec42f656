"""docs/vllm-surface.md lists what we touch of vLLM: all of it, nothing else, for every release that is supported."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from packaging.specifiers import SpecifierSet

from scripts.compare_vllm import ROW, SURFACE, compare
from vllm_orthrus.patches import PATCHES, SUPPORTED_VLLM, WORKER_PATCHES

PACKAGE = SURFACE.parents[1] / "vllm_orthrus"


def rows(title: str) -> list[str]:
    """The names in the table under this heading."""
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", SURFACE.read_text(), re.MULTILINE | re.DOTALL)
    return ROW.findall(section)


def imports() -> Iterator[tuple[str, str]]:
    """Module and name of everything that the package imports from vLLM."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "vllm":
                yield from ((str(node.module), alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                names = [alias.name.rpartition(".") for alias in node.names]
                yield from ((module, name) for module, _, name in names if module.split(".")[0] == "vllm")


def covers(row: str, module: str, name: str) -> bool:
    """An imported module is covered by what is used of it."""
    return row == f"{module}:{name}" or row.startswith((f"{module}.{name}:", f"{module}.{name}."))


def test_every_patch_is_listed_and_nothing_else() -> None:
    assert set(rows("What we patch")) == {patch.target for patch in (*PATCHES, *WORKER_PATCHES)}


def test_every_import_is_listed_and_nothing_else() -> None:
    listed, imported = rows("What we import"), set(imports())
    missing = [f"{module}:{name}" for module, name in imported if not any(covers(row, module, name) for row in listed)]
    assert not missing, f"{SURFACE.name} lacks {sorted(missing)}"
    stale = [row for row in listed if not any(covers(row, *one) for one in imported)]
    assert not stale, f"nothing imports {stale} any more"


def test_every_name_that_the_engine_builds_on_is_listed() -> None:
    text = (PACKAGE / "engine" / "vllm.py").read_text()
    (names,) = re.findall(r"^__all__ = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)
    assert set(ast.literal_eval(names)) <= {row.partition(":")[2] for row in rows("What we import")}


def test_what_is_used_of_each_name_is_used() -> None:
    """Plain words in code marks, in the column that says what for."""
    cells = re.findall(r"^\| `[^`]+` \| ([^|]+) \| first \|", SURFACE.read_text(), re.MULTILINE)
    assert len(cells) > 50
    used = set(re.findall(r"\w+", " ".join(path.read_text() for path in PACKAGE.rglob("*.py"))))
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} <= used


def test_every_name_has_a_mark_for_every_supported_release() -> None:
    supported = [f"0.{minor}" for minor in range(100) if SpecifierSet(SUPPORTED_VLLM).contains(f"0.{minor}")]
    tables = re.findall(r"^\| name (.*?)\n\n", SURFACE.read_text() + "\n", re.MULTILINE | re.DOTALL)
    assert len(tables) == 5
    for table in tables:
        heading, _, *lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
        assert heading[-len(supported) :] == supported
        for name, *cells in lines:
            assert len(cells) == len(heading), name
            for mark in cells[-len(supported) :]:
                assert re.fullmatch(r"first|unchanged(: .+)?|(behavioural|breaking): .+", mark), f"{name}: {mark!r}"


def test_what_changed_between_two_versions_is_told(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        (folder / "vllm" / "v1").mkdir(parents=True)
    (old / "vllm" / "__init__.py").write_text("from vllm.v1 import Thing\n")
    (old / "vllm" / "v1" / "__init__.py").write_text(
        'class Thing:\n    """Old."""\n    lost = 0\n    def kept(self): return 1\n    def turned(self): return 1\n'
    )
    (new / "vllm" / "__init__.py").write_text("try:\n    from .v1.things import Thing\nexcept ImportError:\n    pass\n")
    (new / "vllm" / "v1" / "things.py").write_text(
        'class Thing:\n    """New."""\n    def kept(self):\n        return 1  # still\n    def turned(self): return 2\n'
    )
    assert compare(old, new, "vllm:Thing.kept") == "vllm:Thing.kept: same, moved to vllm.v1.things"
    turned = compare(old, new, "vllm:Thing.turned")
    assert "-    return 1" in turned and "+    return 2" in turned
    assert compare(old, new, "vllm:Thing.lost") == f"vllm:Thing.lost: not defined in {new}"
    assert compare(old, new, "vllm.nowhere:Thing") == f"vllm.nowhere:Thing: not defined in {old} nor in {new}"
