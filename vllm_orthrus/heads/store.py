"""Writing a head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from vllm_orthrus.heads.config import HeadConfig
from vllm_orthrus.heads.errors import HeadError
from vllm_orthrus.heads.files import CONFIG, WEIGHTS
from vllm_orthrus.heads.quantize import FP8
from vllm_orthrus.heads.selector import is_selector_tensor
from vllm_orthrus.heads.store_files import write_json, write_tensors
from vllm_orthrus.heads.tensors import SCALE, check_tensors


def save_head(folder: Path, tensors: Mapping[str, torch.Tensor], config: HeadConfig) -> None:
    """Write a head-only checkpoint, after checking that it is complete. The weights appear whole or not at all.

    tensors: by their names in files, those of a selector among them if the config has one.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_stored(shapes, config, str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, config.to_json(_dtype(tensors)))
    write_tensors(folder / WEIGHTS, tensors)


def check_stored(shapes: Mapping[str, tuple[int, ...]], config: HeadConfig, source: str) -> None:
    """Raise unless these are all the tensors that the config calls for."""
    own = {name: size for name, size in shapes.items() if not is_selector_tensor(name)}
    check_tensors(own, config.shape, source, config.quantization is not None)
    wanted = {} if config.selector is None else config.selector.expected(config.shape.hidden_size)
    found = {name: size for name, size in shapes.items() if is_selector_tensor(name)}
    if found != wanted:
        raise HeadError(f"{source}: a selector has the tensors {wanted}, and here are {found}. Train it anew.")


def _dtype(tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    """Of what is not quantized, if anything."""
    plain = [tensor.dtype for name, tensor in tensors.items() if tensor.dtype != FP8 and not name.endswith(f".{SCALE}")]
    return plain[0] if plain else torch.bfloat16
