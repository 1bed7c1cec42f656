"""A head's projections in eight bits, told to vLLM in a form that it knows: a compressed-tensors checkpoint.

vLLM then picks its method and its kernel as for any such checkpoint, and `--linear-backend` chooses among them:

compute capability 8.9 and above    weights and activations in fp8, the latter scaled row by row as they come
7.5 to 8.6                          weights alone, widened in the product (Marlin)
CPUs                                none for a scale per channel that is as fast as bfloat16, so weights are rounded to
                                    what their eight bits mean and computed with as ever: acceptance can be measured
                                    there, and no byte is saved
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from vllm_orthrus.heads import Quantization

if TYPE_CHECKING:  # asked where steps are priced, too, in processes that load as little of vLLM as they can
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

_EIGHT_BITS = {"num_bits": 8, "type": "float", "symmetric": True}
_DESCRIBED: dict[Quantization, dict[str, Any]] = {
    "fp8": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "projections": {
                "targets": ["Linear"],
                "weights": {**_EIGHT_BITS, "strategy": "channel", "dynamic": False},
                "input_activations": {**_EIGHT_BITS, "strategy": "token", "dynamic": True},
            }
        },
    }
}


def keeps_eight_bits() -> bool:
    """Whether weights stay in eight bits here."""
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


def for_linear_layers(quantization: Quantization | None) -> CompressedTensorsConfig | None:
    """What vLLM's linear layers take to learn how their weights are stored."""
    if quantization is None:
        return None
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    return CompressedTensorsConfig.from_config(copy.deepcopy(_DESCRIBED[quantization]))  # which vLLM writes to


def kernel_in_fp8(linear: Any) -> Any:
    """vLLM's, of a layer whose product is in fp8, or None. No module holds it."""
    holders = (getattr(linear, name, None) for name in ("scheme", "quant_method"))
    return next((kernel for holder in holders if (kernel := getattr(holder, "fp8_linear", None)) is not None), None)


def multiplies_in_place(linear: Any, dtype: torch.dtype) -> bool:
    """Whether `multiply_in_fp8` does what this layer does. dtype: of its results."""
    from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFP8ScaledMMLinearKernel
    from vllm.platforms import current_platform

    kernel = kernel_in_fp8(linear)
    return (
        type(kernel) is CutlassFP8ScaledMMLinearKernel
        and current_platform.is_cuda()
        and kernel.config.out_dtype in (None, dtype)
        and kernel.logical_output_size == linear.weight.shape[1]
        and not any(size % 16 for size in linear.weight.shape)
    )


def multiply_in_fp8(linear: Any, rows: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """As vLLM's kernel does, and to where the result is wanted; its own call makes a tensor of its own."""
    kernel = kernel_in_fp8(linear)
    weight, weight_scale, given_scale, bound = kernel._get_layer_params(linear)
    rounded, scale = kernel.quant_fp8(rows, given_scale, bound)
    torch.ops._C.cutlass_scaled_mm(out, rounded, weight, scale, weight_scale, bias)


def why_not_here(quantization: Quantization, dtype: torch.dtype) -> str | None:
    """Why this device does not compute with weights in eight bits, if so. dtype: the model's."""
    from vllm import envs
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return None
    if dtype == torch.float32:
        return "products of fp8 give bfloat16 or float16, and this model runs in float32"
    if not current_platform.is_cuda():
        return None if current_platform.supports_fp8() else "vLLM has no fp8 on this device"
    if current_platform.has_device_capability((8, 9)):
        return None
    has = f"this GPU has compute capability {current_platform.get_device_capability().as_version_str()}"
    if not current_platform.has_device_capability((7, 5)):
        return f"vLLM's kernels for fp8 weights begin with compute capability 7.5, and {has}"
    if envs.VLLM_BATCH_INVARIANT:
        return f"VLLM_BATCH_INVARIANT=1 needs products in fp8, which begin with compute capability 8.9, and {has}"
    return None
