"""vLLM's hand-written kernels for norms, activations and rotary embeddings, where nothing is compiled.

When vLLM compiles a model it takes these in their PyTorch form, for Inductor to fuse. Our passes are not compiled but
captured, and run uncompiled every such form would be a handful of kernels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config.kernel import IrOpPriorityConfig
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.platforms import current_platform


@contextmanager
def fused_norms() -> Iterator[None]:
    if not current_platform.is_cuda():
        yield
        return
    with IrOpPriorityConfig.with_default(["vllm_c", "native"]).set_priority():
        yield


def fused_rotary(rotary: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The rotary embedding as it runs uncompiled; in place."""
    rotate: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    rotate = rotary.forward_cuda if current_platform.is_cuda() else rotary
    return rotate


def fused_mlp(mlp: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A gated MLP as it runs uncompiled; any other as it is."""
    activate: Any = getattr(mlp, "act_fn", None)
    if not current_platform.is_cuda() or type(activate) is not SiluAndMul:
        return mlp  # type: ignore[no-any-return]

    def run(x: torch.Tensor) -> torch.Tensor:
        gate_up, _ = mlp.gate_up_proj(x)
        out: torch.Tensor
        out, _ = mlp.down_proj(activate.forward_cuda(gate_up))
        return out

    return run
