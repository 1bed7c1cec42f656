"""Writing a head, and the files of checkpoints in general."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_orthrus.heads.config import HeadConfig
from vllm_orthrus.heads.files import CONFIG, WEIGHTS
from vllm_orthrus.heads.quantize import FP8
from vllm_orthrus.heads.tensors import SCALE, check_tensors


def save_head(folder: Path, tensors: Mapping[str, torch.Tensor], config: HeadConfig) -> None:
    """Write a head-only checkpoint, after checking that it is complete. The weights appear whole or not at all."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_tensors(shapes, config.shape, str(folder), config.quantization is not None)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, config.to_json(_dtype(tensors)))
    write_tensors(folder / WEIGHTS, tensors)


def _dtype(tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    """Of what is not quantized, if anything."""
    plain = [tensor.dtype for name, tensor in tensors.items() if tensor.dtype != FP8 and not name.endswith(f".{SCALE}")]
    return plain[0] if plain else torch.bfloat16


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file whole or not at all, readable to whom any new file here is readable."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.touch()
    mode = unfinished.stat().st_mode
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, unfinished, metadata={"format": "pt"})
    unfinished.chmod(mode)  # safetensors makes files that only their owner can read; servers often run as another user
    unfinished.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
