from __future__ import annotations

import copy
import pickle

import numpy as np
import torch
from torch import nn

from secateur.pruning.index import Index

CPU, META = torch.device("cpu"), torch.device("meta")


def test_positions_come_on_the_device_that_asks_and_are_copied_only_when_it_changes() -> None:
    index = Index(np.array([[2, 0]]))
    first = index.on(CPU)
    assert first.tolist() == [[2, 0]]
    assert index.shape == (1, 2)
    assert index.on(META).is_meta
    assert index.on(CPU) is first


def test_copies_and_pickles_have_their_own() -> None:
    index = Index(np.array([2, 0]))
    for twin in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        assert twin.numpy().tolist() == [2, 0]
        twin.on(CPU).fill_(7)
    assert index.numpy().tolist() == [2, 0]


def test_positions_are_no_part_of_what_averages_and_conversions_touch() -> None:
    layer = nn.Linear(2, 2)
    layer.index = Index(np.array([2, 0]))  # type: ignore[assignment]
    layer.to(torch.bfloat16)
    assert not list(layer.buffers())
    assert layer.index.on(CPU).dtype == torch.int64  # type: ignore[operator]
