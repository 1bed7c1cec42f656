"""A selector: what lets a row of a block know which draft stands before it, beside a head and much smaller.

The rows of a block are independent guesses. Behind the first, a selector scores the likeliest tokens c of a row with
hidden state h anew, once the token d before it is chosen:

    score(c | d) = logit(c) + < (A e(d)) * (G h), B e(c) >        e: the base's embedding; A, G, B: [rank, hidden]

Its three matrices are stored beside the head's tensors, or in a folder or repository of their own:

    model.selector_diff.previous.weight      A
    model.selector_diff.gate.weight          G
    model.selector_diff.candidate.weight     B

with `"head_selector": {"form": "embedded", "rank": ..., "candidates": ...}` in `config.json`. The names have the mark
of a head's tensors, so that a version which doesn't know them refuses such a head instead of drafting without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_orthrus.heads.base import base_fingerprint
from vllm_orthrus.heads.errors import HeadError
from vllm_orthrus.heads.files import CONFIG, WEIGHTS, Files, open_files, open_tensors
from vllm_orthrus.heads.store_files import write_json, write_tensors

SELECTOR = "head_selector"
FORM = "embedded"
SELECTOR_PARTS = ("previous", "gate", "candidate")
DTYPES = ("BF16", "F16", "F32")
MOST_CANDIDATES, MOST_RANK = 64, 1024

_PREFIX = "model.selector_diff."


@dataclass(frozen=True)
class SelectorShape:
    rank: int
    candidates: int  # the likeliest of a row that are scored

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MOST_RANK:
            raise HeadError(f"a selector's rank={self.rank} must be 1 to {MOST_RANK}.")
        if not 2 <= self.candidates <= MOST_CANDIDATES:
            raise HeadError(f"a selector's candidates={self.candidates} must be 2 to {MOST_CANDIDATES}.")

    @classmethod
    def from_json(cls, config: Mapping[str, Any], source: str) -> SelectorShape | None:
        """What a head's or a selector's own `config.json` says of it; None if there is none."""
        written = config.get(SELECTOR)
        if written is None:
            return None
        known = isinstance(written, dict) and written.keys() == {"form", "rank", "candidates"}
        if not known or written["form"] != FORM or any(type(written[key]) is not int for key in ("rank", "candidates")):
            raise HeadError(
                f"{source}: config.json has {SELECTOR}={written!r}, and this version knows selectors such as "
                f'{{"form": "{FORM}", "rank": 64, "candidates": 16}}. Upgrade vllm-orthrus, or serve the head without '
                'by orthrus_selector="off".'
            )
        return cls(written["rank"], written["candidates"])

    def to_json(self) -> dict[str, Any]:
        return {SELECTOR: {"form": FORM, "rank": self.rank, "candidates": self.candidates}}

    def expected(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        return {selector_tensor(part): (self.rank, hidden_size) for part in SELECTOR_PARTS}


def selector_tensor(part: str) -> str:
    return f"{_PREFIX}{part}.weight"


def is_selector_tensor(name: str) -> bool:
    return name.startswith(_PREFIX)


class SelectorCheckpoint(NamedTuple):
    """A selector on disk, beside its head or alone."""

    source: str
    revision: str | None
    shape: SelectorShape
    fingerprint: str | None  # of the base that it was trained for, where it says so itself
    files: Mapping[str, Path]

    def tensors(self, device: str | torch.device = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
        """Each matrix by its part: "previous", "gate", "candidate"."""
        for part in SELECTOR_PARTS:
            name = selector_tensor(part)
            with open_tensors(self.files[name], device) as opened:
                yield part, opened.get_tensor(name)

    def check_fits(self, base_config: Any, hidden_size: int, base_name: str) -> list[str]:
        """Raise unless it is whole and of this base's width; return what else differs, for a warning."""
        expected = self.shape.expected(hidden_size)
        for name in {*expected, *self.files}:
            if name not in self.files:
                raise HeadError(f"{self.source}: the selector lacks {name}. Copy or train it anew.")
            if name not in expected:
                raise HeadError(f"{self.source}: {name} has no place in a selector of this version. Upgrade it.")
            with open_tensors(self.files[name]) as opened:
                found = opened.get_slice(name)
                if found.get_dtype() not in DTYPES:
                    raise HeadError(f"{self.source}: {name} is {found.get_dtype()}, not one of {', '.join(DTYPES)}.")
                if tuple(found.get_shape()) != expected[name]:
                    raise HeadError(
                        f"{self.source}: {name} is {tuple(found.get_shape())}, and {base_name} with a selector of rank "
                        f"{self.shape.rank} needs {expected[name]}. Give a selector that was trained for this base."
                    )
        if self.fingerprint in (None, base_fingerprint(base_config)):
            return []
        return [f"{base_name} isn't the base that the selector {self.source} was trained for: expect less of it."]


def open_selector(
    source: str | Path, revision: str | None = None, cache_dir: str | Path | None = None
) -> SelectorCheckpoint:
    """One in a folder or repository, alone or beside a head."""
    files, config = open_files(source, revision, cache_dir)
    found = selector_in(files, config, files.file_of())
    if found is None:
        raise HeadError(
            f"{source} holds no selector: its config.json has no {SELECTOR}. Give a folder or repository that "
            "`vllm-orthrus train --selector-only` made, or leave orthrus_selector at 'auto'."
        )
    return found


def selector_in(files: Files, config: Mapping[str, Any], file_of: Mapping[str, str]) -> SelectorCheckpoint | None:
    """The selector among the files of a checkpoint."""
    shape = SelectorShape.from_json(config, files.source)
    named = {name: file for name, file in file_of.items() if is_selector_tensor(name)}
    if shape is None:
        if named:
            raise HeadError(
                f"{files.source} holds {min(named)}, and its config.json has no {SELECTOR}. Convert it anew."
            )
        return None
    path_of = {file: files.get(file) for file in set(named.values())}
    fingerprint = config.get("base_fingerprint")
    return SelectorCheckpoint(
        files.source,
        files.revision,
        shape,
        fingerprint if isinstance(fingerprint, str) else None,
        {name: path_of[file] for name, file in named.items()},
    )


def save_selector(folder: Path, parts: Mapping[str, torch.Tensor], shape: SelectorShape, base_config: Any) -> None:
    """Write a selector alone. The weights appear whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "architectures": ["OrthrusSelector"],
        **shape.to_json(),
        "dtype": str(parts[SELECTOR_PARTS[0]].dtype).removeprefix("torch."),
        "base_fingerprint": base_fingerprint(base_config),
    }
    write_json(folder / CONFIG, facts)
    write_tensors(folder / WEIGHTS, named_parts(parts))


def named_parts(parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {selector_tensor(part): parts[part] for part in SELECTOR_PARTS}
