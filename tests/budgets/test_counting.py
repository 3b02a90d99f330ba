"""Integer counts against the definition, many patterns at once, whole and fractional coefficients."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.budgets.test_costs import counted, polynomials
from tests.polynomials import Polynomials

from secateur.budgets.counting import Counting
from secateur.structure.groups import Axis, Term


@settings(max_examples=50)
@given(structure=polynomials(), data=st.data())
def test_many_patterns_at_once(structure: Polynomials, data: st.DataObject) -> None:
    counting = Counting(structure.axes, structure.terms)
    width = st.lists(st.integers(0, 50), min_size=len(structure.groups), max_size=len(structure.groups))
    patterns = data.draw(st.lists(width, min_size=1, max_size=4))
    found = counting(np.array(patterns, dtype=np.int64))
    assert found.dtype == np.int64
    assert found.tolist() == [list(counted(structure, pattern)) for pattern in patterns]
    assert counting(np.array(patterns[0], dtype=np.int64)).tolist() == found[0].tolist()


def test_fractional_coefficients_round_the_sum_and_not_the_terms() -> None:
    axes = [Axis(0, ((0, 1),))]
    counting = Counting(axes, [[Term(0.4, (0,), "a"), Term(0.4, (0,), "b")], [Term(0.4, (0,), "a")]])
    assert counting(np.array([1])).tolist() == [1, 0]


def test_without_terms_or_axes_all_is_zero() -> None:
    assert Counting([], [[], []])(np.array([[1], [2]])).tolist() == [[0, 0], [0, 0]]
