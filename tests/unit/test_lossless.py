"""What `vllm-orthrus bench lossless` makes of texts that part, as far as it needs no engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_orthrus.bench import plots
from vllm_orthrus.bench.lossless import Reference, judge, table
from vllm_orthrus.cli.main import main

# Two answers; in the first, at its third token, 30 is nearly as good as 3.
REFERENCE = Reference(
    [[1, 2, 3, 4], [5, 6]],
    [
        [[(1, 9.0), (7, 1.0)], [(2, 9.0), (7, 8.4)], [(3, 9.5), (30, 9.25), (7, 8.0)], [(4, 9.0), (7, 1.0)]],
        [[(5, 9.0), (7, 1.0)], [(6, 9.0), (60, 8.9999)]],
    ],
)
SAME = [[1, 2, 3, 4], [5, 6]]


def judged(text: list[list[int]], bound: float = 0.5, invariant: bool = False) -> dict[str, Any]:
    (found,) = judge(REFERENCE, {("two", 4): text}, bound, invariant)
    return found


def test_equal_texts_part_nowhere() -> None:
    found = judged(SAME)
    assert (found["equal"], found["answers"], found["tokens"], found["partings"]) == (2, 2, 6, [])
    assert found["within"] and found["as_it_must_be"] and judged(SAME, invariant=True)["as_it_must_be"]


def test_a_parting_holds_the_two_best_logits_and_their_gap() -> None:
    found = judged([[1, 2, 30, 9, 9], [5, 6]])
    assert found["partings"] == [
        {
            "answer": 0,
            "place": 2,
            "best": 3,
            "best_logit": 9.5,
            "second": 30,
            "second_logit": 9.25,
            "said": 30,
            "gap": 0.25,
            "within": True,
        }
    ]
    assert found["equal"] == 1 and found["largest_gap"] == 0.25 and found["as_it_must_be"]
    assert found["tokens"] == 5, "what follows a parting answers another question"
    assert found["per_1000_tokens"] == pytest.approx(200)


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ([[1, 2, 30, 9], [5, 6]], 0.2),  # nearly tied, and still further apart than rounding reaches
        ([[1, 2, 7, 9], [5, 6]], 0.5),  # another token than the one that is nearly tied
        ([[1, 2, 99, 9], [5, 6]], 0.5),  # one that isn't even among the likeliest
        ([[1, 9, 3, 4], [5, 6]], 0.5),
        ([[1, 2, 3, 4], [5]], 0.5),  # it merely stops
        ([[1, 2, 3, 4], [5, 6, 7]], 0.5),
    ],
)
def test_what_is_not_tied_is_red(text: list[list[int]], bound: float) -> None:
    found = judged(text, bound)
    assert not found["within"] and not found["as_it_must_be"]
    assert f"NOT within {bound}" in table([found], bound)


def test_with_batch_invariance_nothing_may_part() -> None:
    found = judged([[1, 2, 3, 4], [5, 60]], invariant=True)
    assert found["within"] and not found["as_it_must_be"]
    assert "should make it identical" in table([found], 0.5)


def test_what_plain_decoding_does_itself_is_said() -> None:
    said = {("plain", 4): [[1, 2, 30, 4], [5, 6]], ("two", 1): [[1, 2, 3, 4], [5, 60]], ("one", 1): SAME}
    plain, two, one = table(judge(REFERENCE, said, 0.5, False), 0.5).splitlines()[1:]
    assert "within plain's own 0.25" in two and "plain's own" not in plain and "identical" in one
    said = {("plain", 4): [[1, 2, 3, 4], [5, 60]], ("two", 1): [[1, 2, 30, 4], [5, 6]]}
    assert "beyond plain's own 0.0001" in table(judge(REFERENCE, said, 0.5, False), 0.5)


@pytest.mark.parametrize("text", [SAME, [[1, 2, 30, 4], [5, 60]], [[1, 99, 3, 4], [5, 6]]])
def test_it_is_drawn(text: list[list[int]], tmp_path: Path) -> None:
    plots.draw_lossless(judge(REFERENCE, {("two", 1): text}, 0.5, False), 0.5, "tiny", tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "wrong", [["--dtype", "auto"], ["--dtype", "float16"], ["--at-once", "0"], ["--per-class", "0"], ["--invariant"]]
)
def test_wrong_settings_are_named(
    wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    asked = ["bench", "lossless", "--model", "x", "--dataset", "x", "--out", str(tmp_path / "found.json"), *wrong]
    try:
        status: object = main(asked)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert wrong[0] in capsys.readouterr().err
