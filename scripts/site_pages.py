"""Hooks of mkdocs: pages that stand outside docs/, and links that lead out of the site.

README.md is the first page; CONTRIBUTING.md, CHANGELOG.md and others outside docs/ are pages, too. Links are written as
they work in a checkout; those to pages are turned into the site's, with a page's title where they say its file, and of
those to other files only the words stay. A link to nothing is an error.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/evidence/README.md": "evidence.md",
    "examples/README.md": "examples.md",
    "examples/own_head/README.md": "own-head.md",
    "examples/ray_serve/README.md": "ray-serve.md",
    "examples/tiny-orthrus/README.md": "tiny-orthrus.md",
}
PICTURES = {"examples/tiny-orthrus/training.png": "pictures/training.png"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for source, picture in PICTURES.items():
        files.append(File.generated(config, picture, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    return for_site(markdown, page.file.src_uri)


def for_site(markdown: str, page: str) -> str:
    """page: its path in the site."""
    origin = next((source for source, name in PAGES.items() if name == page), f"docs/{page}")

    def turned(match: re.Match[str]) -> str:
        image, words, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match.group()
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        if not (ROOT / path).exists():
            raise ValueError(f"{origin} links to {target}, and there is no {path}. Mend the link.")
        inside = (PAGES | PICTURES).get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if inside is None:
            return words
        if words.endswith(".md") and "/" not in words:
            words = title(ROOT / path)
        to = posixpath.relpath(inside, posixpath.dirname(page) or ".")
        return f"{image}[{words}]({to}{'#' + anchor if anchor else ''})"

    return LINK.sub(turned, markdown)


def title(page: Path) -> str:
    return next(line.removeprefix("# ") for line in page.read_text().splitlines() if line.startswith("# "))
