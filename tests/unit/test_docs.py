"""The site of the documentation: every page and link is there, and what comes from the code is as the code has it."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.reference_pages import settings_page
from scripts.site_pages import PAGES, ROOT, for_site


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """A page that nothing leads to, a link or an anchor that leads nowhere: each is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    for page in [*(ROOT / "docs").glob("*.md"), *map(Path, PAGES.values())]:
        assert (tmp_path / ("index.html" if page.stem == "index" else f"{page.stem}/index.html")).exists()


def test_settings_are_as_the_code_has_them() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == settings_page(), "make reference"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_what_is_named_in_commands_is_there(name: str) -> None:
    """Targets of make."""
    targets = {line.split(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if line[:1].isalpha()}
    for line in (ROOT / name).read_text().split("`"):
        if line.startswith("make ") and "\n" not in line:
            assert line.split()[1] in targets, f"{name} says `{line}`"


def test_links_lead_to_the_sites_own_pages() -> None:
    assert for_site("[a](docs/one-pass.md#metrics)", "overview.md") == "[a](one-pass.md#metrics)"
    assert for_site("[a](../README.md#settings)", "one-pass.md") == "[a](overview.md#settings)"
    assert for_site("![a](docs/pictures/soak.png)", "overview.md") == "![a](pictures/soak.png)"
    assert for_site("[config](../vllm_orthrus/engine/config.py)", "architecture.md") == "config"
    assert for_site("[out](https://arxiv.org/abs/2605.12825)", "index.md").endswith("2605.12825)")
    with pytest.raises(ValueError, match=r"index.md links to ../nowhere.md, and there is no nowhere.md"):
        for_site("[a](../nowhere.md)", "index.md")
