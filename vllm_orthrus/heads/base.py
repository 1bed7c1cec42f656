"""What a head must know of its base, read off the base's config."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_orthrus.heads.errors import HeadError

ARCHITECTURES = {
    "qwen3": ["Qwen3ForCausalLM"],
    "qwen2": ["Qwen2ForCausalLM"],
    "llama": ["LlamaForCausalLM"],
    "mistral": ["MistralForCausalLM"],
}


@dataclass(frozen=True)
class BaseShape:
    """The dimensions of a base that its head must match, tensor by tensor."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    qk_norm: bool
    qkv_bias: bool
    o_bias: bool

    @classmethod
    def from_config(cls, config: Any) -> BaseShape:
        """Read the shape off a base's config; raises `HeadError` for a base that no Orthrus head can serve."""
        model_type = _field(config, "model_type", "(none)")
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            raise HeadError(
                f"model_type={model_type!r} is not supported: an Orthrus head needs a dense decoder of one of the "
                f"types {', '.join(ARCHITECTURES)}. Choose such a base."
            )
        _refuse_sliding_windows(config, model_type)
        heads, hidden = _count(config, "num_attention_heads"), _count(config, "hidden_size")
        kv_heads = _count(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise HeadError(f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}.")
        attention_bias = bool(_field(config, "attention_bias", False))
        return cls(
            model_type=model_type,
            num_layers=_count(config, "num_hidden_layers", most=1024),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=_count(config, "head_dim", hidden // heads),
            vocab_size=_count(config, "vocab_size"),
            qk_norm=model_type == "qwen3",
            qkv_bias=model_type == "qwen2" or attention_bias,
            o_bias=model_type != "qwen2" and attention_bias,
        )


def base_fingerprint(config: Any) -> str:
    """A short hash of everything in a base's config that changes what its layers compute (not of its weights)."""
    names = ("hidden_act", "intermediate_size", "rms_norm_eps", "tie_word_embeddings")
    facts = {**vars(BaseShape.from_config(config)), "rope": rope_settings(config)}
    facts |= {name: _field(config, name) for name in names}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def rope_settings(config: Any) -> dict[str, Any]:
    """Rotary settings, whether written as transformers 5 does (`rope_parameters`) or as older checkpoints do."""
    written = [_field(config, name) or {} for name in ("rope_parameters", "rope_scaling")]
    if not all(isinstance(one, Mapping) for one in written):
        raise HeadError(f"rope_parameters and rope_scaling must be objects, and are {written}.")
    rope = dict(written[0])
    if not rope:
        rope = dict(written[1])
        rope["rope_theta"] = _field(config, "rope_theta", 10000.0)
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    return rope


def _refuse_sliding_windows(config: Any, model_type: str) -> None:
    window = _field(config, "sliding_window")
    if model_type in ("qwen2", "qwen3"):  # these carry a window size that only `use_sliding_window` switches on
        window = window if _field(config, "use_sliding_window", False) else None
    layers = {str(kind) for kind in _layer_types(config) if kind != "full_attention"}
    if window is not None or layers:
        found = f"sliding_window={window}" if window is not None else f"layer_types with {sorted(layers)}"
        raise HeadError(
            f"this base limits attention ({found}), but the diffusion view must see the whole prefix. Use a base with "
            "full attention in every layer, or set `sliding_window` to null in its config.json if no context will ever "
            "be longer than the window."
        )


def _layer_types(config: Any) -> Sequence[Any]:
    kinds = _field(config, "layer_types", ())
    if not isinstance(kinds, list | tuple):
        raise HeadError(f"layer_types={kinds!r} must be a list with one name for each layer.")
    return kinds


def _count(config: Any, name: str, default: int | None = None, most: int = 2**31) -> int:
    value = _field(config, name, default)
    if type(value) is not int or not 0 < value <= most:
        raise HeadError(f"the base's config has {name}={value!r}, which must be a whole number from 1 to {most}.")
    return value


def _field(config: Any, name: str, default: Any = None) -> Any:
    """One field of a base config, given as a transformers config object or as a parsed `config.json`."""
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return default if value is None else value
