"""What is asked: prompts by class, out of JSONL, a ShareGPT file or a dataset of Hugging Face.

Question files of Spec-Bench, MT-Bench and SPEED-Bench are such JSONL: `question_id`, `category` and `turns`, the first
of which is asked. The package has a few of its own in that form.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_orthrus.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST = 2000  # records of a dataset on Hugging Face
WITHOUT_CLASS = "all"
COLUMNS = "`prompt`, `turns`, `messages` or `conversations`"
SHIPPED = "questions"  # the package's own, by this name
OWN = Path(__file__).with_name("questions.jsonl")


class Prompt(NamedTuple):
    text: str  # as the model reads it
    tokens: list[int]


Classes = dict[str, list[Prompt]]


def read_questions(dataset: str, column: str = "prompt") -> list[tuple[str, str]]:
    """Class and question of each record that asks something, in the order of the dataset."""
    path = OWN if dataset == SHIPPED else Path(dataset)
    if path.suffix == ".jsonl" and path.is_file():
        records: Iterable[Mapping[str, Any]] = _lines(path)
    elif path.suffix == ".json" and path.is_file():
        records = _list(path)
    elif path.exists() or path.suffix in (".json", ".jsonl") or len(path.parts) > 2:
        raise UserError(
            f"--dataset {dataset}: not a file that ends in .jsonl (an object with {COLUMNS} per line) or .json "
            f"(a list, as ShareGPT has it), nor a dataset's name, nor `{SHIPPED}`. Give one of these."
        )
    else:
        records = _hub(dataset)
    found = []
    for number, record in enumerate(records, 1):
        question = _question(record, column)
        if question is None:
            raise UserError(
                f"--dataset {dataset}, record {number}: has {sorted(record)}, but neither text in `{column}` or "
                "`turns` nor a chat in `messages` or `conversations`. Name the right column with --prompt-column."
            )
        if question:  # ShareGPT has chats that hold nothing, or begin with an answer
            found.append((str(record.get("class") or record.get("category") or WITHOUT_CLASS), question))
    if not found:
        raise UserError(f"--dataset {dataset}: holds no prompts. Give one with {COLUMNS}.")
    return found


def render(questions: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, raw: bool) -> Classes:
    """As a server would put them to the model; as they stand if they are raw, or if there is no chat template."""
    classes: Classes = {}
    for kind, question in questions:
        if tokenizer.chat_template and not raw:
            chat = [{"role": "user", "content": question}]
            text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        else:
            text = (tokenizer.bos_token or "") + question if _begins(tokenizer) else question
        tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        classes.setdefault(kind, []).append(Prompt(text, tokens))
    return classes


def _begins(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it puts a token in front of whatever it reads."""
    return bool(tokenizer.bos_token) and list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]


def choose(prompts: Sequence[Prompt], count: int, turn: int, seed: int = 0) -> list[Prompt]:
    """Those of a turn: others each time as long as there are any, and the same for all ways."""
    order = random.Random(seed).sample(range(len(prompts)), len(prompts))
    return [prompts[order[(turn * count + place) % len(prompts)]] for place in range(count)]


def _question(record: Mapping[str, Any], column: str) -> str | None:
    """None is a record without a place for one; an empty text has the place, and nothing in it."""
    for said in (record.get(column), record.get("turns")):
        if isinstance(said, str):
            return said
        # What a second turn asks depends on what was answered to the first.
        if isinstance(said, list) and all(isinstance(turn, str) for turn in said):
            return str(said[0]) if said else ""
    chat = record.get("messages", record.get("conversations"))
    if not isinstance(chat, list):
        return None
    for said in chat:
        if isinstance(said, dict) and said.get("role", said.get("from")) in ("user", "human"):
            return str(said.get("content", said.get("value", "")))
    return ""


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    from vllm_orthrus.training.samples import read_jsonl

    return read_jsonl(path)


def _list(path: Path) -> Iterable[dict[str, Any]]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"--dataset {path}: not JSON ({error}). One object per line belongs into a .jsonl.") from error
    if not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
        raise UserError(f"--dataset {path}: must be a list of objects, as ShareGPT has it.")
    return found


def _hub(name: str) -> Iterable[Mapping[str, Any]]:
    """NAME, NAME:SUBSET or NAME:SUBSET:SPLIT."""
    from vllm_orthrus.training.config import ConfigError, DataConfig
    from vllm_orthrus.training.samples import read_records

    source, subset, split = (*name.split(":"), "", "")[:3]
    try:
        yield from islice(read_records(DataConfig(source=source, subset=subset or None, split=split or "train")), MOST)
    except ConfigError as error:
        raise UserError(f"--dataset {name}: {error} A file serves as well.") from error
