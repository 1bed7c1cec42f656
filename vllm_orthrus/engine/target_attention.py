"""The target's attention layers: vLLM's op that writes their cache, what their results depend on, and their place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.attention import (
    Attention,
    unified_attention_with_output,
    unified_kv_cache_update,
)
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backend import AttentionType


def write_to_cache(attn: Any, key: torch.Tensor, value: torch.Tensor) -> None:
    """As vLLM does before it attends: to the slots in the forward context, in the cache's format."""
    dim = attn.head_size
    unified_kv_cache_update(key.view(len(key), -1, dim), value.view(len(value), -1, dim), attn.layer_name)


def computes_as_given(attn: Any) -> bool:
    """Whether nothing happens to queries, keys and values before vLLM's attention, but that its cache is written."""
    return (
        type(attn) is Attention
        and attn.query_quant is None
        and attn.kv_sharing_target_layer_name is None
        and not attn.attn_backend.forward_includes_kv_cache_update
    )


def attend_to_cache(attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> None:
    """As vLLM does once the cache is written. All [rows, heads * dim]."""
    dim = attn.head_size
    query, key, value, by_head = (x.view(len(x), -1, dim) for x in (query, key, value, out))
    if attn.use_direct_call:
        unified_attention_with_output(query, key, value, by_head, attn.layer_name)
    else:  # an operator that PyTorch knows
        name = _encode_layer_name(attn.layer_name)
        torch.ops.vllm.unified_attention_with_output(query, key, value, by_head, name)


@contextmanager
def answered_by(attn: Any, attend: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Meanwhile the target's code, which projects and rotates as it will, gets its attention from `attend(q, k, v)`."""
    attn.forward = attend
    try:
        yield
    finally:
        del attn.forward


def beyond_plain_softmax(vllm_config: VllmConfig, attn: Any) -> str | None:
    """What this layer does besides writing its cache and a causal softmax over all of it, or None."""
    impl = attn.impl
    if type(attn) is not Attention:
        return f"it is a {type(attn).__name__}"
    if vllm_config.kv_transfer_config is not None:
        return "a KV connector waits for its cache layer by layer (kv_transfer_config)"
    extras = {
        f"attn_type={attn.attn_type!r} is not causal decoding": attn.attn_type != AttentionType.DECODER,
        "it has a sliding window": attn.sliding_window is not None,
        "it caps its logits": bool(getattr(impl, "logits_soft_cap", None)),
        "it has ALiBi slopes": getattr(impl, "alibi_slopes", None) is not None,
        "it has attention sinks": attn.has_sink,
        "it looks back by chunks": getattr(impl, "chunk_lookback", -1) > -1,
        "it sees multimodal prefixes in both directions": attn.use_mm_prefix,
        "it uses another layer's cache": attn.kv_sharing_target_layer_name is not None,
        "its backend writes the cache itself": attn.attn_backend.forward_includes_kv_cache_update,
    }
    return next((extra for extra, present in extras.items() if present), None)
