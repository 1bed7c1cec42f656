"""Checkpoints of a run: a servable head beside the optimizer's state. One exists whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_orthrus.heads import HeadConfig, open_head, save_head, write_json
from vllm_orthrus.training.config import ConfigError, TrainConfig
from vllm_orthrus.training.views import DiffusionHead

OPTIMIZER = "optimizer.pt"
STATE = "state.json"
# Settings that may change between the parts of a resumed run without changing what it computes.
_FREE: Any = {
    "output": True,
    "run": {"max_minutes", "checkpoint_every", "keep_checkpoints", "log_every", "attention", "recompute"},
    "evaluation": True,
}


class Progress(NamedTuple):
    """How far a run has come; with the settings, this determines everything that follows."""

    step: int
    tokens: int
    seconds: float


def save(
    folder: Path,
    progress: Progress,
    head: dict[str, torch.Tensor],
    head_config: HeadConfig,
    optimizer: dict[str, Any],
    config: TrainConfig,
) -> Path:
    """Write `folder/step-N`, then remove all but the newest `keep_checkpoints`."""
    target = folder / f"step-{progress.step:07d}"
    unfinished = folder / f".{target.name}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    save_head(unfinished, head, head_config)
    torch.save(optimizer, unfinished / OPTIMIZER)
    write_json(unfinished / STATE, {**progress._asdict(), "settings": _binding(config)})
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
    for old in _all(folder)[: -config.run.keep_checkpoints]:
        shutil.rmtree(old)
    return target


def newest(folder: Path) -> Path | None:
    checkpoints = _all(folder)
    return checkpoints[-1] if checkpoints else None


def restore(path: Path, config: TrainConfig, head: DiffusionHead) -> tuple[Progress, dict[str, Any]]:
    """Load the head's weights; returns how far the run had come and the optimizer's state."""
    state = json.loads((path / STATE).read_text())
    then, now = _flat(state.pop("settings")), _flat(_binding(config))
    changed = [f"{key} ({then.get(key)} -> {now.get(key)})" for key in {*then, *now} if then.get(key) != now.get(key)]
    if changed:
        raise ConfigError(
            f"cannot resume from {path}: settings changed: {', '.join(sorted(changed))}. Set them back, or start a new "
            "run with another `output` and `head.initial` pointing at this checkpoint."
        )
    head.load_published(dict(open_head(path).tensors()))
    return Progress(**state), torch.load(path / OPTIMIZER, weights_only=True)


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _binding(config: TrainConfig) -> dict[str, Any]:
    """The settings that determine the run."""
    return config.model_dump(mode="json", exclude=_FREE)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
