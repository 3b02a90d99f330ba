from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.gated import DTYPE, ConvNet, conv_structure
from torch import Tensor, nn

from secateur.budgets.costs import CostModel
from secateur.errors import GateError
from secateur.pruning.inputs import inputs, layer_of, owners, with_inputs
from secateur.pruning.rule import Rule
from secateur.structure.trace import trace


def test_a_group_for_each_layer() -> None:
    groups = inputs(ConvNet(), conv_structure(), Rule(units="inputs"))
    assert [(group.name, group.size, group.kind) for group in groups] == [
        ("stem.inputs", 2, "inputs"),
        ("inner.inputs", 4, "inputs"),
        ("outer.inputs", 6, "inputs"),
        ("fc1.inputs", 36, "inputs"),
        ("fc2.inputs", 5, "inputs"),
    ]
    assert [layer_of(group) for group in groups] == ["stem", "inner", "outer", "fc1", "fc2"]
    assert [(m.tensor, m.dim, m.consumer) for m in groups[3].members] == [("fc1.weight", 1, True)]


def test_owners_are_the_units_whose_values_an_input_reads() -> None:
    by_name = {group.name: group for group in inputs(ConvNet(), conv_structure(), Rule(units="inputs"))}
    starts = (0, 4, 10)
    assert owners(conv_structure(), by_name["stem.inputs"], starts).tolist() == [-1, -1]
    assert owners(conv_structure(), by_name["fc1.inputs"], starts).tolist() == np.repeat(range(4), 9).tolist()
    assert owners(conv_structure(), by_name["fc2.inputs"], starts).tolist() == list(range(10, 15))


def test_counting_inputs_gives_the_cost_of_the_layers_that_are_left() -> None:
    structure = conv_structure()
    groups = inputs(ConvNet(), structure, Rule(units="inputs", where=("stem", "fc1")))
    counted = with_inputs(structure, groups)
    costs = CostModel(counted)
    assert costs.dense == CostModel(structure).dense
    is_open = torch.ones(costs.total, dtype=torch.bool)
    is_open[4:7] = False  # three units of inner
    is_open[15] = False  # one of the two inputs of stem
    is_open[17:40] = False  # all but 13 inputs of fc1
    found = costs.exact(is_open)
    params = (1 * 9 * 4 + 4) + 8 + (4 * 9 * 3 + 3) + 6 + (3 * 4 + 4) + (13 * 5 + 5) + (5 * 3 + 3)
    macs = 4 * (36 * 9 * 4 + 36 * 9 * 4 * 3 + 36 * 3 * 4 + 13 * 5 + 15)
    assert (found.params, found.macs) == (params, macs)


class Mixed(nn.Module):
    """Layers whose inputs cannot be selected one by one, and one square layer that can."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 1)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.unread = nn.Linear(3, 3)
        self.last = nn.Linear(4, 2)
        self.tied = nn.Linear(4, 2)
        self.tied.weight = self.last.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.depthwise(self.first(x))).mean((2, 3))
        return self.last(h) + self.tied(h)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("depthwise", "reads each input in one of 4 convolution groups"),
        ("up", "a transposed convolution"),
        ("unread", "does not call it"),
        ("tied", "tied"),
        ("last", "tied"),
    ],
)
def test_layers_that_cannot_select_are_refused_with_the_reason(where: str, message: str) -> None:
    net = Mixed().double()
    structure = trace(net, (torch.randn(2, 2, 5, 5, dtype=DTYPE),))
    with pytest.raises(GateError, match=f"{where}: .*{message}"):
        inputs(net, structure, Rule(units="inputs", where=where))
    assert [group.name for group in inputs(net, structure, Rule(units="inputs"))] == ["first.inputs"]
