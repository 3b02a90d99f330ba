from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.gated import DTYPE, ConvNet, conv_structure, images
from torch import Tensor, nn

import secateur as sc
from secateur.pruning.draw import Draw
from secateur.pruning.gateset import extended
from secateur.pruning.narrowable import ways
from secateur.pruning.narrowing import Narrowing
from secateur.structure.tensors import named_tensors


class Stack(nn.Module):
    """Nothing but products with weights, so that all multiply-accumulates follow the units."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.fc1 = nn.Linear(6 * 16, 8)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(torch.sigmoid(self.conv(x)).flatten(1))))


@cache
def stack_structure() -> sc.Structure:
    with torch.random.fork_rng():
        return sc.trace(Stack().double(), (images(1),))


def made(net: nn.Module, structure: sc.Structure) -> tuple[Narrowing, sc.Pruner]:
    pruner = sc.attach(net, structure=structure, method=sc.ARM())
    groups = pruner.groups
    how = ways(groups, [sc.ARM()] * len(groups), net, structure, random=False)
    gone = torch.zeros(sum(group.size for group in groups), dtype=torch.bool)
    return Narrowing(net, groups, how, structure, gone, None), pruner


def draw_of(values: Tensor) -> Draw:
    return Draw([None], extended(values.to(DTYPE)))


def test_the_share_is_that_of_the_cost_of_what_is_left():
    net, structure = Stack().double(), stack_structure()
    narrowing, _ = made(net, structure)
    dense = structure.cost().macs
    assert narrowing.macs == dense
    for seed in range(5):
        values = (torch.rand(14, generator=torch.Generator().manual_seed(seed)) < 0.5).float()
        values[0] = values[6] = 1.0
        keep = {"conv": values[:6].nonzero().flatten(), "fc1": values[6:].nonzero().flatten()}
        narrowing.begin(draw_of(values))
        shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(net).items()}
        assert net.fc1.in_features == 16 * len(keep["conv"])
        narrowing.end()
        assert narrowing.share == pytest.approx(structure.cost(keep).macs / dense)
        small = sc.compact(Stack().double(), structure, keep)
        assert shapes["conv.weight"] == tuple(small.conv.weight.shape)
        assert shapes["fc1.parametrizations.weight.original"] == tuple(small.fc1.weight.shape)


def test_units_that_are_only_read_count_where_they_are_read():
    structure = conv_structure()
    narrowing, _ = made(ConvNet().double(), structure)
    values = torch.ones(15)
    values[4:7] = 0.0  # half of the inner convolution's units, which BatchNorm follows
    narrowing.begin(draw_of(values))
    narrowing.end()
    saved = 4 * 3 * 4 * 36  # examples, inputs, outputs and positions of the 1 x 1 convolution behind
    assert narrowing.share == pytest.approx(1 - saved / structure.cost().macs)


def test_it_narrows_up_to_its_limit():
    net, structure = Stack().double(), stack_structure()
    narrowing, _ = made(net, structure)
    values = torch.ones(14)
    values[:3] = 0.0
    for limit, passes in ((0.4, 0), (0.6, 1), (1.0, 2)):
        narrowing.limit = limit
        draw = draw_of(values)
        narrowing.begin(draw)
        narrowing.end()
        assert (narrowing.passes, draw.narrowed) == (passes, passes > 0)
    narrowing.begin(draw_of(torch.ones(14)))
    narrowing.end()
    assert narrowing.passes == 2


def test_a_pattern_leaves_the_same_share_of_every_group():
    narrowing, _ = made(ConvNet().double(), conv_structure())
    values = narrowing.pattern(0.5, np.random.default_rng(0))
    assert [int(part.sum()) for part in torch.split(values, [4, 6, 5])] == [2, 3, 2]
    assert set(values.tolist()) == {0.0, 1.0}


def test_a_pass_within_a_pass_and_one_that_fails_leave_nothing():
    net, structure = Stack().double(), stack_structure()
    narrowing, pruner = made(net, structure)
    before = {name: id(tensor) for name, tensor in named_tensors(net).items()}
    values = torch.ones(14)
    values[::2] = 0.0
    narrowing.begin(draw_of(values))
    narrowing.begin(draw_of(1 - values))
    narrowing.end()
    assert {name: id(tensor) for name, tensor in named_tensors(net).items()} == before
    narrowing._owners.append((net, [("missing", narrowing._cuts[0])]))
    narrowing._cuts[0].places.append(None)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        narrowing.begin(draw_of(values))
    assert {name: id(tensor) for name, tensor in named_tensors(net).items()} == before
    x = images()
    assert torch.isfinite(pruner.loss(lambda: F.cross_entropy(net(x), torch.zeros(4, dtype=torch.int64))))
