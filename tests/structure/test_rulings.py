"""Rules are asked once for the same thing, and never where they would say something new."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.structure.coupling import Coupling
from secateur.structure.ids import Factor, Label
from secateur.structure.record import Recorder
from secateur.structure.rulings import Rulings

UNITS = np.arange(1, 5)


def labelled(recorder: Recorder, tensor: Tensor, ids: np.ndarray = UNITS) -> Tensor:
    recorder.set_label(tensor, Label(tuple(tensor.shape), (Factor((1,), ids),), data=True))
    return tensor


def test_labels_that_say_the_same_are_one_object() -> None:
    rulings = Rulings(Coupling(n_ids=5))
    one, same = (Label((2, 4), (Factor((1,), UNITS),)) for _ in range(2))
    assert rulings.one(one) is rulings.one(same)
    others = [
        Label((3, 4), one.factors),
        Label((2, 4), one.factors, weight=True),
        Label((2, 4), one.factors, data=True),
        Label((2, 4), one.factors, vanishes=True),
        Label((2, 4), one.factors, frozenset({0})),
        Label((2, 4), (Factor((1,), UNITS[::-1]),)),
        Label((4, 4), (Factor((0,), UNITS),)),
    ]
    assert len({id(rulings.one(label)) for label in (one, *others)}) == 1 + len(others)


def test_the_same_operator_on_the_same_labels_gives_the_same_label() -> None:
    recorder = Recorder(Rulings(Coupling(n_ids=9, first_made=9)))
    x, y, z = (labelled(recorder, torch.rand(2, 4)) for _ in range(3))
    with recorder:
        first, second, other, number = x * y, y * z, x + y, x * 3
    labels = [recorder.label(tensor) for tensor in (first, second, other, number)]
    assert labels[0] is labels[1]
    assert [entry.scalars for entry in recorder.entries] == [(), (), (("alpha", 1),), (("other", 3),)]


def test_arguments_and_shapes_make_a_difference() -> None:
    recorder = Recorder(Rulings(Coupling(n_ids=9, first_made=9)))
    x = labelled(recorder, torch.rand(4, 4))
    with recorder:
        rows, columns = x.select(0, 1), x.unsqueeze(0)
        kept, gone = x.sum(0, keepdim=True), x.sum(0)
    assert recorder.label(rows).ids_along(0).tolist() == UNITS.tolist()
    assert [recorder.label(one).shape for one in (columns, kept, gone)] == [(1, 4, 4), (1, 4), (4,)]


def test_tensors_that_are_made_have_units_of_their_own() -> None:
    """Two empty tensors do not go together because the same rule made them."""
    recorder = Recorder(Rulings(Coupling(n_ids=9, first_made=9)))
    x = labelled(recorder, torch.rand(2, 4))
    with recorder:
        a, b = x.new_zeros(3), x.new_zeros(3)
    assert not set(recorder.label(a).ids_along(0)) & set(recorder.label(b).ids_along(0))


class Twice(nn.Module):
    """One layer, used twice on what goes together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid, self.last = nn.Linear(4, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """A recurrence of two steps."""
        x = self.first(x)
        return self.last(self.mid(self.mid(x + self.mid(x))))


def test_every_use_of_a_shared_layer_is_counted() -> None:
    structure = sc.trace(Twice(), examples=(torch.zeros(1, 4),))
    assert structure.cost().macs == 4 * 8 + 3 * 8 * 8 + 8 * 2
