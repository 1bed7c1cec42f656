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
from vllm_orthrus.heads.tensors import check_tensors


def save_head(folder: Path, tensors: Mapping[str, torch.Tensor], config: HeadConfig) -> None:
    """Write a head-only checkpoint, after checking that it is complete. The weights appear whole or not at all."""
    check_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config.shape, str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    dtype = next(iter(tensors.values())).dtype
    write_json(folder / CONFIG, config.to_json(dtype))
    write_tensors(folder / WEIGHTS, tensors)


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
