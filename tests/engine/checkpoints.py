"""Tiny random checkpoints: no training, no network, and greedy output that is not one token for ever."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vllm_orthrus.heads import (
    SELECTOR_PARTS,
    HeadConfig,
    SelectorShape,
    base_tensor_name,
    expected_tensors,
    save_head,
    save_selector,
)

VOCAB = 256
MASK = 255

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "dtype": "float32",
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 1024,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB,
}


def base_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    q, kv = CONFIG["num_attention_heads"] * CONFIG["head_dim"], CONFIG["num_key_value_heads"] * CONFIG["head_dim"]

    def weight(rows: int, columns: int) -> torch.Tensor:
        # Wide enough that logits differ between contexts; Hugging Face's 0.02 would repeat one token.
        return torch.randn(rows, columns, generator=generator) * 0.2

    tensors = {"model.embed_tokens.weight": weight(VOCAB, hidden), "model.norm.weight": torch.ones(hidden)}
    for index in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        tensors |= {
            f"{layer}self_attn.q_proj.weight": weight(q, hidden),
            f"{layer}self_attn.k_proj.weight": weight(kv, hidden),
            f"{layer}self_attn.v_proj.weight": weight(kv, hidden),
            f"{layer}self_attn.o_proj.weight": weight(hidden, q),
            f"{layer}self_attn.q_norm.weight": torch.ones(CONFIG["head_dim"]),
            f"{layer}self_attn.k_norm.weight": torch.ones(CONFIG["head_dim"]),
            f"{layer}mlp.gate_proj.weight": weight(inner, hidden),
            f"{layer}mlp.up_proj.weight": weight(inner, hidden),
            f"{layer}mlp.down_proj.weight": weight(hidden, inner),
            f"{layer}input_layernorm.weight": torch.ones(hidden),
            f"{layer}post_attention_layernorm.weight": torch.ones(hidden),
        }
    return tensors


def head_tensors(base: dict[str, torch.Tensor], noise: float = 0.0) -> dict[str, torch.Tensor]:
    """A head that is an exact copy of the base's attention, or a disturbed one that drafts badly."""
    generator = torch.Generator().manual_seed(1)
    head = {}
    for name in expected_tensors(head_config(block_size=1).shape):
        original = base[base_tensor_name(name)]
        head[name] = original + noise * torch.randn(original.shape, generator=generator)
    return head


def head_config(block_size: int, base: str | None = None) -> HeadConfig:
    return HeadConfig.for_base(CONFIG, block_size, MASK, base)


def write_base(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(base_tensors(seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_head(folder: Path, block_size: int, noise: float = 0.0) -> Path:
    save_head(folder, head_tensors(base_tensors(), noise), head_config(block_size))
    return folder


def write_merged(folder: Path, block_size: int) -> Path:
    """As published: base and head in one checkpoint with remote code; here the head has a shard of its own."""
    folder.mkdir(parents=True)
    merged = CONFIG | {
        "architectures": ["OrthrusLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_orthrus.OrthrusLM"},
        "block_size": block_size,
        "mask_token_id": MASK,
    }
    (folder / "config.json").write_text(json.dumps(merged))
    base = base_tensors()
    shards = {"model-00001-of-00002.safetensors": base, "model-00002-of-00002.safetensors": head_tensors(base)}
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_tokenizer(folder: Path) -> None:
    """One token per byte, for features that need to know what tokens spell."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[-1]).save_pretrained(folder)


def write_with_vocabulary(size: int, block_size: int, folder: Path) -> tuple[Path, Path]:
    """A base and a head with so small a vocabulary that a few hundred samples fill it."""
    here = sys.modules[__name__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIG, "vocab_size", size)
        patch.setattr(here, "VOCAB", size)
        patch.setattr(here, "MASK", size - 1)
        return write_base(folder / "base"), write_head(folder / "head", block_size=block_size, noise=0.1)


def write_selector(folder: Path, hidden_size: int = CONFIG["hidden_size"], candidates: int = 16) -> Path:
    generator = torch.Generator().manual_seed(5)
    parts = {part: torch.randn(8, hidden_size, generator=generator) * 0.5 for part in SELECTOR_PARTS}
    save_selector(folder, parts, SelectorShape(8, candidates), CONFIG)
    return folder
