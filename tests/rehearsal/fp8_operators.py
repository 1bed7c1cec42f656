"""What vLLM's CUDA library has for products in fp8, by definition and for any device. For a process where a GPU is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

PACK = 32 // 8  # weights of eight bits in a word of Marlin's


def define() -> None:
    import torch

    scaled = "Tensor(a!) out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias"
    for name, schema, implementation in (
        ("cutlass_scaled_mm", f"({scaled}) -> ()", multiply),
        ("gptq_marlin_repack", "(Tensor b, SymInt k, SymInt n, int bits, bool is_a_8bit) -> Tensor", repack),
    ):
        torch.library.define(f"_C::{name}", schema)
        torch.library.impl(f"_C::{name}", "CompositeExplicitAutograd", implementation)


def multiply(out: Any, a: Any, b: Any, a_scales: Any, b_scales: Any, bias: Any) -> None:
    """a [rows, in], b [in, out], scales [rows, 1] and [out, 1]."""
    import torch

    if a.dtype != torch.float8_e4m3fn or b.dtype != a.dtype:
        raise TypeError(f"a product of {a.dtype} and {b.dtype}")
    if a_scales.shape != (len(a), 1) or b_scales.shape != (b.shape[1], 1):
        raise ValueError(f"scales {tuple(a_scales.shape)} and {tuple(b_scales.shape)} of {a.shape} and {b.shape}")
    product = (a.float() @ b.float()) * a_scales * b_scales.t()
    out.copy_(product if bias is None else product + bias)


def quantize_rows(x: Any, *_: Any, **options: Any) -> tuple[Any, Any]:
    """In place of vLLM's `scaled_fp8_quant`, whose operator has a name in a CPU build, and no more."""
    import torch

    assert options["use_per_token_if_dynamic"]
    scales = x.abs().amax(1, keepdim=True).float() / 448
    return (x.float() / scales).to(torch.float8_e4m3fn), scales


def repack(b: Any, k: int, n: int, bits: int, is_a_8bit: bool) -> Any:
    return b.new_empty(k // 16, n * 16 // PACK)


@contextmanager
def products_in_fp8(launched: list[str]) -> Iterator[None]:
    """Notes each rounding of inputs, and each product: vLLM's own, and those that go straight to where they belong."""
    from vllm import _custom_ops

    from vllm_orthrus.engine.onepass import joined

    def noted(name: str, call: Any) -> Any:
        def note(*args: Any, **kwargs: Any) -> Any:
            launched.append(name)
            return call(*args, **kwargs)

        return note

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_custom_ops, "scaled_fp8_quant", noted("scaled_fp8_quant", quantize_rows))
        patch.setattr(_custom_ops, "cutlass_scaled_mm", noted("cutlass_scaled_mm", _custom_ops.cutlass_scaled_mm))
        patch.setattr(joined, "multiply_in_fp8", noted("multiply_in_fp8", joined.multiply_in_fp8))
        yield
