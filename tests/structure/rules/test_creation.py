"""Tensors out of nothing: the same everywhere, different by position, or random."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.law import Row, alone, check_cut, conv_net, given, hold, hold_in_a_model, in_models, linear_net, row
from torch import nn

H = given((2, 8, 3), 1)
FREE = "abcdefgh"
NONE = "........"
FIXED = "meets another tensor's dimension that cannot be cut"

ROWS: dict[str, Row] = {
    "zeros as wide": row(lambda h: h * torch.zeros_like(h), H, FREE),
    "ones of its own size": row(lambda h: h * h.new_ones(h.shape), H, FREE),
    "a full tensor of its own size": row(lambda h: h + torch.full((h.shape[1], 1), 0.3).double(), H, FREE),
    "ones of a written size": row(lambda h: h * torch.ones(8, 1), H, NONE, "with sizes of its own", trial=True),
    "ones ties what meets at them": row(
        lambda a, b: (torch.ones_like(a) * a, torch.zeros_like(a) + b), H, H, FREE, FREE
    ),
    "positions of its own size": row(lambda h: h * torch.arange(h.shape[1])[:, None], H, NONE, FIXED),
    "identity": row(lambda h: torch.eye(8).double() @ h, H, NONE, "is contracted in a product of two activations"),
    "random numbers": row(lambda h: h + torch.randn_like(h) * 0, H, NONE, FIXED),
    "random numbers written in place": row(lambda h: h + torch.empty_like(h).normal_() * 0, H, NONE, FIXED),
    "random numbers around": row(lambda h: torch.normal(h, 1.0) * 0, H, NONE, "is the mean or scale of random numbers"),
    "Gumbel softmax over another dimension": row(lambda h: F.gumbel_softmax(h, dim=2) * 0, H, NONE, FIXED),
    "a mask of dropout": row(lambda h: h * torch.empty_like(h).bernoulli_(0.5) * 0, H, FREE),
    "random numbers for each example": row(lambda h: h + torch.randn(2, 1, 3).double() * 0, H, FREE),
}


@pytest.mark.parametrize("one", alone(ROWS))
def test_commutes_with_removal(one: Row) -> None:
    hold(one)


@pytest.mark.parametrize("one", in_models(ROWS))
def test_in_a_model(one: Row) -> None:
    hold_in_a_model(one)


def test_a_uniform_constant_says_nothing_and_an_uneven_one_freezes() -> None:
    uniform = check_cut(linear_net(lambda net, h: h * torch.full((h.shape[-1],), 0.5)), torch.randn(2, 4))
    uneven = check_cut(linear_net(lambda net, h: h * torch.tensor([1.0] * 7 + [2.0])), torch.randn(2, 4))
    assert [group.size for group in uniform.groups] == [8]
    assert not uneven.groups
    assert FIXED in uneven.why_frozen("a.weight")


def test_a_uniform_tensor_ties_the_sizes_of_all_that_meet_it() -> None:
    """One empty bias added in two layers has one size, and so have they."""

    def between(net: nn.Module, h: torch.Tensor) -> torch.Tensor:
        bias = torch.zeros(h.shape[-1])
        return net.mid(h + bias).relu() + bias

    tied = check_cut(linear_net(between, mid=nn.Linear(8, 8)), torch.randn(2, 4))
    assert [group.size for group in tied.groups] == [8]


def test_a_box_filter_of_each_channel() -> None:
    def between(net: nn.Module, h: torch.Tensor) -> torch.Tensor:
        return F.conv2d(h, torch.ones(h.shape[1], 1, 2, 2, dtype=h.dtype), groups=h.shape[1])

    assert [group.size for group in check_cut(conv_net(between), torch.randn(2, 3, 4, 4)).groups] == [8]


def test_equal_values_in_another_shape_leave_their_number() -> None:
    def between(net: nn.Module, h: torch.Tensor) -> torch.Tensor:
        return h + torch.zeros(h.shape[-1] // 2, 2).view(-1)

    (group,) = check_cut(linear_net(between), torch.randn(2, 4)).groups
    assert group.consumers[0].index.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
