"""Masked and compact are one function: over networks, index sets, dtypes, devices and ways to cut."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from secateur.compaction.compact import compact, cut_of, mask
from secateur.compaction.proof import prove
from secateur.errors import CompactionError
from secateur.pruning.inputs import with_inputs
from secateur.recipes.networks import NETWORKS
from secateur.structure.cut import CutPlan, cut_
from secateur.structure.groups import Group, Member
from secateur.structure.structure import Structure
from secateur.structure.tensors import named_tensors, shapes_of
from secateur.structure.trace import trace


class Residual(nn.Module):
    """A sum of two branches, BatchNorm and dropout: the stem's channels live in four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn0 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x)).relu()
        x = x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return self.fc(self.drop(F.max_pool2d(x.relu(), 2).flatten(1)))


class Separable(nn.Module):
    """Depthwise convolutions between pointwise ones."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 8, 1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn = nn.BatchNorm2d(8)
        self.project = nn.Conv2d(8, 5, 1)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn(self.depth(F.relu6(self.expand(x)))))
        return self.fc(self.project(x).mean((2, 3)))


class Tied(nn.Module):
    """An autoencoder that decodes with the transposed weight of its encoder, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 9)
        self.shared = nn.Linear(9, 9)
        self.again = self.shared
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.encode(x))
        h = self.again(torch.tanh(self.shared(h)))
        return F.linear(h, self.encode.weight.t(), self.bias)


BUILDERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (3, 8, 8)),
    "separable": (Separable, (3, 8, 8)),
    "tied": (Tied, (6,)),
    **{name: (network.build, network.shape) for name, network in NETWORKS.items()},
}


@functools.cache
def structure_of(name: str) -> Structure:
    build, shape = BUILDERS[name]
    return trace(build(), (torch.zeros(3, *shape),))


def traced(name: str) -> tuple[nn.Module, Structure, tuple[Tensor]]:
    build, shape = BUILDERS[name]
    structure = structure_of(name)
    assert structure.groups
    return build(), structure, (torch.randn(3, *shape),)


def kept(structure: Structure, share: float) -> dict[str, Tensor]:
    """A random share of each group's units."""
    return {group.name: torch.randperm(group.size)[: round(share * group.size)] for group in structure.groups}


@pytest.mark.parametrize("share", [0.5, 0.0])
@pytest.mark.parametrize("name", BUILDERS)
def test_masked_equals_compact(name, share):
    net, structure, inputs = traced(name)
    keep = kept(structure, share)
    small = compact(net, structure, keep)
    proof = prove(net, small, structure, keep, inputs)
    assert proof.relative < 1e-12
    assert len(proof.checked) == 5
    assert not proof.skipped
    n_params = sum(parameter.numel() for parameter in small.parameters())
    assert n_params == structure.cost(keep).params < structure.cost().params


def test_a_closed_group_keeps_one_unit_that_feeds_nothing():
    net, structure, _ = traced("residual")
    small = compact(net, structure, {"conv1": torch.tensor([], dtype=torch.int64)})
    assert small.conv1.weight.shape[0] == 1
    assert small.conv1.weight.any()
    assert not small.conv2.weight.any()


def test_the_model_is_not_touched_by_a_copy_and_is_the_result_in_place():
    net, structure, inputs = traced("residual")
    before = copy.deepcopy(net)
    keep = kept(structure, 0.5)
    small = compact(net, structure, keep, examples=inputs)
    assert small is not net
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.state_dict().values(), strict=True))
    assert cut_of(net) is None
    for examples in (None, inputs):
        twin = copy.deepcopy(net)
        assert compact(twin, structure, keep, in_place=True, examples=examples) is twin
        assert shapes_of(twin) == shapes_of(small)
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), small.parameters(), strict=True))


def test_marks_of_parameters_stay_in_a_copy_as_they_do_in_place():
    net, structure, x = traced("residual")
    net = copy.deepcopy(net)
    for name, parameter in net.named_parameters():
        parameter.named, parameter._no_weight_decay = name, parameter.dim() == 1
    small = compact(net, structure, kept(structure, 0.5), examples=x)
    for made in (small, mask(net, structure, {}), compact(net, structure, kept(structure, 0.5), in_place=True)):
        assert all(p.named == name and p._no_weight_decay == (p.dim() == 1) for name, p in made.named_parameters())


def test_the_plan_rebuilds_the_small_model_from_a_fresh_one():
    net, structure, _ = traced("separable")
    small = compact(net, structure, kept(structure, 0.4))
    plan = cut_of(small)
    assert plan.dense == shapes_of(net)
    fresh = Separable()
    cut_(fresh, CutPlan.from_json(plan.to_json()))
    assert shapes_of(fresh) == shapes_of(small)


def test_cutting_twice_gives_one_plan_from_the_dense_model():
    net, structure, inputs = traced("residual")
    once = compact(net, structure, {"conv1": torch.arange(1, 9)})
    again = trace(once, inputs)
    twice = compact(once, again, {"conv1": torch.tensor([0, 4])}, examples=inputs)
    direct = compact(net, structure, {"conv1": torch.tensor([1, 5])})
    assert cut_of(twice) == cut_of(direct)
    assert torch.equal(twice.conv2.weight, direct.conv2.weight)


