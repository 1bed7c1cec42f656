"""The two views of one decoder layer: the base's own attention, and the head's, over the same hidden size.

Everything else of the layer (norms, MLP, residuals) is shared, so a view is just six modules. Modules that belong to
transformers are typed `Any` throughout: their attributes are what matters here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vllm_orthrus.heads import NORMS, PROJECTIONS, is_head_tensor, tensor_name


class View(NamedTuple):
    """One attention of a layer, reduced to what differs between the two views."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    head_dim: int
    scaling: float

    def project(self, hidden: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, T, d] -> rotated q [B, H, T, D], rotated k and v [B, H_kv, T, D]."""
        q, k, v = (proj(hidden).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = self.q_norm(q) if self.q_norm is not None else q
        k = self.k_norm(k) if self.k_norm is not None else k
        return rope.rotate(q.transpose(1, 2)), rope.rotate(k.transpose(1, 2)), v.transpose(1, 2)

    def output(self, heads: Tensor) -> Tensor:
        """heads [B, H, T, D] -> [B, T, d]."""
        result: Tensor = self.o_proj(heads.transpose(1, 2).flatten(-2))
        return result


class Rope(NamedTuple):
    cos: Tensor  # [B, 1, T, D]
    sin: Tensor

    @classmethod
    def at(cls, rotary: nn.Module, like: Tensor, positions: Tensor) -> Rope:
        cos, sin = rotary(like, positions)
        return cls(cos.unsqueeze(1), sin.unsqueeze(1))

    def rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return (x * self.cos + torch.cat((-second, first), dim=-1) * self.sin).to(x.dtype)


def autoregressive_view(attention: Any) -> View:
    return _view(attention, attention)


def diffusion_view(attention: Any, diffusion: DiffusionAttention) -> View:
    return _view(attention, diffusion)


def _view(attention: Any, weights: nn.Module) -> View:
    modules: dict[str, Any] = {part: getattr(weights, part, None) for part in (*PROJECTIONS, *NORMS)}
    return View(**modules, head_dim=attention.head_dim, scaling=attention.scaling)


class DiffusionAttention(nn.Module):
    """The head's weights of one layer, which start as copies of the base's."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        for part in (*PROJECTIONS, *NORMS):
            if hasattr(attention, part):
                self.add_module(part, copy.deepcopy(getattr(attention, part)))


class DiffusionHead(nn.Module):
    """An Orthrus head: a `DiffusionAttention` per layer, and nothing else."""

    def __init__(self, base_layers: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DiffusionAttention(layer.self_attn) for layer in base_layers)
        self.to(dtype).requires_grad_(True)

    def published(self) -> dict[str, Tensor]:
        """The head's tensors under their published names."""
        return {published_name(name): tensor for name, tensor in self.state_dict().items()}

    def load_published(self, tensors: Mapping[str, Tensor]) -> None:
        wanted = {published_name(name): name for name in self.state_dict()}
        self.load_state_dict({wanted[name]: tensor for name, tensor in tensors.items() if is_head_tensor(name)})


def published_name(name: str) -> str:
    """Of the head's parameter `layers.3.q_proj.weight`, which is `layers.3.diffusion.q_proj.weight` beside its base."""
    _, layer, *_, part, kind = name.split(".")
    return tensor_name(int(layer), part, kind)
