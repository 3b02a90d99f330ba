"""Convolutions of one to three dimensions: plain, transposed, grouped and depthwise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.law import Given, Row, alone, check_cut, conv_net, given, hold, hold_in_a_model, in_models, row, sizes
from torch import Tensor, nn

ONE, TWO, THREE = given((2, 8, 5), 1), given((2, 8, 4, 4), 1), given((2, 8, 3, 3, 3), 1)
IN, OUT = "abcdefgh", "ijklmn"
NONE = "........"
BIAS = given((6,), 0, weight=True)
WITHIN = "lies within the filter of a depthwise convolution"


def weight(*shape: int) -> Given:
    return given(shape, 0, 1, weight=True)


ROWS: dict[str, Row] = {
    "conv1d": row(F.conv1d, ONE, weight(6, 8, 3), BIAS, IN, OUT, IN, OUT),
    "conv2d": row(
        lambda x, w, b: F.conv2d(x, w, b, padding=1, stride=2), TWO, weight(6, 8, 3, 3), BIAS, IN, OUT, IN, OUT
    ),
    "conv2d, padded to the same size": row(
        lambda x, w, b: F.conv2d(x, w, b, padding="same"), TWO, weight(6, 8, 2, 2), BIAS, IN, OUT, IN, OUT
    ),
    "conv2d without a batch": row(F.conv2d, given((8, 4, 4), 0), weight(6, 8, 3, 3), BIAS, IN, OUT, IN, OUT),
    "conv3d": row(F.conv3d, THREE, weight(6, 8, 2, 2, 2), BIAS, IN, OUT, IN, OUT),
    "conv_transpose1d": row(F.conv_transpose1d, ONE, weight(8, 6, 3), BIAS, IN, IN, OUT, OUT),
    "conv_transpose2d": row(
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2), TWO, weight(8, 6, 3, 3), BIAS, IN, IN, OUT, OUT
    ),
    "conv_transpose3d": row(F.conv_transpose3d, THREE, weight(8, 6, 2, 2, 2), BIAS, IN, IN, OUT, OUT),
    "grouped": row(
        lambda x, w, b: F.conv2d(x, w, b, groups=2), TWO, weight(6, 4, 3, 3), BIAS,
        "abcdabcd", "efgefg", "abcd", "efgefg",
    ),
    "grouped, transposed": row(
        lambda x, w, b: F.conv_transpose2d(x, w, b, groups=2), TWO, weight(8, 3, 3, 3), BIAS,
        "abcdabcd", "abcdabcd", "efg", "efgefg",
    ),
    "depthwise": row(
        lambda x, w: F.conv2d(x, w, groups=x.shape[1]), TWO, weight(8, 1, 3, 3), IN, IN, ".", WITHIN
    ),
    "depthwise with a multiplier": row(
        lambda x, w: F.conv2d(x, w, groups=x.shape[1]), TWO, weight(16, 1, 3, 3), IN, "aabbccddeeffgghh", ".", WITHIN
    ),
    "depthwise, transposed": row(
        lambda x, w: F.conv_transpose2d(x, w, groups=x.shape[1]), TWO, weight(8, 1, 3, 3), IN, IN, ".", WITHIN
    ),
    "depthwise, transposed, with a multiplier": row(
        lambda x, w: F.conv_transpose2d(x, w, groups=x.shape[1]), TWO, weight(8, 2, 3, 3), IN, IN, "..", WITHIN
    ),
    "depthwise by a fixed filter of each channel": row(
        lambda x, w: F.conv2d(x, w, groups=x.shape[1]), TWO, given((8, 1, 3, 3)), NONE, "meets a channel"
    ),
    "depthwise by one filter, expanded": row(
        lambda x, w: F.conv2d(x, w.expand(x.shape[1], 1, 3, 3), groups=x.shape[1]), TWO, given((1, 1, 3, 3)), IN
    ),
    "depthwise by one filter, repeated": row(
        lambda x, w: F.conv2d(x, w.repeat(x.shape[1], 1, 1, 1), groups=x.shape[1]), TWO, given((1, 1, 3, 3)), IN
    ),
    "channels as a batch": row(
        lambda x, w: F.conv2d(x.reshape(-1, 1, 4, 4), w).view(2, -1, 2, 2), TWO, given((1, 1, 3, 3)), IN
    ),
    "cross-correlation": row(
        lambda x, k: F.conv2d(x.reshape(1, -1, 4, 4), k.reshape(-1, 1, 2, 2), groups=x.shape[0] * x.shape[1]),
        TWO, given((2, 8, 2, 2), 1), IN, IN,
    ),
    "weights that are activations": row(
        F.conv2d, TWO, given((6, 8, 3, 3), 0, 1), NONE, "abcdef", NONE, "is contracted in a product of two activations"
    ),
    "grouped, weights that are no weights": row(
        lambda x, w: F.conv2d(x, F.softplus(w), groups=2), TWO, weight(6, 4, 3, 3), NONE, "abcabc", "....",
        "is contracted in a product of two activations",
    ),
    "standardised weights": row(
        lambda x, w: F.conv2d(x, w - w.mean((1, 2, 3), keepdim=True)), TWO, weight(6, 8, 3, 3), NONE, "abcdef", NONE,
        "is reduced over (mean)",
    ),
    "kernel positions": row(
        F.conv2d, TWO, given((6, 8, 3, 3), 1, 2, weight=True), IN, IN, "...", "is a kernel dimension of a convolution"
    ),
}  # fmt: skip


@pytest.mark.parametrize("one", alone(ROWS))
def test_commutes_with_removal(one: Row) -> None:
    hold(one)


@pytest.mark.parametrize("one", in_models(ROWS))
def test_in_a_model(one: Row) -> None:
    hold_in_a_model(one)


def test_grouped_convolutions_lose_the_same_from_each_group() -> None:
    """Channels that are dead in one group only are no unit: outputs were off by 0.39 in another library."""
    net = conv_net(lambda net, h: net.mid(h).relu(), reads=6, mid=nn.Conv2d(8, 6, 3, groups=2))
    structure = check_cut(net, torch.randn(2, 3, 4, 4))
    assert sizes(structure) == [3, 4]
    first = structure.group("a")
    assert {(m.tensor, m.dim): m.index.tolist()[1] for m in first.members} == {
        ("a.weight", 0): [1, 5],
        ("a.bias", 0): [1, 5],
        ("mid.weight", 1): [1],
    }


def test_depthwise_separable_convolutions() -> None:
    """MobileNet: a channel goes from the layer before, the depthwise filter and the layer after."""
    net = conv_net(lambda net, h: net.mid(h).relu(), mid=nn.Conv2d(8, 8, 3, groups=8))
    structure = check_cut(net, torch.randn(2, 3, 4, 4))
    (group,) = structure.groups
    assert group.size == 8
    assert ("mid.weight", 0) in {(m.tensor, m.dim) for m in group.members}
    assert [m.tensor for m in group.consumers] == ["b.weight"]


def test_a_layer_that_is_its_own_neighbour() -> None:
    """A shared convolution ties its outputs to its inputs."""

    def between(net: nn.Module, h: Tensor) -> Tensor:
        for _ in range(3):
            h = net.mid(h).relu()
        return h

    structure = check_cut(conv_net(between, mid=nn.Conv2d(8, 8, 3, padding=1)), torch.randn(2, 3, 4, 4))
    (group,) = structure.groups
    assert {(m.tensor, m.dim, m.consumer) for m in group.members if m.tensor == "mid.weight"} == {
        ("mid.weight", 0, False),
        ("mid.weight", 1, True),
    }


def test_residual_streams_are_one_group() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
            self.norm = nn.BatchNorm2d(6)

        def forward(self, h: Tensor) -> Tensor:
            return h + self.two(self.norm(self.one(h)).relu())

    blocks = nn.Sequential(Block(), Block())
    structure = check_cut(conv_net(lambda net, h: net.blocks(h), blocks=blocks), torch.randn(4, 3, 4, 4))
    assert sizes(structure) == [6, 6, 8]
