"""From files or datasets to token ids, and which of them are the answer: what the head learns to draft."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from vllm_orthrus.training.config import ConfigError, DataConfig

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")


class Sample(NamedTuple):
    tokens: list[int]
    answer: list[bool]  # per token


def read_records(config: DataConfig) -> Iterator[Mapping[str, Any]]:
    """The raw records of a source, one mapping of columns at a time."""
    return islice(_records(config), config.limit)


def _records(config: DataConfig) -> Iterator[Mapping[str, Any]]:
    path = Path(config.source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise ConfigError(f"data.source={config.source} has no file that ends in {', '.join(SUFFIXES)}.")
        for file in files:
            yield from _read_file(file, config)
    elif path.exists():
        yield from _read_file(path, config)
    elif path.suffix in SUFFIXES or len(path.parts) > 2:
        raise ConfigError(f"data.source={config.source} does not exist. Give a file, a folder or a dataset's name.")
    else:
        yield from _read_hub(config)


def _read_file(path: Path, config: DataConfig) -> Iterator[Mapping[str, Any]]:
    if path.suffix == ".jsonl":
        yield from read_jsonl(path)
    elif path.suffix == ".json":
        records = json.loads(path.read_text())
        if not isinstance(records, list):
            raise ConfigError(f"{path} must hold a JSON list of samples; for one sample per line call it .jsonl.")
        yield from records
    elif path.suffix == ".parquet":
        import pyarrow.parquet as parquet  # heavy, and only this format needs it

        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    elif path.suffix == ".txt":
        # Paragraphs are the unit that is shuffled and packed.
        yield from ({config.text_column: part} for part in path.read_text().split("\n\n") if part.strip())
    else:
        raise ConfigError(f"data.source={path} has an unknown ending; known are {', '.join(SUFFIXES)}.")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}, line {number}: not JSON ({error}). Write one object per line.") from error
            if not isinstance(record, dict):
                raise ConfigError(f"{path}, line {number}: must be an object with columns, not {line.strip()[:40]!r}.")
            yield record


def _read_hub(config: DataConfig) -> Iterator[Mapping[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            f"data.source={config.source} looks like a dataset's name, which needs `datasets`: "
            "pip install 'vllm-orthrus[train]'."
        ) from error
    try:
        yield from load_dataset(config.source, config.subset, split=config.split, streaming=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.source={config.source} (subset {config.subset}, split {config.split}) is neither a file here nor a "
            f"dataset that can be loaded: {error}"
        ) from error


class Encoder(NamedTuple):
    """Turns a record into tokens, chat template and all."""

    tokenizer: PreTrainedTokenizerBase
    config: DataConfig

    def encode(self, record: Mapping[str, Any]) -> Sample:
        columns = self.config
        if "answer_token_ids" in record:  # written by `vllm-orthrus answers`: exactly what the model said
            prompt, answer = list(record["prompt_token_ids"]), list(record["answer_token_ids"])
            return Sample(prompt + answer, [False] * len(prompt) + [True] * len(answer))
        if record.get(columns.messages_column):
            return self._chat(record[columns.messages_column])
        if columns.prompt_column in record and columns.answer_column in record:
            prompt, answer = record[columns.prompt_column], record[columns.answer_column]
            return self._chat([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])
        if columns.text_column in record:
            tokens = self.tokenizer(record[columns.text_column], add_special_tokens=False)["input_ids"]
            tokens = [*tokens, self._end()]
            return Sample(tokens, [True] * len(tokens))
        raise ConfigError(
            f"data.source={columns.source}: a sample has the columns {sorted(record)}, but none of "
            f"{columns.messages_column!r} (a chat), {columns.prompt_column!r} with {columns.answer_column!r}, or "
            f"{columns.text_column!r}. Name the right ones with data.messages_column, data.prompt_column, "
            "data.answer_column or data.text_column."
        )

    def _chat(self, messages: Sequence[Mapping[str, str]]) -> Sample:
        if messages[-1]["role"] != "assistant":
            raise ConfigError(
                f"data.source={self.config.source}: a chat ends with role {messages[-1]['role']!r}; there is no answer "
                "to learn. Let chats end with the assistant, or make answers with `vllm-orthrus answers`."
            )
        if not self.tokenizer.chat_template:
            plain = "".join(f"{message['content']}\n" for message in messages[:-1])
            return self._after(self._plain(plain), messages[-1]["content"])
        if "{% generation" in self.tokenizer.chat_template or "{%- generation" in self.tokenizer.chat_template:
            encoded = self.tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return Sample(list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]])
        # Without generation marks only the last answer can be told apart, exactly as serving would prompt for it.
        return self._after(prompt_tokens(self.tokenizer, messages[:-1]), messages[-1]["content"])

    def _after(self, prompt: list[int], answer: str) -> Sample:
        tokens = [*self._plain(answer), self._end()]
        return Sample(prompt + tokens, [False] * len(prompt) + [True] * len(tokens))

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _end(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ConfigError("the base's tokenizer has no eos_token, so answers would have no end. Set one.")
        return int(self.tokenizer.eos_token_id)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """A chat as the server would put it to the model: up to where the answer begins."""
    encoded = tokenizer.apply_chat_template(list(messages), tokenize=True, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A single question: as a chat if the base has a chat template, else as it stands."""
    if tokenizer.chat_template:
        return prompt_tokens(tokenizer, [{"role": "user", "content": text}])
    return list(tokenizer(text)["input_ids"])
