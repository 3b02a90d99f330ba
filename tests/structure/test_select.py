"""Layers that read only some positions of their input."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from secateur.errors import CompactionError
from secateur.structure.cut import CutPlan, cut_
from secateur.structure.select import Select, plain_class


def test_the_layer_reads_the_selected_positions():
    net = nn.Sequential(nn.Linear(6, 3), nn.ReLU())
    dense = copy.deepcopy(net)
    with torch.no_grad():
        dense[0].weight[:, [0, 2, 5]] = 0
    cut_(net, CutPlan({"0.weight": {1: (1, 3, 4)}}, selects={"0": (1, 3, 4)}))
    x = torch.randn(2, 6)
    assert isinstance(net[0], nn.Linear)
    assert net[0].in_features == 3
    torch.testing.assert_close(net(x), dense(x))
    assert list(net.state_dict()) == ["0.weight", "0.bias", "0.selected"]
    assert plain_class(net[0]) is nn.Linear


@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (5, 4, 4)])
def test_a_convolution_selects_channels_with_and_without_a_batch(shape):
    layer = nn.Conv2d(5, 2, 3)
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        dense.weight[:, [0, 1, 3]] = 0
    cut_(layer, CutPlan({"weight": {1: (2, 4)}}, selects={"": (2, 4)}))
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), dense(x))


def test_copies_and_pickles_select_too():
    layer = nn.Linear(4, 2)
    cut_(layer, CutPlan({"weight": {1: (0, 3)}}, selects={"": (0, 3)}))
    x = torch.randn(3, 4)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert isinstance(other, Select)
        assert torch.equal(other(x), layer(x))


def test_it_exports_and_traces():
    layer = nn.Linear(4, 2)
    cut_(layer, CutPlan({"weight": {1: (0, 3)}}, selects={"": (0, 3)}))
    x = torch.randn(3, 4)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (CutPlan(selects={"0": (0, 1)}), "reads 4 positions, and 2"),
        (CutPlan(selects={"1": (0,)}), "no such layer with a weight"),
        (CutPlan(selects={"7": (0,)}), "no such layer with a weight"),
        (CutPlan({"0.weight": {1: (0,)}}, selects={"0": (-1,)}), "none may be negative"),
    ],
)
def test_what_does_not_fit_is_refused(plan, message):
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with pytest.raises(CompactionError, match=message):
        cut_(net, plan)
    assert type(net[0]) is nn.Linear


def test_selecting_twice_is_refused():
    layer = nn.Linear(4, 2)
    cut_(layer, CutPlan({"weight": {1: (0, 3)}}, selects={"": (0, 3)}))
    with pytest.raises(CompactionError, match="selected already"):
        cut_(layer, CutPlan({"weight": {1: (0,)}}, selects={"": (0,)}))
