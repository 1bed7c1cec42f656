"""docs/compatibility.md has a row for each feature that tests are marked with, and says what they found.

docs/regressions.md names tests that are there.
"""

import re

import pytest
from packaging.specifiers import SpecifierSet

from tests.compatibility import PAGE, REGRESSIONS_PAGE, found, page, regressions, unasked, verdict
from tests.features import FEATURES, TESTS, VERDICTS, claims, listed
from tests.regressions import REGRESSIONS
from vllm_orthrus.patches import SUPPORTED_VLLM


def test_every_listed_feature_has_a_test_and_every_marked_one_a_row() -> None:
    claimed = {claim.feature for claim in claims()}
    assert claimed == set(listed()), claimed ^ set(listed())
    assert len(listed()) == len(set(listed()))
    assert {claim.verdict for claim in claims()} == set(VERDICTS)


def test_tests_of_a_feature_say_the_same_of_it() -> None:
    said: dict[str, str] = {}
    for claim in claims():
        assert said.setdefault(claim.feature, claim.verdict) == claim.verdict, claim


def test_the_page_is_what_the_tests_found() -> None:
    assert PAGE.read_text() == page(found()), "run `make compatibility`"


def test_the_page_has_just_these_rows() -> None:
    rows = re.findall(r"^\| ([^\s|][^|]*?) \|", PAGE.read_text(), re.MULTILINE)
    assert rows == [name for names in FEATURES.values() for name in names]


def test_nothing_failed() -> None:
    results = found()
    assert results
    assert set(SpecifierSet(SUPPORTED_VLLM).filter(results)) == set(results)
    for release, features in results.items():
        for name, row in features.items():
            assert "fails" not in verdict(row), f"{name} with vLLM {release}"


def test_what_was_found_is_of_tests_that_are_marked() -> None:
    claimed: dict[str, set[str]] = {}
    for claim in claims():
        claimed.setdefault(claim.feature, set()).add(claim.test)
    for release, features in found().items():
        for name, row in features.items():
            ran = {test.partition("[")[0].removeprefix("tests/") for test in row["tests"]}
            assert ran <= claimed.get(name, set()), f"{name} with vLLM {release}: run `make compatibility`"


def test_rows_that_were_not_asked_are_named() -> None:
    everything = {name: {} for name in listed()}
    assert not unasked({"0.32.0": everything, "0.33.0": everything})
    some = {name: {} for name in listed()[1:]}
    assert unasked({"0.32.0": everything, "0.33.0": some}) == [f"vLLM 0.33.0: {listed()[0]}"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (None, "not tested"),
        ({"verdict": "works", "said": None, "thorough": False, "tests": {"a": "passed", "b": "failed"}}, "**fails**"),
        ({"verdict": "works", "said": None, "thorough": False, "tests": {"a": "skipped"}}, "not tested"),
        ({"verdict": "works", "said": None, "thorough": True, "tests": {"a": "passed", "b": "skipped"}}, "works, on"),
        ({"verdict": "refused", "said": "no room", "thorough": False, "tests": {"a": "passed"}}, "refused: no room"),
    ],
)
def test_what_a_row_says(row: dict[str, object] | None, said: str) -> None:
    if row is not None:
        tests: dict[str, str] = row["tests"]  # type: ignore[assignment]
        row = row | {"tests": {name: {"outcome": outcome} for name, outcome in tests.items()}}
    assert verdict(row).startswith(said)


def test_regressions_name_tests_that_are_there() -> None:
    assert REGRESSIONS_PAGE.read_text() == regressions(), "run `python -m tests.compatibility`"
    for one in REGRESSIONS:
        assert one.tests
        for test in (*one.tests, one.planted):
            file, _, name = test.partition("::")
            assert re.search(rf"^def {name}\(", (TESTS / file).read_text(), re.MULTILINE), f"{one.bug}: {test}"
