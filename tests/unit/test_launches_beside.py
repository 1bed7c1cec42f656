"""A formula of launches is taken from counts that it explains, and from no others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.launches_beside import CHECKED, FITTED, Formula, formula_of

SOME = st.integers(0, 50)


@given(SOME, SOME, SOME, SOME)
def test_formula(fixed: int, layer: int, draft: int, draft_layer: int) -> None:
    truth = Formula(fixed, layer, draft, draft_layer)
    assert formula_of({point: truth.at(*point) for point in FITTED}) == truth
    assert truth.at(*CHECKED) == fixed + 3 * layer + 4 * (draft + 3 * draft_layer)


def test_planted_fault_drafts_that_are_not_alike() -> None:
    counted = {point: Formula(5, 12, 9, 12).at(*point) for point in FITTED}
    counted[1, 4] += 1
    with pytest.raises(ValueError, match="not as many for each"):
        formula_of(counted)
