"""vLLM's hand-written kernels for norms, activations and rotary embeddings, where nothing is compiled.

When vLLM compiles a model it takes these in their PyTorch form, for Inductor to fuse. Our passes are not compiled, and
run uncompiled every such form would be a handful of kernels: launches of a graph on GPUs, and on CPUs a third of the
time of a draft pass.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from vllm import _custom_ops as by_hand
from vllm import ir
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.platforms import current_platform

from vllm_orthrus.engine.quantization import kernel_in_fp8

# By name: not every operator of vLLM has a hand-written kernel, and naming one that an operator lacks is an error.
NORMS = (ir.ops.rms_norm, ir.ops.fused_add_rms_norm)
BY_HAND = "vllm_c"
CPU_VECTOR = 32  # a CPU's norms take so many numbers at a time, and have no remainder

Forward = Callable[..., Any]


def unfused_ops(*models: nn.Module) -> dict[CustomOp, Forward]:
    """The models' operators, each once, by what is to run in their place."""
    modules: Iterable[nn.Module] = (module for model in models for module in model.modules())
    if current_platform.is_cuda():
        current_platform.import_ir_kernels()
        ops = (op for module in modules for op in (module, _quantizer_of_inputs(module)))
        return {op: op.forward_cuda for op in ops if isinstance(op, SiluAndMul | RotaryEmbedding | QuantFP8)}
    if current_platform.is_cpu():
        return {op: forward for op in modules if (forward := _on_a_cpu(op)) is not None}
    return {}


@contextmanager
def fused(ops: Mapping[CustomOp, Forward]) -> Iterator[None]:
    """Meanwhile these, and on GPUs norms, run as they do where vLLM compiles nothing."""
    for op, forward in ops.items():
        vars(op)["forward"] = forward  # past `nn.Module.__setattr__`, which takes a while for hundreds of them
    try:
        with ExitStack() as stack:
            for norm in NORMS if current_platform.is_cuda() else ():
                if BY_HAND in norm.supported_providers():
                    stack.enter_context(norm.set_priority([BY_HAND, "native"]))
            yield
    finally:
        for op in ops:
            del vars(op)["forward"]


def _quantizer_of_inputs(linear: Any) -> Any:
    """Of a layer whose product is in fp8: its kernel has one."""
    return getattr(kernel_in_fp8(linear), "quant_fp8", None)


def _on_a_cpu(op: Any) -> Forward | None:
    # Others of this family differ in the angles that they keep, or else have a form of their own.
    if isinstance(op, RotaryEmbedding) and type(op).forward_cpu is RotaryEmbedding.forward_cpu:
        rotary: Forward = op.forward_cpu
        return rotary
    if type(op) is SiluAndMul:
        # vLLM compiles each of them by itself, and what guards that costs more than it saves.
        activation: Forward = op.forward_native
        return activation
    if type(op) is RMSNorm and op.has_weight and op.variance_size_override is None:
        return _norm_on_a_cpu(op) if op.hidden_size % CPU_VECTOR == 0 else None
    return None


def _norm_on_a_cpu(norm: Any) -> Forward:
    def forward(x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if residual is None:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
            by_hand.rms_norm(out, x.contiguous(), norm.weight.data, norm.variance_epsilon)
            return out
        by_hand.fused_add_rms_norm(x, residual, norm.weight.data, norm.variance_epsilon)
        return x, residual

    return forward
