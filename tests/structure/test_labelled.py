"""Labels by the identity of tensors that may die."""

from __future__ import annotations

import numpy as np
import torch

from secateur.structure.ids import Factor, Label
from secateur.structure.labelled import Labelled

LABEL = Label((3,), (Factor((0,), np.arange(1, 4)),))


def test_a_label_is_its_tensors_alone() -> None:
    labels, x = Labelled(), torch.zeros(3)
    labels[x] = LABEL
    assert labels.get(x) is LABEL
    assert labels.get(torch.zeros(3)) is None
    assert labels.get(x.view(3)) is None


def test_a_tensor_at_a_dead_ones_address_has_no_label() -> None:
    labels = Labelled()
    for _ in range(50):
        x = torch.zeros(3)
        assert labels.get(x) is None
        labels[x] = LABEL
        del x


def test_sharing_finds_the_labelled_tensors_on_the_storage() -> None:
    labels, base = Labelled(), torch.zeros(2, 3)
    row, other, unknown = base[0], torch.zeros(2, 3), base[1]
    for tensor in (base, row, other):
        labels[tensor] = LABEL
    assert [id(tensor) for tensor in labels.sharing(base)] == [id(row)]
    assert len(labels.sharing(unknown)) == 2
    base.data = torch.zeros(2, 3)
    assert labels.sharing(row) == []


def test_sparse_tensors_share_nothing() -> None:
    labels, x = Labelled(), torch.eye(3).to_sparse()
    labels[x] = LABEL
    assert labels.sharing(x) == []
    assert labels.get(x) is LABEL


def test_the_living_are_those_with_units_that_are_still_held() -> None:
    labels, held, plain = Labelled(), torch.zeros(3), torch.zeros(3)
    labels[held], labels[plain] = LABEL, Label((3,))
    labels[torch.zeros(3)] = LABEL
    assert labels.alive(besides=frozenset()) == [LABEL]
    assert labels.alive(besides={id(held)}) == []
