"""Random checkpoints of vLLM's own drafters, for the base of checkpoints.py, with the settings of published ones."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.engine.checkpoints import CONFIG, MASK, VOCAB

# DFlash: after which layers of the target, as many as published heads take; of eight here.
FEATURES = [0, 1, 3, 5, 6]
SHORT_VOCAB = VOCAB // 4  # EAGLE-3: 32,000 of 151,936 tokens in published heads


def write_dflash(folder: Path, layers: int) -> Path:
    """As z-lab/Qwen3-8B-DFlash-b16, which has five layers; embeddings and vocabulary are the target's."""
    hidden = CONFIG["hidden_size"]
    features = {"mask_token_id": MASK, "target_layer_ids": FEATURES}
    config = {"architectures": ["DFlashDraftModel"], "num_hidden_layers": layers, "dflash_config": features}
    tensors = {
        "fc.weight": _weight(hidden, len(FEATURES) * hidden),
        "hidden_norm.weight": torch.ones(hidden),
        "norm.weight": torch.ones(hidden),
    }
    for index in range(layers):
        tensors |= dict(_layer(f"layers.{index}.", hidden))
        for norm in ("q_norm", "k_norm"):
            tensors[f"layers.{index}.self_attn.{norm}.weight"] = torch.ones(CONFIG["head_dim"])
    return _write(folder, config, tensors)


def write_eagle3(folder: Path, layers: int) -> Path:
    """As published for Qwen3-8B: a layer of Llama's on features of three, and a shorter vocabulary of its own."""
    hidden = CONFIG["hidden_size"]
    own = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "mlp_bias": False}
    config = own | {"num_hidden_layers": layers, "draft_vocab_size": SHORT_VOCAB, "tie_word_embeddings": False}
    tensors = {
        "fc.weight": _weight(hidden, 3 * hidden),
        "norm.weight": torch.ones(hidden),
        "lm_head.weight": _weight(SHORT_VOCAB, hidden),
        "d2t": torch.arange(SHORT_VOCAB) * 2,  # the token of the target less its own
    }
    for index in range(layers):
        # The first has the embedding beside the features.
        tensors |= dict(_layer(f"layers.{index}.", hidden * (2 if index == 0 else 1)))
        tensors[f"layers.{index}.hidden_norm.weight"] = torch.ones(hidden)
    return _write(folder, config, tensors)


def _weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) * 0.2


def _layer(name: str, read: int) -> Iterator[tuple[str, torch.Tensor]]:
    """read: width of what its attention projects."""
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    q, kv = (CONFIG[heads] * CONFIG["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
    shapes = {"q": (q, read), "k": (kv, read), "v": (kv, read), "o": (hidden, q)}
    for part, shape in shapes.items():
        yield f"{name}self_attn.{part}_proj.weight", _weight(*shape)
    for part, shape in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
        yield f"{name}mlp.{part}_proj.weight", _weight(*shape)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{name}{norm}.weight", torch.ones(hidden)


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
