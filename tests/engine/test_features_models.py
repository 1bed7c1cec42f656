"""Targets of other families and formats: the text of the same target without drafts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from vllm.model_executor.kernels.linear.scaled_mm import cpu as cpu_kernels

from tests.engine.conftest import StartEngine
from tests.engine.harness import prompts
from tests.engine.trained import OPTIONS, TINY, chat, questions, tokens_per_cycle, trained_head
from vllm_orthrus.heads import HeadConfig, base_tensor_name, expected_tensors, save_head
from vllm_orthrus.heads.quantize import quantize as quantize_rows

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}
VOCAB = 256


def write(folder: Path, family: str, **changes: Any) -> tuple[Path, Path]:
    """A random base and a head that copies its attention, so that in blocks of one row every draft is right."""
    torch.manual_seed(0)
    config_class, model_class, extra = FAMILIES[family]
    shape = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    random = {"initializer_range": 0.3, "eos_token_id": None, "bos_token_id": None}
    model = model_class(config_class(**{**shape, **random, **extra, **changes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero from the start, which would hide one that is left out
            parameter.data.normal_(std=0.3)
    base, head = folder / "base", folder / "head"
    model.save_pretrained(base)
    config = HeadConfig.for_base(json.loads((base / "config.json").read_text()), 1, VOCAB - 1, None)
    weights = model.state_dict()
    save_head(head, {name: weights[base_tensor_name(name)].clone() for name in expected_tensors(config.shape)}, config)
    return base, head


def drafts_as_it_speaks(start: StartEngine, base: Path, head: Path) -> None:
    copying = {"method": "orthrus", "model": str(head), "num_speculative_tokens": 1, "orthrus_passes": "two"}
    given = prompts(5)
    drafted, plain = start(copying, base).run(given, 32), start(None, base).run(given, 32)
    assert drafted.tokens == plain.tokens
    assert 0 < drafted.counts.drafted == drafted.counts.accepted
    assert all(len(set(tokens)) > 8 for tokens in plain.tokens), "output too monotonous to prove anything"


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("qwen3", marks=pytest.mark.feature("Qwen3")),
        pytest.param("qwen2", marks=pytest.mark.feature("Qwen2")),
        pytest.param("llama", marks=pytest.mark.feature("Llama")),
        pytest.param("mistral", marks=pytest.mark.feature("Mistral")),
    ],
)
@pytest.mark.feature("untied embeddings")
def test_family(family: str, start: StartEngine, tmp_path: Path) -> None:
    drafts_as_it_speaks(start, *write(tmp_path, family, tie_word_embeddings=False))


@pytest.mark.feature("tied embeddings")
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_tied_embeddings(family: str, start: StartEngine, tmp_path: Path) -> None:
    drafts_as_it_speaks(start, *write(tmp_path, family, tie_word_embeddings=True))


FAST_FP8 = "CPUFp8ChannelWiseScaledMMLinearKernel"
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUP = 64


def eight_bits(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A scale for each row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale.to(torch.bfloat16)}


def four_bits(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A scale for each group of a row, and eight values in a word."""
    groups = weight.view(len(weight), -1, GROUP)
    scale = groups.abs().amax(2, keepdim=True) / 7
    values = (groups / scale).round().view_as(weight).to(torch.int32) + 8
    packed = torch.zeros(len(weight), weight.shape[1] // 8, dtype=torch.int32)
    for place in range(8):
        packed |= values[:, place::8] << (4 * place)
    return {
        "weight_packed": packed,
        "weight_scale": scale[..., 0].to(torch.bfloat16),
        "weight_shape": torch.tensor(weight.shape),
    }


def fp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same in E4M3."""
    stored, scale = quantize_rows(weight)
    return {"weight": stored, "weight_scale": scale}


FLOATS = {"num_bits": 8, "type": "float", "symmetric": True}
FORMATS: dict[
    str, tuple[Callable[[torch.Tensor], dict[str, torch.Tensor]], str, dict[str, Any], dict[str, Any] | None]
] = {
    "int8": (
        eight_bits,
        "int-quantized",
        {"num_bits": 8, "strategy": "channel"},
        {"num_bits": 8, "strategy": "token", "type": "int", "symmetric": True, "dynamic": True},
    ),
    "fp8": (
        fp8,
        "float-quantized",
        {**FLOATS, "strategy": "channel"},
        {**FLOATS, "strategy": "token", "dynamic": True},
    ),
    "int4": (four_bits, "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}, None),
}


def quantize(folder: Path, name: str) -> Path:
    """The tiny base in a format of compressed-tensors."""
    convert, layout, weights, activations = FORMATS[name]
    shutil.copytree(TINY / "base", folder)
    tensors: dict[str, torch.Tensor] = {}
    for full, tensor in load_file(TINY / "base" / "model.safetensors").items():
        module = full.removesuffix(".weight")
        if module.endswith(LINEAR):
            tensors |= {f"{module}.{part}": found for part, found in convert(tensor.float()).items()}
        else:
            tensors[full] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    weights = {"type": "int", "symmetric": True, "dynamic": False} | weights
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def speaks_as_without_drafts(start: StartEngine, passes: str, base: Path, least: float, **options: Any) -> None:
    """least: tokens per cycle, with a head that was trained for the base as it was before, and with that in fp8."""
    plain = start(None, base, **OPTIONS | options)
    given = [chat(plain, question) for question in questions(2)]
    expected = plain.run(given, 48)
    for quantization in (None, "fp8"):
        head = trained_head(passes, orthrus_head_quantization=quantization)
        drafted = start(head, base, **OPTIONS | options).run(given, 48)
        assert drafted.tokens == expected.tokens
        assert tokens_per_cycle(drafted) > least


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("int8", marks=pytest.mark.feature("int8 targets (compressed-tensors, W8A8)")),
        pytest.param("int4", marks=pytest.mark.feature("int4 targets (compressed-tensors, W4A16)")),
        "fp8",
    ],
)
@pytest.mark.parametrize("passes", ["one", "two"])
def test_quantized_target(passes: str, name: str, start: StartEngine, tmp_path: Path) -> None:
    if name == "int8" and torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM multiplies eight bits by this CPU's matrix tiles, and then neither by float32 nor by float16")
    if name == "fp8" and not (torch.cpu._is_amx_tile_supported() and hasattr(cpu_kernels, FAST_FP8)):
        pytest.skip("this vLLM has no kernel for fp8 on this CPU but PyTorch's, which takes minutes for a prompt")
    if name == "int4" and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("vLLM has no kernel for four bits on this CPU, which lacks AVX-512")
    # The kernels for four bits and for fp8 know no float32.
    dtype = {"int8": "float32", "int4": "float16", "fp8": "bfloat16"}[name]
    speaks_as_without_drafts(start, passes, quantize(tmp_path / name, name), least=2.5, dtype=dtype)
