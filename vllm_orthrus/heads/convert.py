"""From either layout of a head to the other, the head alone or one checkpoint with its base, and to eight bits."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from vllm_orthrus.heads.checkpoint import HeadCheckpoint
from vllm_orthrus.heads.config import BaseRef, HeadConfig
from vllm_orthrus.heads.errors import HeadError
from vllm_orthrus.heads.files import CONFIG, WEIGHTS, WEIGHTS_INDEX, Files
from vllm_orthrus.heads.quantize import Quantization, quantized
from vllm_orthrus.heads.selector import is_selector_tensor
from vllm_orthrus.heads.store import save_head
from vllm_orthrus.heads.store_files import write_json, write_tensors
from vllm_orthrus.heads.tensors import is_head_tensor

HEAD_SHARD = "model-diff.safetensors"


def extract_head(
    checkpoint: HeadCheckpoint, folder: Path, base: str | None, revision: str | None, dtype: torch.dtype | None = None
) -> HeadConfig:
    """Write the head of a checkpoint of either layout alone; `base` and `revision` say which base it belongs to.

    A quantized head stays so, unless there is a dtype for its weights.
    """
    checkpoint.check_complete()
    name = base or checkpoint.config.base.name
    if name is None:
        raise HeadError(f"{checkpoint.source} doesn't say which base it was trained for. Name it with --base.")
    ref = BaseRef(name, revision or checkpoint.config.base.revision, checkpoint.config.base.fingerprint)
    config = replace(checkpoint.config, base=ref)
    if dtype is None:
        save_head(folder, checkpoint.stored_with_selector(), config)
        return config
    config = replace(config, quantization=None)
    stored = checkpoint.stored_with_selector()
    beside = {key: tensor for key, tensor in stored.items() if is_selector_tensor(key)}
    save_head(folder, {key: tensor.to(dtype) for key, tensor in (dict(checkpoint.tensors()) | beside).items()}, config)
    return config


def quantize_head(checkpoint: HeadCheckpoint, folder: Path, quantization: Quantization) -> None:
    """Write the head of a checkpoint alone, its projections in eight bits."""
    checkpoint.check_complete()
    _refuse_to_overwrite(folder)
    save_head(folder, *_as_stored(checkpoint, quantization))


def _as_stored(
    checkpoint: HeadCheckpoint, quantization: Quantization | None
) -> tuple[dict[str, torch.Tensor], HeadConfig]:
    """quantization: what is to become of a head that has none."""
    config = checkpoint.config
    if quantization is None or config.quantization is not None:
        return checkpoint.stored_with_selector(), config
    return dict(quantized(checkpoint.stored_with_selector().items())), replace(config, quantization=quantization)


def merge_head(checkpoint: HeadCheckpoint, base: Path, folder: Path, quantization: Quantization | None = None) -> None:
    """Write base and head as one checkpoint in the published layout. quantization: of the head, never of the base.

    The base's files are linked where the file system allows it, else copied; none of its weights are loaded. The head
    becomes one more shard.
    """
    if not base.is_dir():
        raise HeadError(f"the base {base} is not a folder here. Download it first and give its folder.")
    base_config = Files(str(base)).config()
    checkpoint.check_complete()
    checkpoint.config.check_fits(base_config, str(base))
    _refuse_to_overwrite(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shard_of = _shards(base)
    for file in sorted(base.iterdir()):
        if file.is_file() and file.name not in (CONFIG, WEIGHTS_INDEX):
            _link_or_copy(file, folder / file.name)
    tensors, config = _as_stored(checkpoint, quantization)
    write_tensors(folder / HEAD_SHARD, tensors)
    shard_of |= dict.fromkeys(tensors, HEAD_SHARD)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": size}, "weight_map": shard_of})
    extra = {"block_size": config.block_size, "mask_token_id": config.mask_token_id, **config.extras_json()}
    write_json(folder / CONFIG, {**base_config, "architectures": ["OrthrusLM"], **extra})


def _refuse_to_overwrite(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise HeadError(f"{folder} is not empty. Name a new folder for the converted checkpoint.")


def _shards(base: Path) -> dict[str, str]:
    """Which file of a base holds which tensor."""
    shard_of = Files(str(base)).file_of()
    if not shard_of:
        raise HeadError(f"{base} has neither {WEIGHTS} nor {WEIGHTS_INDEX}: only safetensors bases can be merged.")
    if any(map(is_head_tensor, shard_of)):
        raise HeadError(f"{base} already holds a head. Give the stock base.")
    return shard_of


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
