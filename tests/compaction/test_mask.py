"""Closing units by index sets: zeros where they are read, and plans that fit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from secateur.compaction.mask import checked_keep, mask, plan_of
from secateur.errors import CompactionError
from secateur.pruning.inputs import with_inputs
from secateur.structure.groups import Group, Member
from secateur.structure.tensors import named_tensors
from secateur.structure.trace import trace


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2)
    )


@pytest.fixture(scope="module")
def structure(net):
    return trace(net, (torch.zeros(2, 3, 2, 2),))


def test_zeros_are_where_units_are_read_and_nowhere_else(net, structure):
    before = copy.deepcopy(net)
    masked = named_tensors(mask(net, structure, {"0": torch.tensor([3, 1])}))
    dense = named_tensors(net)
    assert not masked["2.weight"][:, [0, 2]].any()
    assert torch.equal(masked["2.weight"][:, [1, 3]], dense["2.weight"][:, [1, 3]])
    assert all(torch.equal(masked[name], dense[name]) for name in dense if name != "2.weight")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.state_dict().values(), strict=True))


def test_a_unit_with_several_positions_is_zero_at_all_of_them(net, structure):
    masked = mask(net, structure, {"2": torch.tensor([0, 1, 2, 4])})
    assert (masked[5].weight == 0).all(0).nonzero().flatten().tolist() == [12, 13, 14, 15]


def test_a_group_that_is_absent_is_kept_whole(net, structure):
    masked = mask(net, structure, {})
    assert all(torch.equal(a, b) for a, b in zip(masked.parameters(), net.parameters(), strict=True))


def test_keep_is_sorted_and_on_the_cpu(structure):
    assert checked_keep(structure, {"2": torch.tensor([4, 0], dtype=torch.uint8)})["2"].tolist() == [0, 4]
    with pytest.raises(CompactionError, match="no such group"):
        checked_keep(structure, {"5": torch.tensor([0])})


def test_input_groups_become_selections_among_what_is_left(structure):
    member = Member("5.weight", 1, np.arange(20).reshape(-1, 1), consumer=True, carrier=False)
    fine = with_inputs(structure, (Group("5.inputs", 20, (member,), kind="inputs"),))
    plan = plan_of(fine, {"2": torch.tensor([1, 3]), "5.inputs": torch.tensor([0, 5, 12, 15])})
    # Channels 1 and 3 leave positions 4 to 7 and 12 to 15, of which the layer reads 5, 12 and 15.
    assert plan.tensors["5.weight"][1] == (5, 12, 15)
    assert plan.selects == {"5": (1, 4, 7)}
    assert plan_of(fine, {"5.inputs": torch.arange(20)}).selects == {}
