"""Padding, shifts, repeats and shuffles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.law import Row, alone, check_cut, conv_net, given, hold, hold_in_a_model, in_models, row, sizes

H = given((2, 8, 3), 1)
IM = given((2, 8, 4, 4), 1)
FREE = "abcdefgh"
NONE = "........"

ROWS: dict[str, Row] = {
    "pad another dimension": row(lambda h: F.pad(h, (1, 2)), H, FREE),
    "pad the units": row(lambda h: F.pad(h, (0, 0, 1, 2), value=0.5), H, FREE),
    "pad the units away": row(lambda h: F.pad(h, (0, 0, -1, 0)), H, NONE, "is padded along its own dimension"),
    "pad with zeros by position and add": row(
        lambda h, w: F.pad(h, (0, 0, 1, 1)) + w,
        H,
        given((10, 1), 0),
        "abcdefgh",
        ".abcdefgh.",
        "meets another tensor's",
    ),
    "reflect": row(lambda h: F.pad(h, (1, 1), mode="reflect"), H, FREE),
    "reflect the units": row(lambda h: F.pad(h, (1, 1), mode="reflect"), given((2, 8), 1), NONE, "is padded along"),
    "replicate": row(lambda h: F.pad(h, (1, 1, 1, 1), mode="replicate"), IM, FREE),
    "circular": row(lambda h: F.pad(h, (1, 1), mode="circular"), H, FREE),
    "circular in two dimensions": row(lambda h: F.pad(h, (1, 1, 1, 1), mode="circular"), IM, FREE),
    "roll": row(lambda h: h.roll(1, 1), H, NONE, "is shifted by position"),
    "roll another dimension": row(lambda h: h.roll((1, 1), (0, 2)), H, FREE),
    "roll the flattened tensor": row(lambda h: h.roll(1), H, NONE, "is shifted by position"),
    "flip": row(lambda h: h.flip(1), H, FREE),
    "flip another dimension": row(lambda h: h.flip(2), H, FREE),
    "flip and add": row(lambda h: h + h.flip(1), H, "abcddcba"),
    "rot90": row(lambda h: h.rot90(1, (2, 3)), IM, FREE),
    "rot90 with the units": row(lambda h: h.rot90(1, (1, 2)), H, NONE, "is rotated with another dimension"),
    "repeat": row(lambda h: h.repeat(1, 2, 1), H, FREE),
    "repeat in front": row(lambda h: h.repeat(2, 1, 1, 1), H, FREE),
    "repeat fixed values over units": row(lambda s, h: s.repeat(1, h.shape[1], 1) * h, given((2, 1, 3)), H, FREE),
    "tile": row(lambda h: h.tile(2), H, FREE),
    "repeat_interleave": row(lambda h: h.repeat_interleave(2, 1), H, FREE),
    "repeat_interleave of another dimension": row(lambda h: h.repeat_interleave(2, 2), H, FREE),
    "repeat_interleave by numbers": row(lambda h: h.repeat_interleave(torch.tensor([2, 1, 1]), 2), H, FREE),
    "repeat_interleave of units by numbers": row(
        lambda h: h.repeat_interleave(torch.arange(8), 1), H, NONE, "is indexed by position or data"
    ),
    "pixel_shuffle": row(lambda h: F.pixel_shuffle(h, 2), IM, "aaaabbbb"),
    "pixel_shuffle by views": row(
        lambda h: h.view(2, -1, 2, 2, 4, 4).permute(0, 1, 4, 2, 5, 3).reshape(2, -1, 8, 8), IM, "aaaabbbb"
    ),
    "pixel_unshuffle": row(lambda h: F.pixel_unshuffle(h, 2), given((2, 4, 4, 4), 1), "abcd"),
    "channel_shuffle": row(lambda h: F.channel_shuffle(h, 2), IM, "abcdabcd"),
    "channel_shuffle by views": row(lambda h: h.view(2, 2, -1, 4, 4).transpose(1, 2).flatten(1, 2), IM, "abcdabcd"),
    "kron": row(torch.kron, given((2, 8), 1), given((2, 3)), FREE),
    "meshgrid": row(lambda h: torch.meshgrid(h, torch.arange(3.0).double(), indexing="ij")[0], given((8,), 0), FREE),
}


@pytest.mark.parametrize("one", alone(ROWS))
def test_commutes_with_removal(one: Row) -> None:
    hold(one)


@pytest.mark.parametrize("one", in_models(ROWS))
def test_in_a_model(one: Row) -> None:
    hold_in_a_model(one)


def test_pixel_shuffle_drops_all_the_channels_of_a_pixel() -> None:
    structure = check_cut(conv_net(lambda net, h: F.pixel_shuffle(h, 2), width=12, reads=3), torch.randn(2, 3, 4, 4))
    (group,) = structure.groups
    assert group.size == 3
    assert group.members[0].index.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_channel_shuffle_has_a_unit_for_each_position_in_a_group() -> None:
    structure = check_cut(conv_net(lambda net, h: F.channel_shuffle(h, 3), width=12), torch.randn(2, 3, 4, 4))
    (group,) = structure.groups
    assert group.size == 4
    assert group.members[0].index[0].tolist() == [0, 4, 8]


def test_circular_padding_of_a_convolution() -> None:
    model = conv_net(lambda net, h: net.mid(h), mid=torch.nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"))
    assert sizes(check_cut(model, torch.randn(2, 3, 4, 4))) == [8, 8]


def test_padding_of_a_shortcut_ties_what_it_meets() -> None:
    """The parameter-free shortcut of the first ResNets: new channels are zeros, and the others shift."""

    def between(net: torch.nn.Module, h: torch.Tensor) -> torch.Tensor:
        return F.pad(h, (0, 0, 0, 0, 2, 2)) + net.wide(h)

    model = conv_net(between, reads=12, wide=torch.nn.Conv2d(8, 12, 1))
    structure = check_cut(model, torch.randn(2, 3, 4, 4))
    assert sizes(structure) == [8]
    assert {(m.tensor, m.dim): m.index[0].tolist() for m in structure.groups[0].members}[("wide.weight", 0)] == [2]