def test_keep_is_a_set_in_any_order_and_integer_type():
    net, structure, _ = traced("residual")
    a = compact(net, structure, {"conv1": torch.tensor([7, 1, 3], dtype=torch.int32)})
    b = compact(net, structure, {"conv1": torch.tensor([1, 3, 7])})
    assert torch.equal(a.conv1.weight, b.conv1.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_pass_through(dtype):
    net, structure, (x,) = traced("residual")
    net = net.to(dtype)
    keep = kept(structure, 0.5)
    small = compact(net, structure, keep, examples=(x.to(dtype),))
    assert all(tensor.dtype in (dtype, torch.int64) for tensor in named_tensors(small).values())


def test_meta_and_fake_models_are_cut():
    structure = traced("residual")[1]
    keep = kept(structure, 0.5)
    with torch.device("meta"):
        net = Residual()
    small = compact(net, structure, keep, examples=(torch.zeros(2, 3, 8, 8, device="meta"),))
    assert small.conv1.weight.is_meta
    assert small.conv1.out_channels == 6
    with FakeTensorMode():
        fake = Residual()
    assert compact(fake, structure, keep).conv1.weight.shape == small.conv1.weight.shape


class TestInputs:
    """Groups of single inputs, finer than what feeds their layer."""

    def structure(self) -> tuple[nn.Module, Structure, tuple[Tensor]]:
        net, structure, inputs = traced("residual")
        member = Member("fc.weight", 1, np.arange(128).reshape(-1, 1), consumer=True, carrier=False)
        return net, with_inputs(structure, (Group("fc.inputs", 128, (member,), kind="inputs"),)), inputs

    @pytest.mark.parametrize("share", [0.5, 0.1])
    def test_a_layer_selects_among_what_the_other_groups_leave(self, share):
        net, structure, inputs = self.structure()
        keep = kept(structure, 0.5) | {"fc.inputs": torch.randperm(128)[: round(share * 128)]}
        small = compact(net, structure, keep, examples=inputs)
        assert small.fc.in_features == len(small.fc.selected) < 64
        assert prove(net, small, structure, keep, inputs).relative < 1e-12

    def test_no_selection_where_all_that_is_left_is_read(self):
        net, structure, inputs = self.structure()
        small = compact(net, structure, {"stem": torch.arange(4), "fc.inputs": torch.arange(64)}, examples=inputs)
        assert type(small.fc) is nn.Linear
        assert small.fc.in_features == 64

    @pytest.mark.parametrize("inputs_kept", [torch.arange(0), torch.arange(100, 104)])
    def test_nothing_left_to_read_is_one_input_times_zero(self, inputs_kept):
        net, structure, inputs = self.structure()
        small = compact(net, structure, {"stem": torch.arange(4), "fc.inputs": inputs_kept}, examples=inputs)
        assert small.fc.in_features == 1
        assert not small.fc.weight.any()


class TestBadInput:
    @pytest.mark.parametrize(
        ("keep", "message"),
        [
            ({"nothing": torch.arange(2)}, "'nothing': no such group.* The groups are conv1; stem"),
            ({"conv1": torch.tensor([0, 12])}, r"'conv1': positions from 0 to 12, expected them in \[0, 12\)"),
            ({"conv1": torch.tensor([-1, 3])}, "positions from -1 to 3"),
            ({"conv1": torch.tensor([3, 3])}, "named twice"),
            ({"conv1": torch.ones(12, dtype=torch.bool)}, r"open\.nonzero\(\)"),
            ({"conv1": torch.tensor([1.0])}, "expected integer positions"),
            ({"conv1": torch.tensor([])}, "expected integer positions"),
            ({"conv1": torch.tensor([[1]])}, "expected one dimension"),
            ({"conv1": [1, 2]}, "got list, expected a tensor"),
        ],
    )
    @pytest.mark.parametrize("verb", [mask, compact])
    def test_each_index_set_is_checked(self, keep, message, verb):
        net, structure, _ = traced("residual")
        with pytest.raises(CompactionError, match=message):
            verb(net, structure, keep)

    def test_all_problems_come_at_once(self):
        net, structure, _ = traced("residual")
        with pytest.raises(CompactionError, match=r"'conv1': .*'stem': "):
            mask(net, structure, {"conv1": torch.tensor([99]), "stem": torch.tensor([99])})

    def test_a_model_that_cannot_be_copied_can_be_cut_in_place(self):
        net, structure, _ = traced("residual")
        net.last = net.fc.weight * 2
        with pytest.raises(CompactionError, match="in_place=True"):
            compact(net, structure, {"conv1": torch.arange(3)})
        assert compact(net, structure, {"conv1": torch.arange(3)}, in_place=True).conv1.out_channels == 3

    @pytest.mark.parametrize("verb", [mask, compact])
    def test_a_structure_of_another_model_is_refused(self, verb):
        _, structure, _ = traced("residual")
        with pytest.raises(CompactionError, match="Trace the model as it is now"):
            verb(Separable(), structure, {})

    def test_a_wrong_structure_fails_its_proof_and_nothing_changes(self):
        net, structure, inputs = traced("residual")
        # As if the trace had missed that the stem's channels are also those of the residual sum's second branch.
        wrong = replace(
            structure,
            groups=tuple(
                replace(group, members=tuple(m for m in group.members if not m.tensor.startswith("conv2")))
                for group in structure.groups
            ),
        )
        before = shapes_of(net)
        with pytest.raises(CompactionError, match="fails where the dense one runs; nothing was changed"):
            compact(net, wrong, {"stem": torch.arange(4)}, examples=inputs, in_place=True)
        assert shapes_of(net) == before
        assert cut_of(net) is None
