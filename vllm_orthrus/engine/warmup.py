"""Launching every form of our kernels that a step may launch, before requests wait for one to be compiled.

Triton compiles a kernel anew for each set of its constants, and how many hypotheses a request has, or how a launch is
cut up, depends on the number of requests. vLLM's own warm-up sees a few of these numbers. Passes here have as many rows
as real ones and nobody's: they read no cache, sample nothing and leave no trace.
"""

import torch

from vllm_orthrus.engine.attention.blocks import BlockAttention, Blocks
from vllm_orthrus.engine.attention.kernel import KernelAttention
from vllm_orthrus.kernels.dual_view_attention import Verification


def attend_to_nothing(attention: BlockAttention, blocks: Blocks, verified: Verification | None = None) -> None:
    """One launch for each kind of cache that the target has."""
    if not isinstance(attention, KernelAttention):
        return
    kinds = {
        (layer.group, layer.block_size, layer.attn.kv_cache_dtype): at for at, layer in enumerate(attention.layers)
    }
    for index in kinds.values():
        attn = attention.layers[index].attn
        heads, kv_heads = attn.num_heads * attn.head_size, attn.num_kv_heads * attn.head_size
        like = {"dtype": attn.dtype, "device": blocks.positions.device}
        q, k, v = (torch.zeros(blocks.positions.numel(), width, **like) for width in (heads, kv_heads, kv_heads))
        attention.begin(blocks)
        attention.into(torch.empty_like(q), index, q, k, v, verified)
