"""What a user gets who installs a wheel."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[2]


def wheel_of(source: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True, timeout=300)
    (wheel,) = folder.glob("vllm_orthrus-*.whl")
    return wheel


def test_a_wheel_is_the_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves its own copies behind, which a later one would pick up
    for folder in ("vllm_orthrus", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("tests", "benchmarks", "scripts", "examples", "docs"):
        (source / folder).mkdir()
        (source / folder / "__init__.py").write_text("")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    with zipfile.ZipFile(wheel_of(source, tmp_path)) as content:
        names = content.namelist()
        (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
        declared = content.read(entry_points).decode()
        (facts,) = [name for name in names if name.endswith("/METADATA")]
        metadata = Parser().parsestr(content.read(facts).decode())
    package = {f"vllm_orthrus/{path.relative_to(ROOT / 'vllm_orthrus')}" for path in files(ROOT / "vllm_orthrus")}
    kernels = {f"vllm_orthrus/kernels/{path.relative_to(ROOT / 'kernels')}" for path in files(ROOT / "kernels")}
    about = {name for name in names if name.startswith("vllm_orthrus-") and ".dist-info/" in name}
    assert set(names) - about == package | kernels
    assert "vllm_orthrus/bench/questions.jsonl" in package and "vllm_orthrus/py.typed" in package
    for group in ("vllm.general_plugins", "vllm.platform_plugins", "console_scripts"):
        assert f"[{group}]" in declared
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["Version"] == settings["version"] and metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0" and metadata.get_payload(), "the README is the description"


def files(folder: Path) -> Iterator[Path]:
    """That are code or belong to it. A link is what it leads to, under its own name."""
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix in (".py", ".typed", ".jsonl"):
            yield path


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert newest == version, "the changelog begins with the version that comes next"
    for manifest in ("deployment.yaml", "rayservice.yaml", "production-stack.yaml"):
        text = (ROOT / "examples/kubernetes" / manifest).read_text()
        pinned = re.findall(r"vllm-orthrus[a-z-]*(?::|==)([^\s\]]+)", text)
        assert pinned and set(pinned) == {version}, manifest
