"""Between the two layouts of a head: out of a merged checkpoint, or beside its base into one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vllm_orthrus.heads import (
    WEIGHTS,
    WEIGHTS_INDEX,
    BaseRef,
    HeadCheckpoint,
    HeadConfig,
    HeadError,
    is_head_tensor,
    save_head,
    write_json,
    write_tensors,
)

HEAD_SHARD = "model-diff.safetensors"


def extract_head(
    checkpoint: HeadCheckpoint, folder: Path, base: str | None, revision: str | None, dtype: torch.dtype | None = None
) -> HeadConfig:
    """Write the head of a checkpoint of either layout alone; `base` and `revision` say which base it belongs to."""
    name = base or checkpoint.config.base.name
    if name is None:
        raise HeadError(f"{checkpoint.source} doesn't say which base it was trained for. Name it with --base.")
    ref = BaseRef(name, revision or checkpoint.config.base.revision, checkpoint.config.base.fingerprint)
    config = HeadConfig(
        checkpoint.config.block_size,
        checkpoint.config.mask_token_id,
        ref,
        checkpoint.config.shape,
        checkpoint.config.base_config,
    )
    save_head(folder, {key: tensor.to(dtype or tensor.dtype) for key, tensor in checkpoint.tensors()}, config)
    return config


def merge_head(checkpoint: HeadCheckpoint, base: Path, folder: Path) -> None:
    """Write base and head as one checkpoint in the published layout.

    The base's files are linked where the file system allows it, else copied; none of its weights are loaded. The head
    becomes one more shard.
    """
    base_config: dict[str, Any] = json.loads((base / "config.json").read_text())
    checkpoint.config.check_fits(base_config, str(base))
    if folder.exists() and any(folder.iterdir()):
        raise HeadError(f"{folder} is not empty. Name a new folder for the merged checkpoint.")
    folder.mkdir(parents=True, exist_ok=True)
    shard_of = _shards(base)
    for file in sorted(base.iterdir()):
        if file.is_file() and file.name not in ("config.json", WEIGHTS_INDEX):
            _link_or_copy(file, folder / file.name)
    tensors = dict(checkpoint.tensors())
    write_tensors(folder / HEAD_SHARD, tensors)
    shard_of |= dict.fromkeys(tensors, HEAD_SHARD)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": size}, "weight_map": shard_of})
    extra = {"block_size": checkpoint.config.block_size, "mask_token_id": checkpoint.config.mask_token_id}
    write_json(folder / "config.json", {**base_config, "architectures": ["OrthrusLM"], **extra})


def _shards(base: Path) -> dict[str, str]:
    """Which file of a base holds which tensor."""
    index, weights = base / WEIGHTS_INDEX, base / WEIGHTS
    if index.is_file():
        shard_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
    elif weights.is_file():
        with safe_open(weights, framework="pt") as shard:
            shard_of = dict.fromkeys(shard.keys(), WEIGHTS)
    else:
        raise HeadError(f"{base} has neither {WEIGHTS} nor {WEIGHTS_INDEX}: only safetensors bases can be merged.")
    if any(map(is_head_tensor, shard_of)):
        raise HeadError(f"{base} already holds a head. Give the stock base.")
    return shard_of


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
