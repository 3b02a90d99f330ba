"""Widths that are measured, and the time that each layer takes for itself, by a clock that only layers move."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.latency.ticking import CALL, OUTPUT, ROOT, WEIGHT, Net, example, nanoseconds, tick

import secateur as sc
from secateur.latency.measure import SHARES, keep_of, measure, widths
from secateur.structure.example import Example


def test_widths_go_from_dense_to_one_unit_and_stay_within_groups() -> None:
    structure = sc.trace(Net(), examples=(example(),))
    sizes = [group.size for group in structure.groups]
    found = widths(structure, 40, np.random.default_rng(0), grid=True)
    assert found.shape == (len(SHARES) + 41, 2)
    assert found[0].tolist() == sizes
    assert found[len(SHARES)].tolist() == [1, 1]
    assert (found >= 1).all()
    assert (found <= sizes).all()
    assert len(widths(structure, 40, np.random.default_rng(0), grid=False)) == 40
    assert {name: len(kept) for name, kept in keep_of(structure, np.array([3, 2])).items()} == {
        structure.groups[0].name: 3,
        structure.groups[1].name: 2,
    }


def test_each_layer_gets_its_own_time_and_all_of_them_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tick(monkeypatch)
    net = Net().train()
    structure = sc.trace(net, examples=(example(),))
    n_open = np.array([[16, 8], [5, 8], [5, 1]])
    found = measure(net, structure, n_open, Example((example(),)), torch.device("cpu"), seconds=0.01)
    assert found.layers == ("", "first", "rest", "rest.0", "rest.1", "rest.2", "rest.3")
    assert found.calls.tolist() == [1] * 7
    assert found.whole.tolist() == [nanoseconds(*n) for n in n_open.tolist()]
    assert np.array_equal(found.twice, np.stack([found.whole, found.whole]))
    assert np.array_equal(found.own.sum(1), found.whole)
    own = dict(zip(found.layers, found.own[1].tolist(), strict=True))
    assert (own[""], own["rest"], own["rest.0"]) == (ROOT, 0.0, 0.0)
    assert own["rest.1"] == CALL + WEIGHT * 40 + OUTPUT * 8
    assert [shape.tolist() for shape in found.shapes["rest.1"]] == [[[2, 16], [2, 5], [2, 5]], [[2, 8], [2, 8], [2, 1]]]
    assert net.training
    assert found.first(2).own.shape == (2, 7)


def test_watching_takes_time_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tick(monkeypatch, mark=7.0)
    net = Net()
    structure = sc.trace(net, examples=(example(),))
    found = measure(net, structure, np.array([[16, 8]]), Example((example(),)), torch.device("cpu"), seconds=0.01)
    assert found.whole[0] == nanoseconds(16, 8) + 7.0
    assert found.own.sum() == nanoseconds(16, 8) + 7.0 * 13
