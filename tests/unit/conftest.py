"""Tiny random bases of every supported shape, with heads that are copies, or noisy copies, of their attention."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vllm_orthrus.heads import HeadConfig
from vllm_orthrus.training.reference import Reference
from vllm_orthrus.training.views import DiffusionHead

TINY = Path(__file__).parents[2] / "examples" / "tiny-orthrus"

SHAPES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-biased": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 24, "attention_bias": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-biased": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}


@pytest.fixture(autouse=True, scope="session")
def _threads() -> Iterator[None]:
    torch.set_num_threads(min(2, torch.get_num_threads()))
    yield


def make_base(shape: str = "qwen3", vocab_size: int = 128, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Large random weights, so that greedy output is diverse and no two logits are nearly equal."""
    torch.manual_seed(seed)
    config_class, model_class, extra = SHAPES[shape]
    config = config_class(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.3,
            "eos_token_id": None,
            "bos_token_id": None,
            **extra,
            **changes,
        }
    )
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # initialised to zero, which would hide a bias that is left out
            parameter.data.normal_(std=0.3)
    return model


def make_head(base: PreTrainedModel, noise: float = 0.0, seed: int = 1) -> DiffusionHead:
    generator = torch.Generator().manual_seed(seed)
    head = DiffusionHead(base.model.layers, base.dtype)
    for parameter in head.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return head


def make_reference(base: PreTrainedModel, block_size: int = 8, noise: float = 0.1) -> Reference:
    config = HeadConfig.for_base(base.config.to_dict(), block_size, base.config.vocab_size - 1, "test/base")
    return Reference(base, make_head(base, noise), config)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY / "base")


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base with a real tokenizer, saved as transformers saves it."""
    folder = tmp_path_factory.mktemp("base")
    make_base(vocab_size=1024, num_hidden_layers=2).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / "base" / name, folder)
    for template in (TINY / "base").glob("chat_template*"):
        shutil.copy(template, folder)
    return folder


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    import json

    def write(*lines: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return write


@pytest.fixture(scope="module")
def tiny() -> Reference:
    """The trained model that is shipped, and its head."""
    return Reference.from_pretrained(TINY / "base", TINY / "head")
