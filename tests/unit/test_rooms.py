"""The arrangement that docs/architecture.md describes."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "vllm_orthrus"
MAY_IMPORT = {
    "kernels": set[str](),
    "heads": set[str](),
    "policy": {"kernels"},
    "cascades": set[str](),
    "engine": {"heads", "kernels", "policy", "cascades"},
    "training": {"heads", "kernels", "policy"},
    "patches": {"engine", "kernels", "heads", "policy", "cascades"},
    "demo": {"heads", "training"},
    "bench": {"demo", "training", "engine", "policy", "cascades"},
}
# Words that belong to a room of no one: a version, an error.
SHARED = {"vllm_orthrus", "errors"}


def imported(source: str) -> set[str]:
    """Rooms of ours that this module imports from, wherever in it."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "vllm_orthrus":
            modules |= {f"vllm_orthrus.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in modules if name.startswith("vllm_orthrus.")}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_no_import_leads_back(room: str) -> None:
    files = list((PACKAGE / room).rglob("*.py"))
    assert files
    for file in files:
        wrong = imported(file.read_text()) - MAY_IMPORT[room] - {room} - SHARED
        assert not wrong, f"{file.relative_to(ROOT)} imports from {wrong}"


def test_arrows_are_seen() -> None:
    source = "def f():\n    from vllm_orthrus.patches.registry import Patch\n    from vllm_orthrus import cli\n"
    assert imported(source) == {"patches", "cli"}


def test_the_page_links_to_what_is_there() -> None:
    """Each answer of "Who decides" names a function that stands in the file it links to."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    links = re.findall(r"\[`(?:(\w+)\.)?(\w+)`\]\(\.\./([\w/]+\.py)\)", page)
    assert len(links) >= 7
    for owner, name, file in links:
        text = (ROOT / file).read_text()
        assert re.search(rf"^\s*(def|class) {name}\b", text, re.MULTILINE), (name, file)
        assert not owner or f"class {owner}" in text, (owner, file)
    for picture in re.findall(r"\]\((pictures/\S+)\)", page):
        svg = (ROOT / "docs" / picture).read_text()
        for file in re.findall(r"\b(?:engine|kernels)/[\w/]+\.py", svg):
            assert (ROOT / file).exists() or (PACKAGE / file).exists(), (picture, file)


def test_the_guide_names_every_room() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    rooms = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("__init__.py")} - {PACKAGE.relative_to(ROOT)}
    inner = {Path("vllm_orthrus/patches/native")}  # of one room alone
    assert [str(room) for room in sorted(rooms - inner) if f"`{room}/`" not in guide] == []
    for link in re.findall(r"\]\(([\w./-]+)[)#]", guide):
        assert (ROOT / link).exists(), link
