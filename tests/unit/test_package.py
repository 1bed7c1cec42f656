"""What a user gets who installs a wheel."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def wheel_of(source: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True, timeout=300)
    (wheel,) = folder.glob("vllm_orthrus-*.whl")
    return wheel


def test_wheel_holds_the_kernels_and_the_entry_points(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves its own copies behind, which a later one would pick up
    for folder in ("vllm_orthrus", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    with zipfile.ZipFile(wheel_of(source, tmp_path)) as content:
        names = content.namelist()
        (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
        declared = content.read(entry_points).decode()
    kernels = {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert {Path(name).name for name in names if name.startswith("vllm_orthrus/kernels/")} == kernels
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "benchmarks/"))]
    for group in ("vllm.general_plugins", "vllm.platform_plugins", "console_scripts"):
        assert f"[{group}]" in declared
