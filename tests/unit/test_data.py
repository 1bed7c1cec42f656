"""From records to packed rows: which tokens are answers, and what bad data is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_orthrus.training.config import ConfigError, DataConfig, TrainConfig
from vllm_orthrus.training.packing import PackedRows, prepare_rows
from vllm_orthrus.training.samples import Encoder, read_records

MASK = 3
EXCHANGE = {"prompt": "Count from 1 to 4.", "answer": "1, 2, 3, 4"}
CHAT = {
    "messages": [
        {"role": "user", "content": "Say a."},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "Say b."},
        {"role": "assistant", "content": "b"},
    ]
}


def encoder(tokenizer: Any, **settings: Any) -> Encoder:
    return Encoder(tokenizer, DataConfig(source="here", **settings))


def answer_text(tokenizer: Any, sample: Any) -> str:
    return str(tokenizer.decode([token for token, flag in zip(*sample, strict=True) if flag]))


def test_only_answers_are_learned(tokenizer: Any) -> None:
    sample = encoder(tokenizer).encode(EXCHANGE)
    assert answer_text(tokenizer, sample).startswith("1, 2, 3, 4<|im_end|>")
    assert "Count from 1 to 4." in tokenizer.decode(sample.tokens)
    assert not sample.answer[0] and not any(sample.answer[:5])


def test_every_assistant_turn_is_learned(tokenizer: Any) -> None:
    text = answer_text(tokenizer, encoder(tokenizer).encode(CHAT))
    assert text.replace("\n", "") == "a<|im_end|>b<|im_end|>"


def test_template_without_generation_marks_learns_the_last_answer(tokenizer: Any) -> None:
    import copy

    plain = copy.deepcopy(tokenizer)
    plain.chat_template = plain.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    plain.chat_template = plain.chat_template.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    assert "generation %}" not in plain.chat_template
    sample = encoder(plain).encode(CHAT)
    assert answer_text(plain, sample) == "b<|im_end|>"
    assert "Say a." in plain.decode(sample.tokens)


def test_plain_text_is_learned_throughout(tokenizer: Any) -> None:
    sample = encoder(tokenizer).encode({"text": "def f():\n    return 1"})
    assert all(sample.answer) and sample.tokens[-1] == tokenizer.eos_token_id


def test_recorded_tokens_are_taken_as_they_are(tokenizer: Any) -> None:
    sample = encoder(tokenizer).encode({**EXCHANGE, "prompt_token_ids": [9, 8], "answer_token_ids": [7, 7, 2]})
    assert sample.tokens == [9, 8, 7, 7, 2] and sample.answer == [False, False, True, True, True]


def test_columns_can_be_named(tokenizer: Any) -> None:
    named = encoder(tokenizer, prompt_column="question", answer_column="reply")
    assert named.encode({"question": "Count from 1 to 4.", "reply": "1, 2, 3, 4"}) == encoder(tokenizer).encode(
        EXCHANGE
    )


def test_every_file_format_gives_the_same_records(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    import pyarrow
    from pyarrow import parquet

    records = [{**EXCHANGE, "number": str(i)} for i in range(5)]
    jsonl = write_jsonl(*records)
    (tmp_path / "data.json").write_text(json.dumps(records))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "data.parquet")
    for path in (jsonl, tmp_path / "data.json", tmp_path / "data.parquet"):
        assert list(read_records(DataConfig(source=str(path)))) == records
        assert len(list(read_records(DataConfig(source=str(path), limit=2)))) == 2
    assert len(list(read_records(DataConfig(source=str(tmp_path))))) == 15, "a folder is all of its files"
    (tmp_path / "data.txt").write_text("one\nparagraph\n\nand another\n")
    assert [r["text"] for r in read_records(DataConfig(source=str(tmp_path / "data.txt")))] == [
        "one\nparagraph",
        "and another\n",
    ]


def pack(source: Path, tokenizer: Any, folder: Path, **settings: Any) -> PackedRows:
    config = DataConfig(source=str(source), row_length=settings.pop("row_length", 48), **settings)
    return prepare_rows(config, tokenizer, MASK, folder, show_progress=False)


def test_packing_keeps_every_sample_whole_and_in_order(
    tokenizer: Any, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    records = [{"prompt": f"p{i}", "answer": f"answer {i} " + "x " * (i % 4)} for i in range(30)]
    source = write_jsonl(*records)
    rows = pack(source, tokenizer, tmp_path / "packed")
    expected = [encoder(tokenizer).encode(record) for record in records]
    found = []
    for tokens, document, answer in zip(*rows, strict=True):
        assert (
            (np.diff(document[document > 0]) >= 0).all() and (document[np.argmin(document) :] == 0).all()
        ) or 0 not in document
        for number in range(1, document.max() + 1):
            found.append((tokens[document == number].tolist(), answer[document == number].tolist()))
    assert found == [(sample.tokens, sample.answer) for sample in expected]
    assert rows.tokens.shape[1] == 48 and len(rows) < 30


def test_packing_is_done_once(tokenizer: Any, tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    source = write_jsonl(EXCHANGE)
    first = pack(source, tokenizer, tmp_path / "packed")
    written = (tmp_path / "packed").glob("*/tokens.npy").__next__().stat().st_mtime_ns
    second = pack(source, tokenizer, tmp_path / "packed")
    assert np.array_equal(first.tokens, second.tokens)
    assert (tmp_path / "packed").glob("*/tokens.npy").__next__().stat().st_mtime_ns == written
    source.write_text(json.dumps({**EXCHANGE, "answer": "something else"}) + "\n")
    third = pack(source, tokenizer, tmp_path / "packed")
    assert not np.array_equal(first.tokens, third.tokens), "changed data must not be answered from the old rows"


def test_long_samples_are_cut_and_empty_answers_skipped(
    tokenizer: Any, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    source = write_jsonl({"prompt": "p", "answer": "word " * 300}, {"prompt": "long " * 300, "answer": "never seen"})
    rows = pack(source, tokenizer, tmp_path / "packed")
    assert len(rows) == 1 and (rows.document == 1).all()
    summary = json.loads(next((tmp_path / "packed").glob("*/done.json")).read_text())
    assert summary == {"rows": 1, "samples": 2, "skipped": 1, "cut": 2}


# What bad data is told


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no samples"),
        ([{"question": "?"}], r"columns \['question'\], but none of 'messages'.*data.prompt_column"),
        (["{not json"], r"line 1: not JSON"),
        (["[1, 2]"], r"line 1: must be an object"),
        ([{"messages": [{"role": "user", "content": "hm"}]}], "ends with role 'user'"),
        ([{"prompt": "p", "answer": "a <|mask|> b"}], r"mask_token_id=3 occurs in sample 1"),
    ],
)
def test_bad_data_says_what_to_change(
    lines: list[Any], message: str, tokenizer: Any, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError, match=message):
        pack(write_jsonl(*lines), tokenizer, tmp_path / "packed")


def test_missing_source_is_named(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.jsonl does not exist"):
        pack(tmp_path / "nothing.jsonl", tokenizer, tmp_path / "packed")
    (tmp_path / "odd.csv").write_text("a,b")
    with pytest.raises(ConfigError, match="unknown ending"):
        pack(tmp_path / "odd.csv", tokenizer, tmp_path / "packed")


# Settings


def test_settings_are_checked_when_read(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("base: b\noutput: o\ndata: {source: s}\n")
    assert TrainConfig.read(path, ["run.max_steps=7", "optimizer.learning_rate=1e-3"]).run.max_steps == 7
    for override, message in {
        "run.max_stepz=7": r"run.max_stepz: Extra inputs",
        "run.max_steps=0": r"run.max_steps: Input should be greater than 0",
        "head.block_size=4096": r"head.block_size=4096 must be smaller than data.row_length=2048",
        "nonsense": r"must look like",
    }.items():
        with pytest.raises(ConfigError, match=message):
            TrainConfig.read(path, [override])
    with pytest.raises(ConfigError, match="is not a file"):
        TrainConfig.read(tmp_path / "absent.yaml")


def test_defaults_are_the_published_recipe() -> None:
    config = TrainConfig(base="b", output=Path("o"), data=DataConfig(source="s"))
    assert (config.head.block_size, config.objective.anchors_per_row, config.data.row_length) == (32, 256, 2048)
    assert (config.run.rows_per_step, config.run.epochs, config.objective.kind) == (128, 2.0, "kl")
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (2e-4, (0.9, 0.95), 0.0)
    assert (optimizer.final_ratio, optimizer.warmup, optimizer.clip) == (0.1, 0.05, 1.0)
