"""The ledger and its solution: ties, freezes, rectangles, followers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.structure.coupling import Coupling, Freeze, Solution


def classes(coupling: Coupling, solution: Solution | None = None) -> list[list[int]]:
    """Free ids by component."""
    solution = solution or coupling.solve()
    found: dict[int, list[int]] = {}
    for id_ in range(1, coupling.n_ids):
        component = int(solution.component[id_])
        if solution.frozen[component] < 0:
            found.setdefault(component, []).append(id_)
    return sorted(found.values())


def reasons(coupling: Coupling) -> dict[int, str]:
    """The reason of each frozen id."""
    solution = coupling.solve()
    numbers = {id_: int(solution.frozen[solution.component[id_]]) for id_ in range(1, coupling.n_ids)}
    return {id_: solution.freezes[number].reason for id_, number in numbers.items() if number >= 0}


def test_ids_are_free_until_something_is_said() -> None:
    coupling = Coupling()
    assert coupling.new_ids(3).tolist() == [1, 2, 3]
    assert classes(coupling) == [[1], [2], [3]]


def test_ties_join_equal_positions_after_broadcasting() -> None:
    coupling = Coupling()
    ids = coupling.new_ids(6).reshape(2, 3)
    coupling.tie(ids, ids[:1])
    assert classes(coupling) == [[1, 4], [2, 5], [3, 6]]


def test_a_tie_to_a_fixed_position_freezes_with_its_reason() -> None:
    coupling = Coupling(operator="add", module="layer")
    a, b = coupling.new_ids(3), coupling.new_ids(3)
    coupling.tie(a, np.where(b == 5, 0, b), "meets what is fixed")
    assert classes(coupling) == [[1, 4], [3, 6], [5]]
    solution = coupling.solve()
    assert solution.freezes[solution.frozen[solution.component[2]]] == Freeze("meets what is fixed", "add", "layer")


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=12), st.sets(st.integers(1, 12), max_size=3)
)
def test_components_are_those_of_the_graph(pairs: list[tuple[int, int]], frozen: set[int]) -> None:
    coupling = Coupling()
    coupling.new_ids(12)
    parent = list(range(13))

    def root(x: int) -> int:
        return x if parent[x] == x else root(parent[x])

    for a, b in pairs:
        coupling.tie(np.array([a]), np.array([b]))
        parent[root(a)] = root(b)
    for id_ in frozen:
        coupling.freeze(np.array([id_]), "says so")
    shut = {root(id_) for id_ in frozen}
    expected: dict[int, list[int]] = {}
    for id_ in range(1, 13):
        if root(id_) not in shut:
            expected.setdefault(root(id_), []).append(id_)
    assert classes(coupling) == sorted(expected.values())


def test_the_first_reason_is_kept() -> None:
    coupling = Coupling()
    ids = coupling.new_ids(2)
    coupling.freeze(ids, "first")
    coupling.freeze(ids, "second")
    coupling.freeze_at(ids[:1], Freeze("third"))
    assert set(reasons(coupling).values()) == {"first"}


def test_a_rectangle_loses_whole_slices_along_its_finest_axis() -> None:
    coupling = Coupling()
    coupling.rectangle(coupling.new_ids(6).reshape(2, 3))
    assert classes(coupling) == [[1, 4], [2, 5], [3, 6]]


def test_a_blocked_axis_is_not_cut_along() -> None:
    coupling = Coupling()
    ids = coupling.new_ids(6).reshape(2, 3)
    coupling.rectangle(ids)
    coupling.rectangle(ids, [1])
    assert classes(coupling) == [[1, 2, 3], [4, 5, 6]]


def test_a_rectangle_without_an_axis_is_frozen() -> None:
    coupling = Coupling()
    coupling.rectangle(coupling.new_ids(4).reshape(2, 2), [0, 1])
    assert classes(coupling) == []
    assert "no single one of them can lose slices" in reasons(coupling)[1]


def test_what_is_tied_already_decides() -> None:
    """Heads that are tied elsewhere are cut as heads, though there are more features."""
    coupling = Coupling()
    ids = coupling.new_ids(6).reshape(2, 3)
    coupling.rectangle(ids)
    coupling.tie(ids, ids[:, :1])
    assert classes(coupling) == [[1, 2, 3], [4, 5, 6]]


def test_what_is_frozen_leaves_the_other_axis() -> None:
    """With a frozen feature in every head, features can go and heads cannot."""
    coupling = Coupling()
    ids = coupling.new_ids(6).reshape(3, 2)
    coupling.rectangle(ids)
    coupling.freeze(ids[:, 0], "stays")
    assert classes(coupling) == [[2, 4, 6]]


def test_a_slice_that_is_partly_fixed_stays() -> None:
    coupling = Coupling()
    ids = np.concatenate([[0], coupling.new_ids(5)]).reshape(3, 2)
    coupling.rectangle(ids, [1])
    assert classes(coupling) == [[2, 3], [4, 5]]
    assert 1 in reasons(coupling)


def test_rectangles_of_the_same_ids_agree() -> None:
    """A transposed view of the same units cannot be cut along another axis."""
    coupling = Coupling()
    ids = coupling.new_ids(6).reshape(2, 3)
    coupling.rectangle(ids)
    coupling.rectangle(ids.T)
    coupling.rectangle(ids.reshape(-1))
    assert len(classes(coupling)) in (2, 3)
    assert sum(map(len, classes(coupling))) == 6


@pytest.mark.parametrize(
    ("blocked", "expected"), [((0,), [[1, 4, 7], [2, 5, 8], [3, 6, 9]]), ((1,), [[1, 2, 3], [4, 5, 6]])]
)
def test_a_follower_goes_along_or_stays(blocked: tuple[int, ...], expected: list[list[int]]) -> None:
    """Features that meet heads x features go with the features, and stay where heads go."""
    coupling = Coupling()
    ids, narrow = coupling.new_ids(6).reshape(2, 3), coupling.new_ids(3)
    coupling.follows(ids, [1], narrow)
    coupling.rectangle(ids, blocked)
    assert classes(coupling) == expected


def test_a_follower_of_nothing_is_frozen() -> None:
    coupling = Coupling()
    coupling.follows(np.zeros((2, 3), dtype=np.int64), [1], coupling.new_ids(3))
    assert classes(coupling) == []


def test_giving_up_an_axis_ties_along_it_and_the_last_one_freezes() -> None:
    coupling = Coupling()
    ids = coupling.new_ids(6).reshape(2, 3)
    left = coupling.collapse(ids, [0], "is summed")
    assert left is not None
    assert left.tolist() == [1, 2, 3]
    assert classes(coupling) == [[1, 4], [2, 5], [3, 6]]
    assert coupling.collapse(left, [0], "is summed") is None
    assert classes(coupling) == []
    assert coupling.collapse(ids, [], "is summed") is ids


def test_a_deaf_ledger_writes_nothing_but_still_gives_ids() -> None:
    coupling = Coupling(recording=False)
    ids = coupling.new_ids(4).reshape(2, 2)
    coupling.freeze(ids, "says so")
    coupling.rectangle(ids)
    coupling.consume(ids)
    coupling.join(ids[:1], ids[1:])
    coupling.product(1.0, [ids])
    left = coupling.collapse(ids, [0], "is summed")
    assert left is not None
    assert left.tolist() == [1, 2]
    assert classes(coupling) == [[1], [2], [3], [4]]
    assert (coupling.consumed, coupling.joined, coupling.products) == ([], [], [])


def test_solving_twice_with_more_freezes_in_between_starts_anew() -> None:
    """What the solution froze by itself may be decided otherwise when more is known."""
    coupling = Coupling()
    ids, narrow = coupling.new_ids(6).reshape(2, 3), coupling.new_ids(3)
    coupling.follows(ids, [0], narrow[:2])
    first = classes(coupling)
    coupling.freeze_at(ids[:, :1], Freeze("fails when cut"))
    second = classes(coupling)
    assert first != second
    assert classes(coupling) == second
