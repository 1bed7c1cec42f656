"""When two texts may part, and when a comparison is red."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.phases import PHASES, Scale
from vllm_orthrus.bench.near_ties import BOUNDS, CLOSE, Close, Parting, parting, ties

PLAIN = [5, 6, 7, 8]
CLOSE_AT_2: Close = {0: {5: 0.0, 9: 0.4}, 2: {7: 0.0, 3: 2e-4, 4: 0.3}}


@pytest.mark.parametrize(
    ("other", "expected", "right"),
    [
        ([5, 6, 7, 8], None, True),
        ([5, 6, 3, 1], Parting(2, 2e-4), True),
        ([5, 6, 4, 8], Parting(2, 0.3), False),  # close, and still further away than rounding reaches
        ([5, 6, 2, 8], Parting(2, None), False),  # another two are tied there, but this token is none of them
        ([5, 1, 7, 8], Parting(1, None), False),  # nothing is tied there
        ([9, 6, 3, 8], Parting(0, 0.4), False),  # the first place counts, not a tie behind it
        ([5, 6, 7], Parting(3, None), False),
        ([5, 6, 7, 8, 9], Parting(4, None), False),
    ],
)
def test_where_texts_part(other: list[int], expected: Parting | None, right: bool) -> None:
    found = parting(PLAIN, CLOSE_AT_2, other)
    assert found == expected
    assert (found is None or found.within(BOUNDS["float32"])) == right


def test_ties_need_two_tokens() -> None:
    assert ties(CLOSE_AT_2, 1e-3) == 1
    assert ties(CLOSE_AT_2, 0.5) == 2
    assert ties(CLOSE_AT_2, 1e-5) == 0
    assert max(BOUNDS.values()) < CLOSE, "an engine reports too little to tell what is within the bound"


def findings(**changes: Any) -> dict[str, dict[str, Any]]:
    """Of a plain engine and of one that says the same, as long as nothing is changed."""
    started = {"eager": False, "cudagraph_mode": "FULL_AND_PIECEWISE", "passes": None, "draft_graphs": []}
    close = [[[2, 7, 0.0, 3, 2e-4]]]
    counted = {
        "vllm:spec_decode_num_drafts": 10,
        "vllm:spec_decode_num_draft_tokens": 40,
        "vllm:spec_decode_num_accepted_tokens": 40,
        "vllm:orthrus_hits": 4,
    }
    plain = {"at_once": 1, "tokens": [PLAIN], "close": close}
    other = plain | {"counted": counted | changes.pop("counted", {}), "tokens": [changes.pop("tokens", PLAIN)]}
    drafting = started | {"passes": "one", "draft_graphs": [1, 2]} | changes
    return {
        "plain": {"started": started, "answers": [plain]},
        "one pass": {"started": drafting, "answers": [other]},
    }


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"tokens": [5, 6, 3, 1]}, None),
        ({"tokens": [5, 6, 4, 8]}, "parts at token 2, more than"),
        ({"counted": {"vllm:spec_decode_num_accepted_tokens": 3}}, "1.30 tokens per cycle"),
        ({"counted": {"vllm:orthrus_hits": 0}}, "no outcome was foreseen"),
        ({"cudagraph_mode": "PIECEWISE"}, "not FULL"),
        ({"draft_graphs": []}, "no draft pass has a graph"),
        ({"eager": True, "cudagraph_mode": "NONE"}, None),  # no GPU, nothing to replay
    ],
)
def test_what_turns_a_comparison_red(changes: dict[str, Any], problem: str | None) -> None:
    red, near = PHASES["text"].judge(Scale(), findings(**changes))
    assert not red["plain"]
    assert len(red["one pass"]) == (problem is not None)
    assert all(problem is not None and problem in found for found in red["one pass"])
    assert bool(near) == (changes.get("tokens") == [5, 6, 3, 1])


def test_a_wider_bound_in_bfloat16() -> None:
    parts = findings(tokens=[5, 6, 4, 8])
    parts["plain"]["answers"][0]["close"] = [[[2, 7, 0.0, 4, 0.3]]]
    assert PHASES["text"].judge(Scale(), parts).red["one pass"]
    assert not PHASES["wide"].judge(Scale(), parts).red["one pass"]


@pytest.mark.parametrize(("rejected", "right"), [(0, True), (1, True), (2, False), (40, False)])
def test_the_oracle_may_reject_at_ties_alone(rejected: int, right: bool) -> None:
    (engine,) = list(findings(counted={"vllm:spec_decode_num_accepted_tokens": 40 - rejected}).values())[1:]
    red, near = PHASES["oracle"].judge(Scale(), {"float32": engine})
    assert (not red["float32"]) == right
    assert bool(near) == (rejected == 1)


def test_an_oracle_that_drafts_nothing_is_red() -> None:
    none = {"vllm:spec_decode_num_draft_tokens": 0, "vllm:spec_decode_num_accepted_tokens": 0}
    (engine,) = list(findings(counted=none).values())[1:]
    assert PHASES["oracle"].judge(Scale(), {"float32": engine}).red["float32"]


def test_rows_must_be_those_that_took_part() -> None:
    started = findings()["one pass"]["started"]
    steps = [{"requests": 1, "context": 2048, "rows": 112.0}, {"requests": 1, "context": 16384, "rows": 16.0}]
    red, _ = PHASES["rows"].judge(Scale(), {"112 rows": {"started": started, "steps": steps}})
    assert red["112 rows"] == ["1 x 16384: 16.0 rows took part"]
