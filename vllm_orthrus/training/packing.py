"""Samples packed into rows of equal length, kept on disk so that a corpus may be larger than memory."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from vllm_orthrus.training.blocks import Rows
from vllm_orthrus.training.config import ConfigError, DataConfig
from vllm_orthrus.training.samples import Encoder, Sample, read_records

logger = logging.getLogger(__name__)

_COLUMNS = {"tokens": np.int32, "document": np.int16, "answer": np.bool_}


class PackedRows(NamedTuple):
    """[rows, row_length] arrays, memory-mapped."""

    tokens: NDArray[np.int32]
    document: NDArray[np.int16]
    answer: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, indices: list[int]) -> Rows:
        tokens, document, answer = (torch.from_numpy(np.ascontiguousarray(column[indices])) for column in self)
        return Rows(tokens.long(), document.long(), answer)


def prepare_rows(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, mask_token_id: int, folder: Path, show_progress: bool
) -> PackedRows:
    """Encode and pack a data source once; later calls with the same settings and source find the result in `folder`."""
    key = _key(config, tokenizer)
    target = folder / key
    if not (target / "done.json").is_file():
        target.mkdir(parents=True, exist_ok=True)
        encoder = Encoder(tokenizer, config)
        records = tqdm(read_records(config), "encoding samples", unit=" samples", disable=not show_progress)
        packer = _Packer(target, config.row_length, mask_token_id)
        packer.add_all(map(encoder.encode, records))
        packer.finish(config.source)
    return PackedRows(*(np.load(target / f"{name}.npy", mmap_mode="r") for name in _COLUMNS))


def _key(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    source = Path(config.source)
    files = sorted(source.iterdir()) if source.is_dir() else [source] if source.exists() else []
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    facts = [config.model_dump(), state, tokenizer.name_or_path, len(tokenizer), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


class _Packer:
    """Fills one row after the other; a sample that does not fit into what is left starts a new row."""

    def __init__(self, folder: Path, row_length: int, mask_token_id: int) -> None:
        self.folder, self.row_length, self.mask_token_id = folder, row_length, mask_token_id
        self.files = {name: (folder / f"{name}.raw").open("wb") for name in _COLUMNS}
        self.rows = self.samples = self.skipped = self.cut = 0
        self._new_row()

    def _new_row(self) -> None:
        self.row: dict[str, NDArray[Any]] = {name: np.zeros(self.row_length, dtype) for name, dtype in _COLUMNS.items()}
        self.filled = self.documents = 0

    def add_all(self, samples: Iterable[Sample]) -> None:
        for sample in samples:
            self._add(sample)

    def _add(self, sample: Sample) -> None:
        self.samples += 1
        if self.mask_token_id in sample.tokens:
            raise ConfigError(
                f"head.mask_token_id={self.mask_token_id} occurs in sample {self.samples} of the data. Choose a token "
                "that never occurs in text, or remove it from the data."
            )
        tokens, answer = sample.tokens[: self.row_length], sample.answer[: self.row_length]
        self.cut += len(tokens) < len(sample.tokens)
        if sum(answer) < 2:  # nothing for even one row of a block to learn
            self.skipped += 1
            return
        if self.filled + len(tokens) > self.row_length:
            self._write_row()
        self.documents += 1
        part = slice(self.filled, self.filled + len(tokens))
        self.row["tokens"][part], self.row["answer"][part], self.row["document"][part] = tokens, answer, self.documents
        self.filled += len(tokens)

    def _write_row(self) -> None:
        for name, file in self.files.items():
            file.write(self.row[name].tobytes())
        self.rows += 1
        self._new_row()

    def finish(self, source: str) -> None:
        if self.filled:
            self._write_row()
        for file in self.files.values():
            file.close()
        if self.rows == 0:
            found = (
                f"{self.samples} samples, none with an answer of two tokens or more" if self.samples else "no samples"
            )
            raise ConfigError(f"data.source={source} has {found}. Give data with answers to learn.")
        for name, dtype in _COLUMNS.items():
            raw = self.folder / f"{name}.raw"
            column = np.memmap(raw, dtype=dtype, mode="r", shape=(self.rows, self.row_length))
            np.save(self.folder / f"{name}.npy", column)
            raw.unlink()
        summary = {"rows": self.rows, "samples": self.samples, "skipped": self.skipped, "cut": self.cut}
        logger.info("packed %s", ", ".join(f"{count} {what}" for what, count in summary.items()))
        (self.folder / "done.json").write_text(json.dumps(summary))
