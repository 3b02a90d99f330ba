"""Normalisations: channels with statistics of their own pass, shared statistics freeze, groups go whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.law import (
    Row,
    alone,
    check_cut,
    conv_net,
    given,
    hold,
    hold_in_a_model,
    in_models,
    law,
    linear_net,
    row,
    sizes,
)
from torch import nn

H = given((2, 8, 3), 1)
LAST = given((2, 3, 8), 2)
IM = given((2, 8, 4, 4), 1)
FREE = "abcdefgh"
NONE = "........"
W = given((8,), 0, weight=True)

ROWS: dict[str, Row] = {
    "LayerNorm": row(
        lambda h, w, b: F.layer_norm(h, h.shape[-1:], w, b), LAST, W, W, NONE, NONE, NONE,
        "(LayerNorm's mean and variance would change)",
    ),
    "LayerNorm over other dimensions": row(lambda h: F.layer_norm(h, (3,)), H, FREE),
    "LayerNorm over several": row(lambda h: F.layer_norm(h, h.shape[1:]), H, NONE, "(LayerNorm's mean and variance"),
    "LayerNorm of each head": row(
        lambda h: F.layer_norm(h.unflatten(1, (-1, 2)), (2, 3)).flatten(1, 2), H, "aabbccdd"
    ),
    "RMSNorm over other dimensions": row(lambda h: F.rms_norm(h, (3,)), H, FREE),
    "BatchNorm, batch statistics": row(
        lambda h, w, b: F.batch_norm(h, None, None, w, b, True), H, W, W, FREE, FREE, FREE
    ),
    "BatchNorm of features": row(
        lambda h, w: F.batch_norm(h, None, None, w, None, True), given((5, 8), 1), W, FREE, FREE
    ),
    "InstanceNorm": row(lambda h, w, b: F.instance_norm(h, None, None, w, b), IM, W, W, FREE, FREE, FREE),
    "GroupNorm of one group": row(
        lambda h, w, b: F.group_norm(h, 1, w, b), IM, W, W, NONE, NONE, NONE, "(GroupNorm's mean and variance"
    ),
    "GroupNorm of single channels": row(
        lambda h, w, b: F.group_norm(h, h.shape[1], w, b), IM, W, W, FREE, FREE, FREE
    ),
    "GroupNorm of pairs": row(
        lambda h, w, b: F.group_norm(h, h.shape[1] // 2, w, b), IM, W, W, "aabbccdd", "aabbccdd", "aabbccdd"
    ),
    "local response": row(lambda h: F.local_response_norm(h, 3), IM, NONE, "is a spatial dimension"),
    "weight norm": row(
        lambda v, g: torch._weight_norm(v, g, 0),
        given((8, 3, 2), 0, 1, weight=True),
        given((8, 1, 1), 0, weight=True),
        FREE, "...", FREE,
        "is normalised over (weight norm)",
    ),
    "weight norm along the last dimension": row(
        lambda v, g: torch._weight_norm(v, g, 1), given((3, 8), 1, weight=True), given((1, 8), 1, weight=True),
        FREE, FREE,
    ),
    "renorm of other dimensions": row(lambda h: h.renorm(2, 1, 1.0), H, FREE),
    "renorm over units": row(lambda h: h.renorm(2, 0, 1.0), H, NONE, "is normalised over (renorm)"),
}  # fmt: skip


@pytest.mark.parametrize("one", alone(ROWS))
def test_commutes_with_removal(one: Row) -> None:
    hold(one)


@pytest.mark.parametrize("one", in_models(ROWS))
def test_in_a_model(one: Row) -> None:
    hold_in_a_model(one)


@pytest.mark.parametrize("twice", [False, True])
def test_batch_norm_with_running_statistics(twice: bool) -> None:
    """A shared BatchNorm updates its statistics in place and is read again."""

    def norm(h: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        mean, var = mean.clone(), var.abs()
        for _ in range(1 + twice):
            h = F.batch_norm(h, mean, var, training=True)
        return h

    stats = given((8,), 0)
    assert law(norm, H, stats, stats).patterns() == (FREE, FREE, FREE)


def test_batch_norm_modules() -> None:
    structure = check_cut(
        conv_net(lambda net, h: net.norm(net.norm(h)), norm=nn.BatchNorm2d(8)), torch.randn(4, 3, 5, 5)
    )
    (group,) = structure.groups
    assert group.size == 8
    assert {m.tensor for m in group.members} == {
        *("a.weight", "a.bias", "b.weight"),
        *("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"),
    }


def test_group_norm_module_drops_whole_groups() -> None:
    structure = check_cut(conv_net(lambda net, h: net.norm(h), norm=nn.GroupNorm(4, 8)), torch.randn(2, 3, 5, 5))
    assert sizes(structure) == [4]
    assert structure.groups[0].consumers[0].index.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_layer_norm_over_a_cut_dimension_is_frozen_with_that_reason() -> None:
    structure = check_cut(linear_net(lambda net, h: net.norm(h), norm=nn.LayerNorm(8)), torch.randn(2, 4))
    assert not structure.groups
    why = structure.why_frozen("a.weight")
    assert "LayerNorm's mean and variance would change" in why
    assert "native_layer_norm in norm" in why


def test_weight_normalised_layers_lose_outputs_and_keep_inputs() -> None:
    """Zeroing a slice of ``v`` changes the scale of the others, so nothing is consumed there."""

    def between(net: nn.Module, h: torch.Tensor) -> torch.Tensor:
        return F.linear(h, torch._weight_norm(net.v, net.g, 0)).relu()

    parts = {"v": torch.randn(6, 8), "g": torch.randn(6, 1)}
    structure = check_cut(linear_net(between, reads=6, **parts), torch.randn(2, 4))
    assert sizes(structure) == [6]
    assert "two activations" in structure.why_frozen("a.weight")
