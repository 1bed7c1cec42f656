"""The site of the documentation: every page and link is there, and what comes from the code is as the code has it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.reference_pages import settings_page
from scripts.site_pages import LINK, PAGES, ROOT, for_site


def written() -> Iterator[Path]:
    """Whatever is Markdown and ours."""
    yield from ROOT.glob("*.md")
    for folder in ("docs", "examples", "benchmarks"):
        yield from (ROOT / folder).rglob("*.md")


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """A page that nothing leads to, a link or an anchor that leads nowhere: each is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    for name in [*(page.name for page in (ROOT / "docs").glob("*.md")), *PAGES.values()]:
        stem = name.removesuffix(".md")
        assert (tmp_path / ("index.html" if stem == "index" else f"{stem}/index.html")).exists()


def test_settings_are_as_the_code_has_them() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == settings_page(), "make reference"


def anchors(text: str) -> set[str]:
    """Of its headings, as GitHub and the site name them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```[\s\S]*?```|^ {4}.*$", "", text, flags=re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", sorted(str(path.relative_to(ROOT)) for path in written()))
def test_links_lead_somewhere_in_a_checkout(page: str) -> None:
    for _, _, target in LINK.findall((ROOT / page).read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        to = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert to.exists() and to.is_relative_to(ROOT), f"{page} links to {target}"
        assert not anchor or to.suffix != ".md" or anchor in anchors(to.read_text()), f"{page} links to {target}"


def test_words_are_spelt_as_they_are() -> None:
    """By codespell, whose settings are in pyproject.toml: common misspellings, in whatever people read."""
    files = [str(path.relative_to(ROOT)) for path in written()]
    command = [
        sys.executable,
        "-m",
        "codespell_lib",
        *files,
        "vllm_orthrus",
        "kernels",
        "benchmarks",
        "scripts",
        "tests",
    ]
    spelt = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert spelt.returncode == 0, spelt.stdout + spelt.stderr


def test_planted_fault_a_misspelling_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("It is " + "seper" + "ately drafted.\n")
    command = [sys.executable, "-m", "codespell_lib", "page.md"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode > 0


def test_links_lead_to_the_sites_own_pages() -> None:
    assert for_site("[a](docs/one-pass.md#metrics)", "index.md") == "[a](one-pass.md#metrics)"
    assert for_site("[a](../README.md#what-to-know)", "one-pass.md") == "[a](index.md#what-to-know)"
    assert for_site("![a](docs/pictures/soak.png)", "index.md") == "![a](pictures/soak.png)"
    assert for_site("[config](../vllm_orthrus/engine/config.py)", "architecture.md") == "config"
    assert for_site("[out](https://arxiv.org/abs/2605.12825)", "index.md").endswith("2605.12825)")
    assert for_site("[one-pass.md](one-pass.md)", "memory.md") == "[One pass instead of two](one-pass.md)"
    with pytest.raises(ValueError, match=r"one-pass.md links to ../nowhere.md, and there is no nowhere.md"):
        for_site("[a](../nowhere.md)", "one-pass.md")
