"""`vllm-orthrus bench cascade`: which answers are right, and the figures of what was asked."""

import math
from typing import Any

import pytest

from tests.unit.conftest import TINY
from vllm_orthrus.bench.answers import CHECKS, is_right
from vllm_orthrus.bench.cascade import COLUMNS, LOSSLESS, answers_of, figures, table, to_try
from vllm_orthrus.cascades.choice import read
from vllm_orthrus.cascades.rules import RULES
from vllm_orthrus.training.samples import read_jsonl

WRONG: dict[str, list[str]] = {
    "arithmetic": ["The sum is 49.", "48 is the sum of 3", "", "The sum is"],
    "counting": ["120, 115, 110", "65", "", "120, 115, 110, 105, 100, 95, 90, 85, 80, 75, 70, 65, 60"],
    "json": ['{"city": "Delhi"}', '{"city": "Delhi", ', "", "Delhi"],
    "log": ["[01:14:53] user=quinn GET /mole/moko 200 90", "no log", ""],
}


@pytest.mark.parametrize("kind", CHECKS)
def test_right_and_wrong_answers(kind: str) -> None:
    answers = [one["answer"] for one in read_jsonl(TINY / "heldout.jsonl") if one["class"] == kind]
    assert answers and all(is_right(kind, answer, answer) for answer in answers)
    assert not any(is_right(kind, wrong, answers[0]) for wrong in [*WRONG[kind], answers[1]])


def test_answers_come_by_class_in_the_order_of_the_prompts() -> None:
    found, lines = answers_of(TINY / "heldout.jsonl"), list(read_jsonl(TINY / "heldout.jsonl"))
    assert found == {
        kind: [one["answer"] for one in lines if one["class"] == kind] for kind in {one["class"] for one in lines}
    }
    assert answers_of(TINY / "none.jsonl") == {}


def test_everything_that_is_tried_is_a_cascade() -> None:
    tried = list(to_try(list(RULES), [0.1, 0.9], [2, 3]))
    assert [rule for rule, _, _ in tried] == [rule for rule in RULES for _ in range(2)]
    assert all(read(cascade).rule == rule for rule, _, cascade in tried)
    assert [setting for rule, setting, _ in tried if rule == "relaxed"] == ["k=2", "k=3"]


class Spelling:
    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


def found(said: list[list[int]], **counted: int) -> dict[str, Any]:
    likeliest = [[[(token, math.log(0.5)), (99, math.log(0.4))] for token in text] for text in said]
    return {"said": said, "likeliest": likeliest, "steps": 8, "seconds": 3.0, "counted": counted}


def test_figures() -> None:
    lossless = found([[1, 2, 3, 4], [5, 6, 7, 8]]) | {"seconds": 6.0}
    counted = {"vllm:orthrus_draft_passes": 3, "vllm:orthrus_cascade_departures": 2, "vllm:spec_decode_num_drafts": 5}
    mine = found([[1, 2, 3, 4], [5, 6, 7, 9]], **counted)
    row = figures("chow", "0.5", "counting", mine, lossless, ["1, 2, 3, 4", "5, 6, 7, 8"], Spelling())
    assert tuple(row) == COLUMNS
    assert (row["tokens"], row["forwards"], row["tokens_per_forward"]) == (6, 9, 6 / 9)
    assert (row["seconds"], row["same"], row["right"]) == (0.5, 0.5, 0.5)
    assert row["departed"] == 2 / 6 and row["perplexity"] == pytest.approx(2)
    free = figures(LOSSLESS, "", "prose", lossless, lossless, [], Spelling())
    assert free["right"] is None and free["same"] == free["seconds"] == 1
    lines = table([free, row]).splitlines()
    assert len(lines) == 3 and lines[1].endswith("-") and lines[2].endswith("0.50")
