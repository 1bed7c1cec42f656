"""Which head serves which base."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from vllm_orthrus.heads.errors import HeadError
from vllm_orthrus.heads.files import Files, is_folder
from vllm_orthrus.heads.tensors import is_head_tensor

BUILTIN_HEADS: Mapping[str, str] = {
    "Qwen/Qwen3-1.7B": "chiennv/Orthrus-Qwen3-1.7B",
    "Qwen/Qwen3-4B": "chiennv/Orthrus-Qwen3-4B",
    "Qwen/Qwen3-8B": "chiennv/Orthrus-Qwen3-8B",
}
HEAD_MAP_VARIABLE = "VLLM_ORTHRUS_HEADS"


def resolve_head(base: str) -> str | None:
    """The head for a base: the base itself if its folder carries one, else the user's head map, else the built-in one.

    The user's map is a JSON object `{"base": "head", ...}` in the file named by `VLLM_ORTHRUS_HEADS`, by default
    `~/.config/vllm-orthrus/heads.json`; its entries win over the built-in ones.
    """
    if is_folder(base) and any(map(is_head_tensor, Files(base).file_of())):
        return base
    return {**BUILTIN_HEADS, **_user_heads()}.get(base)


def _user_heads() -> dict[str, str]:
    named = os.environ.get(HEAD_MAP_VARIABLE)
    folder = _settings_folder()
    path = Path(named) if named else folder and folder / "vllm-orthrus" / "heads.json"
    if path is None or not path.is_file():
        if named:
            raise HeadError(f"{HEAD_MAP_VARIABLE}={named} names no file. Point it at a JSON file, or unset it.")
        return {}
    try:
        heads = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HeadError(
            f'{path} is not JSON ({error}). It must hold an object such as {{"my/base": "my/head"}}.'
        ) from error
    if not isinstance(heads, dict) or not all(isinstance(head, str) for head in heads.values()):
        raise HeadError(
            f'{path} must map base names to head names in one JSON object such as {{"my/base": "my/head"}}.'
        )
    return heads


def _settings_folder() -> Path | None:
    """Never a relative one, which would be whatever lies where the server was started."""
    folders = os.environ.get("XDG_CONFIG_HOME") or "", os.path.expanduser("~/.config")  # noqa: PTH111 (pathlib's fails)
    return next((Path(folder) for folder in folders if Path(folder).is_absolute()), None)
