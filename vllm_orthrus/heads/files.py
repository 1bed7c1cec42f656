"""The files of a checkpoint, in a local folder or in a Hugging Face repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open

from vllm_orthrus.heads.errors import HeadError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


class Files(NamedTuple):
    """A repository's files are downloaded one by one, as they are asked for."""

    source: str
    revision: str | None = None
    cache_dir: str | Path | None = None

    def find(self, name: str) -> Path | None:
        if Path(self.source).is_dir():
            path = Path(self.source) / name
            return path if path.is_file() else None
        try:
            return self._download(name)
        except (OSError, ValueError) as error:
            raise HeadError(
                f"{self.source!r} is neither a folder here nor a repository that can be reached "
                f"({type(error).__name__}: {error}). Check the name, or download it first and give its folder."
            ) from error

    def get(self, name: str) -> Path:
        path = self.find(name)
        if path is None:
            raise HeadError(f"{self.source} has no {name}: a checkpoint needs {CONFIG} and .safetensors files.")
        return path

    def config(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.get(CONFIG).read_text())
        return content

    def file_of(self) -> dict[str, str]:
        """Which file holds which tensor. Empty where there are no safetensors files."""
        index = self.find(WEIGHTS_INDEX)
        if index is not None:
            listed: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return listed
        weights = self.find(WEIGHTS)
        if weights is None:
            return {}
        with safe_open(weights, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), WEIGHTS)

    def _download(self, name: str) -> Path | None:
        try:
            return Path(hf_hub_download(self.source, name, revision=self.revision, cache_dir=self.cache_dir))
        except LocalEntryNotFoundError:  # unreachable and not in the cache: says nothing about what the repository has
            raise
        except EntryNotFoundError:
            return None
