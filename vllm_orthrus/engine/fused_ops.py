"""vLLM's hand-written kernels for norms, activations and rotary embeddings, where nothing is compiled.

When vLLM compiles a model it takes these in their PyTorch form, for Inductor to fuse. Our passes are not compiled but
captured, and run uncompiled every such form would be a handful of kernels.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn
from vllm import ir
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.platforms import current_platform

# By name: not every operator of vLLM has a hand-written kernel, and naming one that an operator lacks is an error.
NORMS = (ir.ops.rms_norm, ir.ops.fused_add_rms_norm)
BY_HAND = "vllm_c"


def unfused_ops(model: nn.Module) -> list[CustomOp]:
    """The model's activations and rotary embeddings, each once."""
    return [module for module in model.modules() if isinstance(module, SiluAndMul | RotaryEmbedding)]


@contextmanager
def fused(ops: Sequence[CustomOp]) -> Iterator[None]:
    """Meanwhile norms, and these, run as they do where vLLM compiles nothing."""
    if not current_platform.is_cuda():
        yield
        return
    current_platform.import_ir_kernels()
    for op in ops:
        op.forward = op.forward_cuda
    try:
        with ExitStack() as stack:
            for norm in NORMS:
                if BY_HAND in norm.supported_providers():
                    stack.enter_context(norm.set_priority([BY_HAND, "native"]))
            yield
    finally:
        for op in ops:
            del op.forward
