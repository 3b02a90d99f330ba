"""Which closed units stay so that widths are multiples."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.compaction.test_compact import Residual, kept
from torch import Tensor, nn

import secateur as sc
from secateur.compaction.compact import compact
from secateur.compaction.proof import prove
from secateur.pruning.inputs import with_inputs
from secateur.structure.groups import Axis, Group, Member
from secateur.structure.structure import Structure


class Flat(nn.Module):
    """Channels that become several features each, and channels that meet others in a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(3, 24, 3, padding=1)
        self.both = nn.Conv2d(44, 18, 1)
        self.fc = nn.Linear(18 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        return self.fc(self.both(both).relu().flatten(1))


class Heads(nn.Module):
    """Six heads of eight features with a bias for each head, and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(10, 3 * 48)
        self.bias = nn.Parameter(torch.randn(6, 1, 1))
        self.out = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 8)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / 8**0.5 + self.bias
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@functools.cache
def structure_of_flat() -> Structure:
    with torch.random.fork_rng():
        return sc.trace(Flat(), (torch.zeros(2, 3, 4, 4),))


def flat() -> tuple[Flat, Structure]:
    return Flat(), structure_of_flat()


def first(n: int) -> Tensor:
    return torch.arange(n)


@pytest.mark.parametrize(("count", "rounded"), [(0, 8), (1, 8), (8, 8), (9, 16), (16, 16), (17, 17), (20, 20)])
def test_the_next_multiple_within_the_group(count: int, rounded: int) -> None:
    _, structure = flat()
    found = sc.rounded_keep(structure, {"left": first(count)}, 8)
    assert len(found["left"]) == rounded
    assert set(range(count)) <= set(found["left"].tolist())


def test_the_producer_counts_where_each_unit_has_many_positions_in_the_consumer() -> None:
    net, structure = flat()
    keep = sc.rounded_keep(structure, {"both": torch.tensor([2, 17])}, 8)
    assert keep["both"].tolist() == [0, 1, 2, 3, 4, 5, 6, 17]
    assert compact(net, structure, {"both": first(2)}, round_to=8).fc.in_features == 8 * 16


def test_groups_that_meet_in_one_width_are_rounded_each() -> None:
    net, structure = flat()
    small = compact(net, structure, {"left": first(3), "right": first(9)}, round_to=8)
    assert (small.left.out_channels, small.right.out_channels, small.both.in_channels) == (8, 16, 24)


def test_heads_of_eight_features_are_multiples_already() -> None:
    net = Heads()
    structure = sc.trace(net, (torch.randn(2, 5, 10),))
    (heads,) = structure.groups
    assert heads.size == 6
    assert any(member.index.shape[1] == 1 for member in heads.members)  # the bias is no width
    assert len(sc.rounded_keep(structure, {heads.name: torch.tensor([1, 4])}, 8)[heads.name]) == 2
    assert len(sc.rounded_keep(structure, {heads.name: torch.tensor([1, 4])}, 32)[heads.name]) == 4


def test_positions_that_always_stay_count_where_only_one_group_is_beside_them() -> None:
    _, structure = flat()
    (left,) = (number for number, group in enumerate(structure.groups) if group.name == "left")
    alone = replace(structure, widths=(Axis(5, ((left, 1),)),))
    assert len(sc.rounded_keep(alone, {"left": first(4)}, 8)["left"]) == 11
    at_odds = replace(structure, widths=(Axis(5, ((left, 1),)), Axis(0, ((left, 1),))))
    assert len(sc.rounded_keep(at_odds, {"left": first(4)}, 8)["left"]) == 8  # one of both, the nearer
    none = replace(structure, widths=())
    assert len(sc.rounded_keep(none, {"left": first(4)}, 8)["left"]) == 4


@pytest.mark.parametrize("share", [0.6, 0.3, 0.0])
@pytest.mark.parametrize("round_to", [1, 4, 8, 64])
def test_rounded_is_the_same_function_with_the_cost_that_it_says(share: float, round_to: int) -> None:
    net, structure = flat()
    inputs = (torch.randn(3, 3, 4, 4),)
    keep = kept(structure, share)
    small = compact(net, structure, keep, round_to=round_to, examples=inputs)
    assert prove(net, small, structure, keep, inputs, round_to=round_to).relative < 1e-12
    n_params = sum(parameter.numel() for parameter in small.parameters())
    assert n_params == structure.cost(sc.rounded_keep(structure, keep, round_to)).params
    if round_to == 8:
        assert small.right.out_channels % 8 == 0


def test_rounding_next_to_an_rms_norm_is_exact() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(4, 24), nn.RMSNorm(24, eps=1e-3), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.norm(self.up(x)))

    net = Normed().double()
    inputs = (torch.randn(3, 4, dtype=torch.float64),)
    structure = sc.trace(net, inputs)
    assert structure.groups[0].at_producers
    keep = {structure.groups[0].name: torch.tensor([3, 9, 22])}
    small = compact(net, structure, keep, round_to=8, examples=inputs)
    assert small.norm.normalized_shape == (8,)
    assert int((small.up.weight == 0).all(1).sum()) == 5
    assert prove(net, small, structure, keep, inputs, round_to=8).relative < 1e-12


@pytest.mark.parametrize(("share", "reads"), [(0.5, 32), (0.3, 24), (0.0, 8)])
def test_single_inputs_are_rounded_to_what_is_read(share: float, reads: int) -> None:
    net = Residual()
    inputs = (torch.randn(3, 3, 8, 8),)
    structure = sc.trace(net, inputs)
    member = Member("fc.weight", 1, np.arange(128).reshape(-1, 1), consumer=True, carrier=False)
    structure = with_inputs(structure, (Group("fc.inputs", 128, (member,), kind="inputs"),))
    chosen = torch.arange(128)[: round(share * 64)]
    keep = {"stem": torch.arange(4), "fc.inputs": chosen}
    small = compact(net, structure, keep, round_to=8, examples=inputs)
    assert small.fc.in_features == reads
    assert prove(net, small, structure, keep, inputs, round_to=8).relative < 1e-12


@pytest.mark.parametrize("bad", [0, -8, 2.0, True, "8", None])
def test_what_is_no_positive_integer_is_refused(bad: object) -> None:
    _, structure = flat()
    with pytest.raises(sc.CompactionError, match=r"round_to=.*; expected a positive integer such as 8"):
        sc.rounded_keep(structure, {"left": first(3)}, bad)
