"""Both views of every layer in one forward pass over packed rows, for training.

One AR pass per packed row, without gradient, gives the keys that all of its blocks share and the teacher's states; the
blocks run beside it, layer by layer. A layer is one module with both views, so sharding a layer (FSDP) shards both.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from vllm_orthrus.training.blocks import Blocks, Rows
from vllm_orthrus.training.selector import SelectorWeights
from vllm_orthrus.training.views import (
    DiffusionAttention,
    DiffusionHead,
    Rope,
    View,
    autoregressive_view,
    diffusion_view,
)

AttentionKind = Literal["dense", "flex"]


class States(NamedTuple):
    """Final hidden states, after the last norm."""

    teacher: Tensor  # [R, S, d], no gradient
    student: Tensor  # [R, N, B, d]


class DualViewLayer(nn.Module):
    def __init__(self, base: Any, diffusion: DiffusionAttention) -> None:
        super().__init__()
        self.base: Any = base
        self.diffusion = diffusion

    def forward(self, tokens: Tensor, blocks: Tensor, geometry: Geometry, recompute: bool) -> tuple[Tensor, Tensor]:
        """tokens [R, S, d] of the AR view and blocks [R, N*B, d] of the diffusion view, one layer further."""
        with torch.no_grad():
            view = autoregressive_view(self.base.self_attn)
            q, k, v = view.project(self.base.input_layernorm(tokens), geometry.token_rope)
            heads = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=geometry.causal, scale=view.scaling, enable_gqa=True
            )
            tokens = self._rest(view, tokens, heads)
        if recompute:
            return tokens, checkpoint(self._diffuse, blocks, k, v, geometry, use_reentrant=False)
        return tokens, self._diffuse(blocks, k, v, geometry)

    def _diffuse(self, blocks: Tensor, keys: Tensor, values: Tensor, geometry: Geometry) -> Tensor:
        view = diffusion_view(self.base.self_attn, self.diffusion)
        q, k, v = view.project(self.base.input_layernorm(blocks), geometry.block_rope)
        return self._rest(view, blocks, geometry.attend(q, k, v, keys, values, view.scaling))

    def _rest(self, view: View, x: Tensor, heads: Tensor) -> Tensor:
        x = x + view.output(heads)
        result: Tensor = x + self.base.mlp(self.base.post_attention_layernorm(x))
        return result


class Geometry(NamedTuple):
    """Who sees whom, the same for every layer."""

    causal: Tensor  # [R, 1, S, S]
    token_rope: Rope
    block_rope: Rope
    visible: Tensor  # [R, N, S]
    flex_mask: BlockMask | None  # None: dense attention

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """q [R, H, N*B, D] and the blocks' k, v [R, H_kv, N*B, D] over the rows' keys, values [R, H_kv, S, D]."""
        if self.flex_mask is None:
            return attend_dense(q, k, v, keys, values, self.visible, scaling)
        keys, values = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
        run = _compiled_flex() if q.is_cuda else flex_attention
        heads: Tensor = run(q, keys, values, block_mask=self.flex_mask, scale=scaling, enable_gqa=True)
        return heads


def attend_dense(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scaling: float
) -> Tensor:
    """Prefix scores and block scores side by side in one softmax; nothing is computed between different blocks."""
    num_blocks, kv_heads = visible.shape[1], k.shape[1]
    q = q.unflatten(1, (kv_heads, -1)).unflatten(3, (num_blocks, -1)) * scaling  # [R, H_kv, G, N, B, D]
    k, v = (x.unflatten(2, (num_blocks, -1)).unsqueeze(2) for x in (k, v))  # [R, H_kv, 1, N, B, D]
    to_prefix = q.flatten(2, 4) @ keys.transpose(-1, -2)  # [R, H_kv, G*N*B, S]
    to_prefix = to_prefix.view(*q.shape[:5], -1).masked_fill(~visible[:, None, None, :, None], float("-inf"))
    accumulate = torch.promote_types(q.dtype, torch.float32)
    weights = torch.softmax(torch.cat((to_prefix, q @ k.transpose(-1, -2)), dim=-1), dim=-1, dtype=accumulate).to(
        v.dtype
    )
    prefix_weights, block_weights = weights.split((visible.shape[-1], k.shape[-2]), dim=-1)
    from_prefix = (prefix_weights.flatten(2, 4) @ values).view_as(q)
    heads: Tensor = (from_prefix + block_weights @ v).flatten(3, 4).flatten(1, 2)
    return heads


def flex_mask(visible: Tensor, width: int) -> BlockMask:
    """`visible` as a sparse mask over [row tokens | blocks], for FlexAttention."""
    rows, num_blocks, length = visible.shape

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // width
        in_prefix = (key < length) & visible[row, block, key.clamp(max=length - 1)]
        return in_prefix | ((key >= length) & ((key - length) // width == block))

    queries = num_blocks * width
    return create_block_mask(sees, rows, None, queries, length + queries, device=str(visible.device))


_flex: Any = None


def _compiled_flex() -> Any:
    """Uncompiled FlexAttention materialises every score; compile it once, at first use."""
    global _flex
    _flex = _flex or torch.compile(flex_attention, dynamic=False)
    return _flex


class DualViewModel(nn.Module):
    """A frozen base and a trainable head, run side by side."""

    def __init__(
        self,
        base: PreTrainedModel,
        head: DiffusionHead,
        attention: AttentionKind,
        recompute: bool = False,
        selector: SelectorWeights | None = None,
    ) -> None:
        """selector: is trained with the head or instead of it; its part of the loss is computed outside."""
        super().__init__()
        self.selector = selector
        self.frozen = not any(parameter.requires_grad for parameter in head.parameters())
        base.requires_grad_(False)
        self.embed_tokens, self.norm, self.rotary = base.model.embed_tokens, base.model.norm, base.model.rotary_emb
        weights: Any = head.layers
        self.layers = nn.ModuleList(map(DualViewLayer, base.model.layers, weights))
        self.attention, self.recompute = attention, recompute

    def forward(self, rows: Rows, blocks: Blocks) -> States:
        tokens, x = self.embed_tokens(rows.tokens), self.embed_tokens(blocks.ids.flatten(1))
        geometry = Geometry(
            rows.causal[:, None],
            Rope.at(self.rotary, tokens, rows.positions),
            Rope.at(self.rotary, tokens, blocks.positions.flatten(1)),
            blocks.visible,
            flex_mask(blocks.visible, blocks.ids.shape[-1]) if self.attention == "flex" else None,
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            for layer in self.layers:
                tokens, x = layer(tokens, x, geometry, self.recompute)
        return States(self.norm(tokens).detach(), self.norm(x).view(*blocks.ids.shape, -1))
