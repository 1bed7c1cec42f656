"""vLLM's hand-written kernels for norms, activations and rotary embeddings, where nothing is compiled.

When vLLM compiles a model it takes these in their PyTorch form, for Inductor to fuse. Our passes are not compiled but
captured, and run uncompiled every such form would be a handful of kernels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from vllm.config.kernel import IrOpPriorityConfig
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.platforms import current_platform


def unfused_ops(model: nn.Module) -> list[CustomOp]:
    """The model's activations and rotary embeddings, each once."""
    return [module for module in model.modules() if isinstance(module, SiluAndMul | RotaryEmbedding)]


@contextmanager
def fused(ops: Sequence[CustomOp]) -> Iterator[None]:
    """Meanwhile norms, and these, run as they do where vLLM compiles nothing."""
    if not current_platform.is_cuda():
        yield
        return
    for op in ops:
        op.forward = op.forward_cuda
    try:
        with IrOpPriorityConfig.with_default(["vllm_c", "native"]).set_priority():
            yield
    finally:
        for op in ops:
            del op.forward
