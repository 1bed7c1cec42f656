"""What a forward costs."""

from typing import NamedTuple


class Streamed(NamedTuple):
    """Bytes that a forward reads from memory when few rows run: what its time is made of."""

    verify: float  # plain decoding, or a verification
    draft: float  # a separate draft pass
    one_pass: float  # a verification that carries hypotheses


def streamed_bytes(
    layers: int = 36,
    hidden: int = 4096,
    intermediate: int = 12288,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    vocab: int = 151936,
    weight_bytes: float = 2,
    head_weight_bytes: float = 2,
    context: int = 2048,
) -> Streamed:
    """Base, head and KV cache at batch 1; Qwen3-8B in bf16 unless told. Embeddings are looked up, not streamed.

    A draft pass leaves out the base's attention weights, as the head's stand in for them. The fused attention reads a
    prefix once for the verification and all hypotheses.
    """
    attention = layers * 2 * hidden * head_dim * (heads + kv_heads)
    shared = (layers * 3 * hidden * intermediate + hidden * vocab) * weight_bytes
    cache = 2 * layers * kv_heads * head_dim * weight_bytes * context
    base, head = attention * weight_bytes, attention * head_weight_bytes
    return Streamed(shared + base + cache, shared + head + cache, shared + base + head + cache)


def time_ratio(one_pass: float, two_pass: float, streamed: Streamed) -> float:
    """How much faster one pass is than two, from the tokens per forward of each and the bytes of their forwards."""
    return one_pass / two_pass * (streamed.verify + streamed.draft) / 2 / streamed.one_pass
