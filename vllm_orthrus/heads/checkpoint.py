"""Reading a head, in either layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from vllm_orthrus.heads.config import QUANTIZATION, HeadConfig, Layout, layout_of
from vllm_orthrus.heads.errors import HeadError
from vllm_orthrus.heads.files import open_files, open_tensors
from vllm_orthrus.heads.quantize import dequantized
from vllm_orthrus.heads.selector import (
    SelectorCheckpoint,
    is_selector_tensor,
    open_selector,
    selector_in,
    selector_tensor,
)
from vllm_orthrus.heads.tensors import SCALE, check_tensors, is_head_tensor, is_projection

DTYPES = ("BF16", "F16", "F32")
EIGHT_BITS = "F8_E4M3"


class HeadCheckpoint(NamedTuple):
    """A head on disk: its facts and the file that holds each tensor. `tensors` reads them."""

    source: str
    revision: str | None  # of a repository the commit, by which it is opened again as it is now
    layout: Layout
    config: HeadConfig
    files: Mapping[str, Path]
    selector: SelectorCheckpoint | None = None  # that lies beside it

    def tensors(self, device: str | torch.device = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
        """Every head tensor by its value, one at a time; quantized ones in float32."""
        return dequantized(self.stored(device))

    def stored(self, device: str | torch.device = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
        """Every head tensor as it is in the files, from just the shards that hold any."""
        by_file: dict[Path, list[str]] = {}
        for name, path in self.files.items():
            by_file.setdefault(path, []).append(name)
        for path, names in by_file.items():
            with open_tensors(path, device) as shard:
                for name in names:
                    yield name, shard.get_tensor(name)

    def stored_with_selector(self) -> dict[str, torch.Tensor]:
        """All that the files hold of the head, to be written elsewhere."""
        beside = () if self.selector is None else self.selector.tensors()
        return {**dict(self.stored()), **{selector_tensor(part): tensor for part, tensor in beside}}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes from the files' headers, without reading the data."""
        found: dict[str, tuple[int, ...]] = {}
        for path in set(self.files.values()):
            with open_tensors(path) as shard:
                for name in (name for name, file in self.files.items() if file == path):
                    tensor = shard.get_slice(name)
                    self._check_dtype(path, name, tensor.get_dtype())
                    found[name] = tuple(tensor.get_shape())
        return found

    def _check_dtype(self, path: Path, name: str, found: str) -> None:
        quantization = self.config.quantization
        allowed: tuple[str, ...] = DTYPES
        if quantization is not None and is_projection(name):
            allowed = (EIGHT_BITS,)
        elif name.endswith(f".{SCALE}"):
            allowed = ("F32",)
        if found not in allowed:
            says = f"says {QUANTIZATION}={quantization!r}" if quantization else f"has no {QUANTIZATION}"
            raise HeadError(
                f"{path}: {name} is stored as {found}; where config.json {says}, it must be {' or '.join(allowed)}. "
                "Convert the head anew."
            )

    def check_complete(self) -> None:
        """Raise unless exactly the tensors that this head's base calls for are there, as floats and in their shapes."""
        check_tensors(self.shapes(), self.config.shape, self.source, self.config.quantization is not None)
        if self.selector is not None:
            self.selector.check_fits(self.config.base_config, self.config.shape.hidden_size, self.source)


def open_head(source: str | Path, revision: str | None = None, cache_dir: str | Path | None = None) -> HeadCheckpoint:
    """Open a head in a local folder or a Hugging Face repository, in either layout.

    From a repository only `config.json`, the index and the shards with `_diff` tensors are downloaded.
    """
    files, config = open_files(source, revision, cache_dir)
    every_file = files.file_of()
    file_of = {name: file for name, file in every_file.items() if is_head_tensor(name) and not is_selector_tensor(name)}
    if not file_of:
        raise HeadError(
            f"{source} holds no `_diff` tensors in .safetensors files. Give a merged or a head-only Orthrus checkpoint."
        )
    path_of = {file: files.get(file) for file in dict.fromkeys(file_of.values())}
    return HeadCheckpoint(
        files.source,
        files.revision,
        layout_of(config),
        HeadConfig.from_json(config, files.source),
        {name: path_of[file] for name, file in file_of.items()},
        selector_in(files, config, every_file),
    )


def find_selector(
    asked: str, head: HeadCheckpoint, revision: str | None = None, cache_dir: str | Path | None = None
) -> SelectorCheckpoint | None:
    """asked: "auto", the head's own if it has one; "off"; or the folder or repository of another."""
    if asked == "off":
        return None
    return head.selector if asked == "auto" else open_selector(asked, revision, cache_dir)


def read_head_config(
    source: str | Path, revision: str | None = None, cache_dir: str | Path | None = None
) -> tuple[HeadConfig, str | None]:
    """A head's facts, without its weights, and the commit that they are of."""
    files, config = open_files(source, revision, cache_dir)
    return HeadConfig.from_json(config, files.source), files.revision
