"""The diffusion view: the target's own layers with a second attention in each."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

from vllm_orthrus.engine.attention.blocks import BlockAttention
from vllm_orthrus.engine.fused_ops import fused, unfused_ops
from vllm_orthrus.engine.quantization import for_linear_layers
from vllm_orthrus.engine.rotation import projected, rotate, rotates_plainly
from vllm_orthrus.engine.selector import Selector
from vllm_orthrus.heads import BaseShape, HeadError, Quantization, expected_tensors, tensor_place


class DiffusionAttention(nn.Module):
    """The second attention of one layer: its own projections and norms, the target's rotary embedding."""

    def __init__(self, shape: BaseShape, target: Any, prefix: str, quantization: Quantization | None) -> None:
        super().__init__()
        quant_config = for_linear_layers(quantization)
        self.qkv_proj = QKVParallelLinear(
            shape.hidden_size,
            shape.head_dim,
            shape.num_heads,
            shape.num_kv_heads,
            bias=shape.qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            shape.num_heads * shape.head_dim,
            shape.hidden_size,
            bias=shape.o_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = self.k_norm = None
        self.eps = target.q_norm.variance_epsilon if shape.qk_norm else 0.0
        if shape.qk_norm:
            self.q_norm = RMSNorm(shape.head_dim, eps=self.eps)
            self.k_norm = RMSNorm(shape.head_dim, eps=self.eps)
        self.sizes = [target.q_size, target.kv_size, target.kv_size]
        self.head_dim = shape.head_dim
        self.dtype = torch.get_default_dtype()  # the model's, while it is built

    def forward(
        self, positions: torch.Tensor, x: torch.Tensor, rotary: nn.Module, attend: BlockAttention, layer: int
    ) -> torch.Tensor:
        out, _ = self.o_proj(attend(layer, *self.project(positions, x, rotary)))
        return out  # type: ignore[no-any-return]

    def project(
        self, positions: torch.Tensor, x: torch.Tensor, rotary: nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [rows, heads * dim], k and v [rows, kv_heads * dim]."""
        qkv, _ = self.qkv_proj(x)
        if rotates_plainly(rotary, self.head_dim, x.device):
            (rows,) = rotate((projected(self, qkv, positions),), self.sizes, self.head_dim, rotary, self.eps)
            return rows
        q, k, v = qkv.split(self.sizes, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.reshape(-1, self.head_dim)).view(q.shape)
            k = self.k_norm(k.reshape(-1, self.head_dim)).view(k.shape)
        q, k = rotary(positions, q, k)
        return q, k, v


class DiffusionView(nn.Module):
    """`[anchor, MASK, MASK, ...]` through the target's embedding, norms and MLPs, and its own attention.

    Only the head's tensors are parameters here. The target is held outside PyTorch's registry, so that nothing that
    walks parameters (sleep, weight updates, memory accounting) meets it twice.
    """

    drafts_nothing = False  # the head's weights are such that no draft can come of them

    def __init__(self, shape: BaseShape, target: Any, quantization: Quantization | None = None) -> None:
        """quantization: of the projections' weights, as they are loaded."""
        super().__init__()
        self._target = (target,)  # a tuple is no submodule
        self.shape, self.quantization = shape, quantization
        self.selector: Selector | None = None
        self.layers = nn.ModuleList(
            DiffusionAttention(shape, layer.self_attn, f"orthrus.layers.{index}", quantization)
            for index, layer in enumerate(target.model.layers)
        )
        self._unfused = unfused_ops(target, self.layers)
        self._lasting: dict[str, torch.Tensor] = {}

    def keep(self, lasting: Iterable[tuple[str, torch.Tensor]]) -> None:
        """These outlast a deep sleep, as the head's weights do."""
        self._lasting |= dict(lasting)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """What vLLM takes to the host before memory is given back, and puts in place again."""
        yield from super().named_buffers(*args, **kwargs)
        yield from self.named_parameters()
        yield from self._lasting.items()

    @property
    def target(self) -> Any:
        return self._target[0]

    def target_attention(self) -> list[Any]:
        """Each layer's, as vLLM knows it: the place where its cache hangs."""
        return [layer.self_attn.attn for layer in self.target.model.layers]

    def fused(self) -> AbstractContextManager[None]:
        """What runs inside uses vLLM's own kernels wherever it has them."""
        return fused(self._unfused)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, attend: BlockAttention) -> torch.Tensor:
        """input_ids and positions [rows]; returns the final hidden states [rows, hidden]."""
        base = self.target.model
        hidden, residual = base.embed_tokens(input_ids), None
        for index, (layer, diffusion) in enumerate(zip(base.layers, self.layers, strict=True)):
            if residual is None:
                residual = hidden
                hidden = layer.input_layernorm(hidden)
            else:
                hidden, residual = layer.input_layernorm(hidden, residual)
            hidden = diffusion(positions, hidden, layer.self_attn.rotary_emb, attend, index)
            hidden, residual = layer.post_attention_layernorm(hidden, residual)
            hidden = layer.mlp(hidden)
        hidden, _ = base.norm(hidden, residual)
        return hidden  # type: ignore[no-any-return]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.target.compute_logits(hidden)  # type: ignore[no-any-return]

    def get_top_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.target.get_top_tokens(hidden)  # type: ignore[no-any-return]

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Fill this rank's shards. Raises unless exactly the head's tensors come by."""
        missing = set(expected_tensors(self.shape, self.quantization is not None))
        for name, tensor in tensors:
            missing.remove(name)
            layer, part, kind = tensor_place(name)
            attention, module = self.layers[layer], part
            shard: tuple[str, ...] = ()
            if part in ("q_proj", "k_proj", "v_proj"):
                module, shard = "qkv_proj", (part[0],)
            parameter = getattr(getattr(attention, module), kind)
            load = getattr(parameter, "weight_loader", _copy)
            load(parameter, tensor, *shard)
        if missing:
            raise HeadError(f"the head lacks {len(missing)} tensors, the first of them {min(missing)}.")


def _copy(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
    parameter.data.copy_(tensor)
