"""The files of a checkpoint, in a local folder or in a Hugging Face repository."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from vllm_orthrus.heads.errors import HeadError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises `HeadError` for anything else, and for what is not JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HeadError(f"{path} cannot be read ({error.strerror}). Let the user that serves read it.") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested beyond reason
        raise HeadError(f"{path} is not JSON ({error}). Copy or download it anew.") from error
    if not isinstance(content, dict):
        raise HeadError(f"{path} holds {type(content).__name__}, not a JSON object. Copy or download it anew.")
    return content


@contextmanager
def open_tensors(path: Path, device: str | torch.device = "cpu") -> Iterator[Any]:
    """A safetensors file; raises `HeadError` if it, or a tensor read from it meanwhile, is damaged."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as tensors:
            yield tensors
    except OSError as error:
        raise HeadError(f"{path} cannot be read ({error}). Let the user that serves read it.") from error
    except SafetensorError as error:
        raise HeadError(f"{path} is damaged ({error}). Copy or download it anew.") from error


def _weight_map(index: Path) -> dict[str, str]:
    """Plain names only, so that an index leads nowhere else. Links are followed: those in a folder are its owner's, and
    all files of a Hugging Face cache are links into its store."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise HeadError(f"{index} has no `weight_map` from names to files. Copy or download it anew.")
    for file in set(listed.values()):
        if PurePosixPath(file).name != file or not file.endswith(".safetensors"):
            raise HeadError(
                f"{index} names {file!r}, and a checkpoint's weights are .safetensors files beside their index. "
                "Get the checkpoint from whom you trust."
            )
    return listed


def is_folder(source: str) -> bool:
    try:
        return source != "" and Path(source).is_dir()  # an empty path is the working directory
    except OSError:  # too long for a path, say
        return False


class Files(NamedTuple):
    """A repository's files are downloaded one by one, as they are asked for."""

    source: str
    revision: str | None = None
    cache_dir: str | Path | None = None

    def find(self, name: str) -> Path | None:
        if is_folder(self.source):
            path = Path(self.source) / name
            try:
                return path if path.is_file() else None
            except OSError as error:
                raise HeadError(f"{path} cannot be read ({error.strerror}). Get the checkpoint anew.") from error
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
        return read_json(self.get(CONFIG))

    def file_of(self) -> dict[str, str]:
        """Which file holds which tensor. Empty where there are no safetensors files."""
        index = self.find(WEIGHTS_INDEX)
        if index is not None:
            return _weight_map(index)
        weights = self.find(WEIGHTS)
        if weights is None:
            return {}
        with open_tensors(weights) as tensors:
            return dict.fromkeys(tensors.keys(), WEIGHTS)

    def _download(self, name: str) -> Path | None:
        try:
            return Path(hf_hub_download(self.source, name, revision=self.revision, cache_dir=self.cache_dir))
        except LocalEntryNotFoundError:  # unreachable and not in the cache: says nothing about what the repository has
            if self._cached(name) is _CACHED_NO_EXIST:  # unless an earlier download found that it hasn't
                return None
            if name == WEIGHTS_INDEX and isinstance(self._cached(WEIGHTS), str):  # nor does one file need an index
                return None
            raise
        except EntryNotFoundError:
            return None

    def _cached(self, name: str) -> Any:
        return try_to_load_from_cache(self.source, name, self.cache_dir, self.revision)


def open_files(source: str | Path, revision: str | None, cache_dir: str | Path | None) -> tuple[Files, dict[str, Any]]:
    """The files of a folder or of one commit, and the config among them.

    A branch may move while its files are read, and again before somebody else reads them.
    """
    files = Files(str(source), revision, cache_dir)
    if revision is not None and is_folder(files.source):
        raise HeadError(
            f"revision={revision!r} was given for {files.source}, which is a folder here and has no revisions. Leave "
            "it out, or name the repository."
        )
    config = files.get(CONFIG)
    if not is_folder(files.source):
        files = files._replace(revision=_commit(config) or revision)
    return files, read_json(config)


def _commit(downloaded: Path) -> str | None:
    """A Hugging Face cache keeps the files of each commit in a folder that has its name."""
    found = re.search(r"/snapshots/([0-9a-f]{40,})/", downloaded.as_posix())
    return found and found[1]
