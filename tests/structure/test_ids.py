"""Labels: ids over dimensions, and what shape operators do to them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.structure.ids import Factor, Label, make_factor, map_dims, matching_blocks, reshape_factor

IDS = np.arange(1, 7)


def test_a_label_knows_the_factor_of_a_dimension() -> None:
    wide = Factor((1, 2), IDS.reshape(2, 3))
    label = Label((5, 2, 3, 4), (wide, Factor((3,), np.arange(7, 11))))
    assert label.factor_at(0) is None
    assert label.factor_at(2) is wide
    assert label.ids_along(3).tolist() == [7, 8, 9, 10]
    assert label.ids_along(0).tolist() == [0] * 5
    assert label.ids_along(1).tolist() == [0, 0]  # shares its factor


@pytest.mark.parametrize(("uniform", "neutral"), [((), False), ((0,), False), ((0, 1), True)])
def test_a_tensor_is_neutral_where_all_dimensions_are_uniform(uniform: tuple[int, ...], neutral: bool) -> None:
    assert Label((2, 3), uniform=frozenset(uniform)).neutral is neutral


def test_a_label_of_another_shape_keeps_its_kind_and_loses_what_it_was_not_given() -> None:
    label = Label((2, 3), (Factor((1,), IDS[:3]),), uniform=frozenset({0}), weight=True, vanishes=True)
    other = label.with_factors((3,), [Factor((0,), IDS[:3])])
    assert (other.shape, other.weight, other.vanishes, other.uniform) == ((3,), True, True, frozenset())


def test_a_factor_has_ascending_dimensions_and_none_along_which_nothing_changes() -> None:
    made = make_factor([2, 0], np.array([[1, 2], [3, 4], [5, 6]]))
    assert made is not None
    assert made.dims == (0, 2)
    assert made.ids.tolist() == [[1, 3, 5], [2, 4, 6]]
    repeated = make_factor([0, 1], np.array([[1, 2, 3], [1, 2, 3]]))
    assert repeated is not None
    assert (repeated.dims, repeated.ids.tolist()) == ((1,), [1, 2, 3])


def test_a_dimension_of_one_unit_keeps_its_label_and_fixed_ids_are_no_factor() -> None:
    alone = make_factor([3], np.array([7]))
    assert alone is not None
    assert alone.dims == (3,)
    assert make_factor([0, 1], np.zeros((2, 2), dtype=np.int64)) is None


def test_dimensions_are_renamed() -> None:
    (factor,) = map_dims([Factor((0, 2), IDS.reshape(2, 3))], {0: 2, 2: 1}.__getitem__)
    assert factor.dims == (1, 2)
    assert factor.ids.tolist() == IDS.reshape(2, 3).T.tolist()


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(sizes, st.data())
def test_blocks_have_equal_products_and_cover_both_shapes(old: list[int], data: st.DataObject) -> None:
    new = _regrouped(old, data)
    blocks = matching_blocks(tuple(old), tuple(new))
    assert [dim for block, _ in blocks for dim in block] == list(range(len(old)))
    assert [dim for _, block in blocks for dim in block] == list(range(len(new)))
    for a, b in blocks:
        assert np.prod([old[dim] for dim in a]) == np.prod([new[dim] for dim in b])


@given(sizes, st.data())
def test_a_reshaped_factor_is_the_reshaped_array(old: list[int], data: st.DataObject) -> None:
    """Spread over all dimensions, the ids are those of a plain reshape."""
    new = _regrouped(old, data)
    dims = tuple(sorted(data.draw(st.sets(st.sampled_from(range(len(old))), min_size=1))))
    ids = np.arange(1, 1 + np.prod([old[dim] for dim in dims])).reshape([old[dim] for dim in dims])
    expected = _spread(Factor(dims, ids), tuple(old)).reshape(new)
    made = reshape_factor(Factor(dims, ids), tuple(old), tuple(new), matching_blocks(tuple(old), tuple(new)))
    if made is None:
        assert expected.size == len(np.unique(expected)) == 1 or not new
    else:
        assert np.array_equal(_spread(made, tuple(new)), expected)


def _regrouped(old: list[int], data: st.DataObject) -> list[int]:
    """Another shape of the same size: neighbours merged, single dimensions inserted."""
    new: list[int] = []
    for size in old:
        if new and data.draw(st.booleans()):
            new[-1] *= size
        else:
            new.append(size)
        if data.draw(st.booleans()):
            new.append(1)
    return new


def _spread(factor: Factor, shape: tuple[int, ...]) -> np.ndarray:
    lined_up = factor.ids.reshape([shape[dim] if dim in factor.dims else 1 for dim in range(len(shape))])
    return np.broadcast_to(lined_up, shape)
