"""Norms and rotation of queries and keys in one launch, where vLLM's modules are as plain as our kernel.

vLLM has a fused operator for this, `_C.fused_qk_norm_rope`, which takes the rows of one projection: two launches for
the two views, and it writes no cache.
"""

from typing import Any

import torch
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

from vllm_orthrus.kernels.forms import runs_triton
from vllm_orthrus.kernels.norm_rotate import CacheSlots, Heads, Projected, norm_rotate


def rotates_plainly(rotary: Any, head_dim: int, device: torch.device) -> bool:
    """Whether our kernel does what this module does, and is to. Twins are vLLM's own modules, as they are on CPUs."""
    return (
        runs_triton(device)
        and isinstance(rotary, RotaryEmbedding)
        and type(rotary).forward_cuda is RotaryEmbedding.forward_cuda
        and rotary.is_neox_style
        and rotary.rotary_dim == rotary.head_size == head_dim
        and head_dim & (head_dim - 1) == 0
        and not (rotary.use_flashinfer or rotary.use_aiter)
    )


def projected(attention: Any, qkv: torch.Tensor, positions: torch.Tensor) -> Projected:
    """attention: the target's, or the diffusion view's."""
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return Projected(
        qkv, positions, None if q_norm is None else q_norm.weight, None if k_norm is None else k_norm.weight
    )


def rotate_nothing(attention: Any, rotary: Any, beside: Any = None, cache: CacheSlots | None = None) -> None:
    """Launch what a draft pass does or, with the target's attention beside it, a verification with hypotheses."""
    device, dtype = rotary.cos_sin_cache.device, attention.dtype
    if not rotates_plainly(rotary, attention.head_dim, device):
        return

    def row(of: Any) -> Projected:
        qkv = torch.zeros(1, sum(attention.sizes), dtype=dtype, device=device)
        return projected(of, qkv, torch.zeros(1, dtype=torch.int64, device=device))

    views = (row(attention),) if beside is None else (row(beside), row(attention))
    rotate(views, attention.sizes, attention.head_dim, rotary, attention.eps, cache)


def rotate(
    views: tuple[Projected, ...],
    sizes: list[int],
    head_dim: int,
    rotary: Any,
    eps: float,
    cache: CacheSlots | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """In place. sizes: of q, k and v in a projection. Returns views of them [rows, heads * dim]."""
    heads = Heads(sizes[0] // head_dim, sizes[1] // head_dim, head_dim)
    norm_rotate(views, heads, rotary.cos_sin_cache, eps, cache)
    return [view.qkv.split(sizes, dim=-1) for view in views]
