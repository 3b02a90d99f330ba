from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tests.gated import DTYPE, ConvNet, conv_structure
from torch import Tensor, nn

import secateur as sc
from secateur.pruning.narrowable import held, narrowable, ways
from secateur.pruning.placement import gated_sites


class Normed(nn.Module):
    """An RMSNorm over units, units that only a recurrent layer reads, and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.norm = nn.RMSNorm(6, eps=1e-6)
        self.first = nn.Linear(6, 5)
        self.lstm = nn.LSTM(5, 4, batch_first=True)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embed(x))
        return self.last(self.lstm(torch.tanh(self.first(h)))[0][:, -1])


def found(
    net: nn.Module, structure: sc.Structure, rules: Sequence[sc.Rule], method: sc.Method, *, random: bool = False
):
    """The ways of all groups by name: "whole", the tensors that read only some units, or the reason."""
    pruner = sc.attach(net, structure=structure, gates=list(rules), method=method)
    groups = pruner.groups
    how = ways(groups, [method] * len(groups), net, pruner.structure, random=random)
    left = {groups[number].name: "whole" for number in how.whole}
    left |= {groups[number].name: [m.tensor for m in members] for number, members in how.read.items()}
    assert left.keys().isdisjoint(how.why)
    return left | dict(how.why), how, pruner


def test_running_statistics_and_random_numbers_keep_units_computed():
    names = {"stem": "stem", "inner": "inner", "fc1": "fc1"}
    by_name, how, _ = found(ConvNet().double(), conv_structure(), [sc.Rule()], sc.ARM())
    assert by_name == {names["stem"]: ["inner.weight", "fc1.weight"], "inner": ["outer.weight"], "fc1": "whole"}
    assert how.binary == {0, 1, 2}
    by_name, how, _ = found(ConvNet().double(), conv_structure(), [sc.Rule()], sc.HardConcrete(), random=True)
    assert by_name["fc1"] == ["fc2.weight"]
    assert not how.whole
    assert not how.binary


@pytest.mark.parametrize("method", [sc.StraightThrough(), sc.DiffPrune(), sc.DifferentiableSparsification()])
def test_gates_that_hear_the_task_keep_all_units(method):
    by_name, *_ = found(ConvNet().double(), conv_structure(), [sc.Rule()], method)
    assert all(type(method).__name__ in reason for reason in by_name.values())


def test_what_is_never_left_out_says_why():
    x = torch.randn(2, 5, 3, dtype=DTYPE)
    structure = sc.trace(Normed().double(), (x,))
    by_name, *_ = found(Normed().double(), structure, [sc.Rule()], sc.ARM())
    assert "RMSNorm" in by_name["embed"]
    assert "no linear layer or convolution reads them" in by_name["first"]
    by_name, *_ = found(ConvNet().double(), conv_structure(), [sc.Rule(units="weights", where="fc1")], sc.ARM())
    assert by_name == {"fc1.weight": "it is of kind 'weights'"}


def test_weights_with_gates_of_their_own_are_read_whole():
    rules = [sc.Rule(), sc.Rule(units="weights", where="fc1")]
    by_name, *_ = found(ConvNet().double(), conv_structure(), rules, sc.ARM())
    assert by_name["stem"] == ["inner.weight"]
    assert by_name["fc1"] == ["fc2.weight"]


def test_maps_say_which_gates_must_be_open():
    _, how, pruner = found(ConvNet().double(), conv_structure(), [sc.Rule()], sc.ARM())
    maps = narrowable(pruner.groups, how, pruner.structure, None)
    # 4 units of the stem, 6 of the inner convolution, 5 of the linear layer: 15 gates, and the constant behind them.
    np.testing.assert_array_equal(maps.whole["fc1.bias"][0], [[10, 11, 12, 13, 14]])
    np.testing.assert_array_equal(maps.read["fc1.weight"][1], [np.repeat(np.arange(4), 9)])
    assert maps.read.keys() == {"inner.weight", "fc1.weight", "outer.weight"}
    assert maps.whole.keys() == {"fc1.weight", "fc1.bias", "fc2.weight"}


def test_every_place_of_a_tensor_is_found_under_its_plain_name():
    net = ConvNet().double()
    net.again = net.fc2
    structure = conv_structure()
    plain = dict(net.named_parameters())
    sc.attach(net, structure=structure)
    places = held(net)
    assert structure.shapes.keys() <= places.keys()
    for name in structure.shapes:
        if name in plain:
            assert all(place.store[place.key] is plain[name] for place in places[name])
    gated = {id(site.chain.original) for site in gated_sites(net)}
    (place,) = places["fc2.weight"]
    assert id(place.store[place.key]) in gated
    assert (place.owner, place.name) == (net.fc2, "weight")
