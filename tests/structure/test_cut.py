"""Cutting any module by a plan: everything that is kept stays what it was, and bad plans change nothing."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

from secateur.errors import CompactionError
from secateur.structure.cut import CutPlan, cut_
from secateur.structure.tensors import named_tensors, shapes_of


class Marked(nn.Parameter):
    """A parameter class of a user's own."""


class Net(nn.Module):
    """A layer of each kind whose integers describe its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.prelu = nn.PReLU(4)
        self.up = nn.ConvTranspose2d(4, 6, 2)
        self.embed = nn.Embedding(7, 4, padding_idx=5)
        self.layer_norm = nn.LayerNorm(4)
        self.rms = nn.RMSNorm(4)
        self.instance = nn.InstanceNorm1d(4, affine=True)
        self.bilinear = nn.Bilinear(4, 3, 2)
        self.plain = nn.Linear(4, 4)
        self.heads = 4
        self.split = [2, 2]
        self.register_buffer("table", torch.arange(4.0), persistent=False)


KEEP = (0, 2, 3)
PLAN = CutPlan(
    tensors={
        "conv.weight": {0: KEEP},
        "conv.bias": {0: KEEP},
        **{f"norm.{key}": {0: KEEP} for key in ("weight", "bias", "running_mean", "running_var")},
        "prelu.weight": {0: KEEP},
        "up.weight": {0: KEEP, 1: (1, 5)},
        "up.bias": {0: (1, 5)},
        "embed.weight": {0: (1, 5), 1: KEEP},
        "layer_norm.weight": {0: KEEP},
        "layer_norm.bias": {0: KEEP},
        "rms.weight": {0: KEEP},
        "instance.weight": {0: KEEP},
        "instance.bias": {0: KEEP},
        "bilinear.weight": {1: KEEP},
        "plain.weight": {0: (1,), 1: KEEP},
        "plain.bias": {0: (1,)},
        "table": {0: KEEP},
    },
    attributes={"heads": 3, "split": (1, 2)},
)


def test_tensors_are_the_selected_slices_and_integers_follow_their_shapes():
    dense = Net()
    small = copy.deepcopy(dense)
    cut_(small, PLAN)
    old, new = named_tensors(dense), named_tensors(small)
    for name, tensor in old.items():
        expected = tensor
        for dim, kept in PLAN.tensors.get(name, {}).items():
            expected = expected.index_select(dim, torch.tensor(kept))
        assert torch.equal(new[name], expected), name
    assert (small.conv.in_channels, small.conv.out_channels) == (3, 3)
    assert small.norm.num_features == 3
    assert small.instance.num_features == 3
    assert small.prelu.num_parameters == 3
    assert (small.up.in_channels, small.up.out_channels) == (3, 2)
    assert (small.embed.num_embeddings, small.embed.embedding_dim, small.embed.padding_idx) == (2, 3, 1)
    assert small.layer_norm.normalized_shape == (3,)
    assert small.rms.normalized_shape == (3,)
    assert (small.bilinear.in1_features, small.bilinear.in2_features, small.bilinear.out_features) == (3, 3, 2)
    assert (small.plain.in_features, small.plain.out_features) == (3, 1)
    assert (small.heads, small.split) == (3, [1, 2])
    assert "table" not in small.state_dict()
    small.layer_norm(torch.zeros(2, 3))
    small.rms(torch.zeros(2, 3))


def test_dtype_device_gradient_flag_class_marks_and_layout_stay():
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 2, 1)).to(
        dtype=torch.bfloat16, memory_format=torch.channels_last
    )
    net[0].weight = Marked(net[0].weight.data, requires_grad=False)
    net[0].weight.no_decay = True
    net[1].weight.grad = torch.zeros_like(net[1].weight)
    net[1].register_buffer("codes", torch.arange(6, dtype=torch.int8))
    cut_(
        net, CutPlan({"0.weight": {0: (1, 3)}, "0.bias": {0: (1, 3)}, "1.weight": {1: (1, 3)}, "1.codes": {0: (1, 3)}})
    )
    first, second = net[0].weight, net[1].weight
    assert type(first) is Marked
    assert first.no_decay
    assert not first.requires_grad
    assert second.requires_grad
    assert second.grad is None
    assert first.dtype is second.dtype is torch.bfloat16
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert first.stride() == (36, 1, 12, 4)
    assert net[1].codes.tolist() == [1, 3]
    assert net[1].codes.dtype is torch.int8


def test_a_transposed_layout_stays():
    net = nn.Linear(4, 3)
    net.weight = nn.Parameter(torch.randn(4, 3).t())
    cut_(net, CutPlan({"weight": {0: (0, 2)}}))
    assert net.weight.stride() == (1, 2)


def test_tied_tensors_and_shared_modules_stay_shared():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight
            self.block = nn.Linear(4, 4)
            self.again = self.block

    net = Tied()
    # The second name of each tensor is as good as the first.
    cut_(net, CutPlan({"head.weight": {1: (0, 3)}, "again.weight": {0: (0, 3), 1: (0, 3)}, "again.bias": {0: (0, 3)}}))
    assert net.head.weight is net.embed.weight
    assert net.embed.embedding_dim == net.head.in_features == 2
    assert net.again is net.block
    assert net.block.weight.shape == (2, 2)
    assert [name for name, _ in net.named_parameters()] == ["embed.weight", "block.weight", "block.bias"]


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_numbers_are_cut_alike(kind):
    mode = FakeTensorMode()
    if kind == "meta":
        with torch.device("meta"):
            net = Net()
    else:
        with mode:
            net = Net()
    cut_(net, PLAN)
    expected = Net()
    cut_(expected, PLAN)
    assert shapes_of(net) == shapes_of(expected)
    if kind == "fake":
        with mode:
            assert net.plain(torch.zeros(2, 3)).shape == (2, 1)
    else:
        assert net.plain(torch.zeros(2, 3, device="meta")).is_meta


def test_recurrent_layers_learn_of_their_new_weights():
    lstm = nn.LSTM(4, 3)
    cut_(lstm, CutPlan({"weight_ih_l0": {1: (0, 2)}}, attributes={"input_size": 2}))
    assert lstm(torch.zeros(5, 1, 2))[0].shape == (5, 1, 3)


def test_a_plan_survives_json():
    plan = CutPlan(
        tensors={"a": {0: (1, 2), 1: (1, 2)}},
        attributes={"n": 3, "shape": (2, 2), "eps": 1e-5},
        selects={"b": (1, 2)},
        dense={"a": (3, 3)},
        rescales={"a": (1.5, 1.0)},
    )
    data = json.loads(json.dumps(plan.to_json()))
    assert data["positions"] == [[1, 2]]
    assert CutPlan.from_json(data) == plan


def test_a_rescaled_weight_is_rounded_once():
    norm = nn.RMSNorm(4).to(torch.bfloat16)
    nn.init.normal_(norm.weight)
    old, factor = norm.weight.double(), 2**0.5
    cut_(norm, CutPlan({"weight": {0: (1, 3)}}, {"eps": 0.5}, rescales={"weight": (factor, 1.0)}))
    assert torch.equal(norm.weight, ((old[[1, 3]] + 1) * factor - 1).bfloat16())
    assert norm.eps == 0.5


@pytest.mark.parametrize("data", [{}, {"positions": 3}, {**CutPlan().to_json(), "tensors": {"a": {"0": 7}}}, []])
def test_other_json_is_refused(data):
    with pytest.raises(CompactionError, match="does not describe a cut"):
        CutPlan.from_json(data)


def test_two_plans_in_a_row_are_one():
    first = CutPlan({"0.weight": {0: (0, 2, 3)}, "0.bias": {0: (0, 2, 3)}, "1.weight": {1: (0, 2, 3)}}, {"0.tag": 3})
    second = CutPlan({"0.weight": {0: (1, 2), 1: (4,)}, "0.bias": {0: (1, 2)}, "1.weight": {1: (1, 2)}}, {"0.tag": 2})
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    net[0].tag = 4
    twice, once = copy.deepcopy(net), copy.deepcopy(net)
    cut_(twice, first)
    cut_(twice, second)
    cut_(once, first.then(second))
    assert once[0].tag == 2
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))
    selecting = CutPlan(selects={"0": (1,)})
    with pytest.raises(CompactionError, match="selected already"):
        selecting.then(selecting)


class TestBadPlans:
    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({"nothing": {0: (0,)}}, "nothing: no such parameter or buffer"),
            ({"0.weight": {2: (0,)}}, "has 2 dimensions, and dimension 2"),
            ({"0.weight": {0: ()}}, "at least one position"),
            ({"0.weight": {0: (0, 3)}}, r"must ascend within \[0, 3\)"),
            ({"0.weight": {0: (-1, 0)}}, "must ascend"),
            ({"0.weight": {0: (1, 1)}}, "must ascend"),
            ({"0.weight": {0: (2, 1)}}, "must ascend"),
        ],
    )
    def test_each_says_what_is_wrong_and_changes_nothing(self, tensors, message):
        net = nn.Sequential(nn.Linear(4, 3))
        with pytest.raises(CompactionError, match=message):
            cut_(net, CutPlan({"0.bias": {0: (0,)}, **tensors}))
        assert shapes_of(net) == {"0.weight": (3, 4), "0.bias": (3,)}

    def test_all_problems_come_at_once(self):
        with pytest.raises(CompactionError) as caught:
            cut_(nn.Linear(4, 3), CutPlan({f"x{i}": {0: (0,)} for i in range(10)}))
        assert "x0" in str(caught.value)
        assert "and 2 more" in str(caught.value)

    def test_an_unknown_attribute_is_refused(self):
        net = nn.Linear(4, 3)
        with pytest.raises(CompactionError, match="n_heads: no such attribute"):
            cut_(net, CutPlan({"weight": {0: (0,)}, "bias": {0: (0,)}}, attributes={"n_heads": 2}))
        assert net.out_features == 3

    def test_a_plan_for_another_shape_is_refused(self):
        with pytest.raises(CompactionError, match=r"weight: shape \(3, 4\), expected \(3, 5\)"):
            cut_(nn.Linear(4, 3), CutPlan(dense={"weight": (3, 5), "bias": (3,)}))

    def test_tied_tensors_cannot_be_cut_in_two_ways(self):
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        net[1].weight = net[0].weight
        with pytest.raises(CompactionError, match=r"1\.weight: is the same tensor as 0\.weight"):
            cut_(net, CutPlan({"0.weight": {0: (1,)}, "1.weight": {0: (2,)}}))

    def test_computed_weights_are_refused(self):
        net = nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)))
        for name in ("0.weight", "0.parametrizations.weight.original"):
            with pytest.raises(CompactionError, match=r"torch\.nn\.utils\.parametrize"):
                cut_(net, CutPlan({name: {0: (1,)}}))

    def test_a_tensor_tied_to_a_computed_weight_is_refused(self):
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        net[1].weight = net[0].weight
        register_parametrization(net[1], "weight", nn.Identity())
        with pytest.raises(CompactionError, match=r"torch\.nn\.utils\.parametrize"):
            cut_(net, CutPlan({"0.weight": {0: (1,)}}))

    def test_lazy_modules_are_refused(self):
        with pytest.raises(CompactionError, match="run the lazy module once"):
            cut_(nn.LazyLinear(3), CutPlan({"weight": {0: (1,)}}))
