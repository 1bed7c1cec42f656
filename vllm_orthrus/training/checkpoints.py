"""Checkpoints of a run: what it trains, servable, beside the optimizer's state. One exists whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_orthrus.heads import HeadConfig, named_parts, open_head, open_selector, save_head, save_selector, write_json
from vllm_orthrus.training.config import ConfigError, TrainConfig
from vllm_orthrus.training.selector import SelectorWeights
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


class Weights(NamedTuple):
    """What is trained, by its names in files."""

    head: dict[str, torch.Tensor]  # none of a head that stays as it is
    selector: dict[str, torch.Tensor]  # by part; none where there is none

    def to(self, dtype: torch.dtype) -> Weights:
        return Weights(*({name: tensor.to(dtype) for name, tensor in part.items()} for part in self))


def export(folder: Path, weights: Weights, head_config: HeadConfig) -> None:
    """A head, a head with its selector, or a selector alone."""
    if weights.head:
        save_head(folder, {**weights.head, **(named_parts(weights.selector) if weights.selector else {})}, head_config)
    else:
        assert head_config.selector is not None
        save_selector(folder, weights.selector, head_config.selector, head_config.base_config)


def save(
    folder: Path,
    progress: Progress,
    weights: Weights,
    head_config: HeadConfig,
    optimizer: dict[str, Any],
    config: TrainConfig,
) -> Path:
    """Write `folder/step-N`, then remove all but the newest `keep_checkpoints`."""
    target = folder / f"step-{progress.step:07d}"
    unfinished = folder / f".{target.name}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    export(unfinished, weights, head_config)
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


def restore(
    path: Path, config: TrainConfig, head: DiffusionHead, selector: SelectorWeights | None
) -> tuple[Progress, dict[str, Any]]:
    """Load the trained weights; returns how far the run had come and the optimizer's state."""
    state = json.loads((path / STATE).read_text())
    then, now = _flat(state.pop("settings")), _flat(_binding(config))
    changed = [f"{key} ({then.get(key)} -> {now.get(key)})" for key in {*then, *now} if then.get(key) != now.get(key)]
    if changed:
        raise ConfigError(
            f"cannot resume from {path}: settings changed: {', '.join(sorted(changed))}. Set them back, or start a new "
            "run with another `output` and `head.initial` pointing at this checkpoint."
        )
    if config.train != "selector":
        head.load_published(dict(open_head(path).tensors()))
    if selector is not None:
        selector.load(dict(open_selector(path).tensors()))
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
