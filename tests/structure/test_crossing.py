"""Pairs of two units' dimensions that merge: their ids, and which of the two the solution cuts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.law import check_cut
from torch import Tensor, nn

from secateur.structure.coupling import Coupling
from secateur.structure.crossing import Crossing, Crossings
from secateur.structure.ids import Ids

EXPERTS, HIDDEN = np.arange(1, 4), np.arange(5, 9)


def ids(*numbers: int) -> Ids:
    return np.array(numbers, dtype=np.int64)


def test_each_pair_has_an_id_that_tells_its_units() -> None:
    one = Crossing(EXPERTS, HIDDEN, 20)
    assert one.end == 32
    assert one.pairs(ids(1, 3), ids(5, 8)).tolist() == [[20, 23], [28, 31]]
    assert one.pairs(ids(2, 2), ids(6)).tolist() == [[25], [25]]
    assert [part.tolist() for part in one.parents(ids(31, 23, 23, 7))] == [[1, 3], [8]]


def test_ids_of_pairs_are_told_from_all_others() -> None:
    known = Crossings([Crossing(EXPERTS, HIDDEN, 20), Crossing(ids(10, 12), ids(13, 14), 40)])
    assert [known.have(one) for one in (ids(20), ids(43, 42), ids(3), ids(36), ids(44), ids())] == [True, True] + [
        False
    ] * 4
    assert known.find(ids(3), ids(5, 6)) is known.known[0]
    assert known.find(ids(10, 12), ids(14)) is known.known[1]
    assert known.find(ids(10, 11), ids(14)) is None
    assert known.find(HIDDEN, EXPERTS) is None
    table = np.arange(20, 32).reshape(3, 4)
    assert known.table(table)
    assert not known.table(table.T)
    assert not known.table(table[:2])
    assert known.parents(ids(4)) == []
    assert [part.tolist() for part in known.parents(ids(20, 21))] == [[1], [5, 6]]


@pytest.mark.parametrize("shut", ["none", "experts", "hidden", "one expert", "both"])
def test_the_earlier_dimension_is_cut_unless_it_cannot_be(shut: str) -> None:
    c = Coupling()
    experts, hidden = c.new_ids(3), c.new_ids(4)
    pairs = c.cross(experts, hidden)
    assert pairs is not None
    assert pairs is not c.cross(experts, hidden)
    assert np.array_equal(pairs, c.cross(experts, hidden))
    assert Coupling(recording=False).cross(experts, hidden) is None
    c.consume(pairs.ravel())
    for frozen in {
        "experts": [experts],
        "hidden": [hidden],
        "one expert": [experts[:1]],
        "both": [experts, hidden],
    }.get(shut, []):
        c.freeze(frozen, "is shut")
    solution = c.solve()
    component, gone = solution.component, solution.frozen[solution.component] < 0
    expected = {
        "none": (3, 0),
        "experts": (0, 4),
        "hidden": (3, 0),
        "one expert": (2, 0),
        "both": (0, 0),
    }[shut]
    assert (int(gone[experts].sum()), int(gone[hidden].sum())) == expected
    assert gone[pairs].sum() == {(3, 0): 12, (0, 4): 12, (2, 0): 8, (0, 0): 0}[expected]
    if expected == (0, 4):
        assert (component[pairs] == component[hidden]).all()
    marked = np.concatenate(c.consumed)
    assert np.isin([*experts, *hidden], marked).all()


class Table(nn.Module):
    """Places of a table of three dimensions, of which two merge, beside a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.randn(1, 5, 7, 3))
        self.a, self.b, self.c, self.d = nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.b(self.a(self.grid).relu()).view(-1, 4).sum(0)
        made: Tensor = self.d(self.c(x).relu()) + bias
        return made


class Standardised(nn.Module):
    """A convolution whose weight is standardised, for which the dimensions of its filters merge."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.a.weight.reshape(1, 8, -1), None, None, training=True).reshape_as(self.a.weight)
        made: Tensor = self.c(self.b(F.conv2d(x, weight, self.a.bias, padding=1).relu()).relu())
        return made


@pytest.mark.parametrize(("model", "shape", "free"), [(Table, (2, 6), {"a", "c"}), (Standardised, (2, 3, 6, 6), {"b"})])
def test_the_trial_leaves_room_for_pairs_that_it_does_not_know(
    model: type[nn.Module], shape: tuple[int, ...], free: set[str]
) -> None:
    structure = check_cut(model(), torch.randn(shape))
    assert {group.name for group in structure.groups} >= free


class Batched(nn.Module):
    """Attention that multiplies examples times heads at once, with keys that it writes to a tensor of its own."""

    def __init__(self, n_head: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.query, self.key, self.value = (nn.Linear(6, n_head * width) for _ in range(3))
        self.out = nn.Linear(n_head * width, 6)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        query, key, value = (
            part(x).view(b, t, -1, self.width).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        whole = key.new_empty(key.shape)
        whole[..., :2], whole[..., 2:] = key[..., :2], key[..., 2:]
        weights = (query.flatten(0, 1) @ whole.flatten(0, 1).mT).softmax(-1)
        made: Tensor = self.out((weights @ value.flatten(0, 1)).view(b, -1, t, self.width).transpose(1, 2).flatten(2))
        return made


def test_examples_of_a_tensor_that_the_model_makes_are_no_units_that_merge() -> None:
    structure = check_cut(Batched(4, 5), torch.randn(2, 7, 6))
    assert [group.size for group in structure.groups] == [4]
