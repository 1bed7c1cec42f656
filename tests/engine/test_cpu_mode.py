"""Triton's interpreter as vLLM's CPU backend."""

import math
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
import triton.language.extra.libdevice as tldevice

from vllm_orthrus.patches.cpu import interpreter_enabled

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU compiles its kernels")


@triton.jit
def _halves(out, size, flag, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offset = tl.arange(0, BLOCK)
    total = tl.sum(tl.where(offset < size, offset, 0), axis=0)  # a function of Triton's own library
    tl.store(out + offset, total, mask=(offset < size) & (flag > 0))


def test_kernels_are_interpreted() -> None:
    """Also those decorated in this process after PyTorch had imported Triton, and a mask of `block & scalar`."""
    assert interpreter_enabled()
    out = torch.full((8,), -1)
    _halves[(1,)](out, 5, 1, BLOCK=8)
    assert out.tolist() == [10] * 5 + [-1] * 3


@triton.jit
def _log1p(x, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    value = tl.load(x + tl.arange(0, BLOCK))
    tl.store(out + tl.arange(0, BLOCK), tl.where(tldevice.isnan(value), -1.0, 0.5 + tldevice.log1p(value)))


def test_device_library_functions_are_interpreted() -> None:
    """vLLM resamples a rejected token with `log1p`, which Triton leaves to its compilers."""
    x = torch.tensor([0.0, 1.0, -1.0, float("nan")])
    out = torch.empty(4)
    _log1p[(1,)](x, out, BLOCK=4)
    assert torch.allclose(out, torch.tensor([0.5, 0.5 + math.log(2), float("-inf"), -1.0]))


@triton.jit
def _bfloat16(x, y, greater, least, sum, rounded, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(greater + at, (a >= b).to(tl.int32))
    tl.store(least + at, tl.minimum(a, b))
    tl.store(sum + at, a + b)
    tl.store(rounded + at, (a.to(tl.float32) * 1.00390625).to(tl.bfloat16))


def test_bfloat16_values_are_numbers() -> None:
    """Triton's interpreter keeps them as integers, in which -1 is more than 1, and cut the digits off."""
    x = torch.tensor([-1.0, 1.0, -3.5, 1.9921875, 0.0, float("-inf"), 3.0e38, 5.0], dtype=torch.bfloat16)
    y = torch.tensor([1.0, -1.0, -3.25, 1.9921875, -0.0, -2.0, 3.0e38, float("nan")], dtype=torch.bfloat16)
    greater, results = torch.empty(8, dtype=torch.int32), [torch.empty_like(x) for _ in range(3)]
    _bfloat16[(1,)](x, y, greater, *results, BLOCK=8)
    assert greater.tolist() == (x >= y).int().tolist()
    expected = (torch.where(y.isnan(), x, torch.minimum(x, y)), x + y, (x.float() * 1.00390625).bfloat16())
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(result.float().nan_to_num(-7), right.float().nan_to_num(-7))


def _child(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_found_in_every_new_process_without_settings() -> None:
    code = (
        "import os; [os.environ.pop(name, None) for name in ('TRITON_INTERPRET', 'VLLM_USE_V2_MODEL_RUNNER')]\n"
        "import vllm.triton_utils as t; from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from triton.runtime.interpreter import InterpretedFunction as kernel\n"
        "print(t.HAS_TRITON, hasattr(kernel.run, '__wrapped__'))"
    )
    assert _child(code) == "True True", "kernels, and the native versions of those that have one"


def test_a_real_cpu_compiler_is_left_alone() -> None:
    code = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "from triton.backends import backends; backends['cpu'] = real = backends['nvidia']\n"
        "from vllm_orthrus.patches import cpu; cpu.enable_interpreter()\n"
        "print(backends['cpu'] is real, cpu.interpreter_enabled(), 'TRITON_INTERPRET' in os.environ)"
    )
    assert _child(code) == "True False False"


def test_other_builds_of_vllm_are_left_alone() -> None:
    code = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "from vllm_orthrus.patches import cpu; cpu.version = lambda name: '0.33.0'; cpu.enable_interpreter()\n"
        "print(cpu.interpreter_enabled(), 'TRITON_INTERPRET' in os.environ)"
    )
    assert _child(code) == "False False"


def test_vllm_is_found_under_its_own_name() -> None:
    """From the CPU wheel, `vllm serve` asks for a distribution that is not installed under that name."""
    code = (
        "import vllm.platforms as platforms; platforms.current_platform\n"
        "from importlib.metadata import version; print('cpu' in version('vllm'), platforms.current_platform.is_cpu())"
    )
    assert _child(code) == "True True"
