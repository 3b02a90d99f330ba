"""The integers by which layers describe their tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.errors import CompactionError
from secateur.structure.cut import CutPlan, cut_
from secateur.structure.describe import described


@pytest.mark.parametrize(
    ("layer", "kept", "expected"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), (0, 3), {"groups": 2, "in_channels": 2, "out_channels": 2}),
        (nn.Conv2d(2, 6, 3, groups=2), (3, 4, 5), {"groups": 1, "in_channels": 1, "out_channels": 3}),
        (nn.Conv2d(2, 6, 3, groups=2), (0, 5), {"groups": 2, "in_channels": 2, "out_channels": 2}),
        (nn.Conv1d(8, 8, 3, groups=4), (2, 3, 4, 5), {"groups": 2, "in_channels": 4, "out_channels": 4}),
        (nn.ConvTranspose2d(4, 4, 3, groups=4), (1, 2), {"groups": 2, "in_channels": 2, "out_channels": 2}),
    ],
)
def test_groups_of_a_convolution_are_those_that_keep_a_row(layer, kept, expected):
    plan = CutPlan({"weight": {0: kept}, "bias": {0: kept}})
    cut_(layer, plan)
    assert {key: getattr(layer, key) for key in expected} == expected
    assert layer(torch.zeros(1, expected["in_channels"], *[5] * (layer.weight.dim() - 2))).shape[1] == len(kept)


def test_unequal_groups_are_refused_and_change_nothing():
    layer = nn.Conv2d(4, 4, 3, groups=2)
    with pytest.raises(CompactionError, match="unequal numbers"):
        cut_(layer, CutPlan({"weight": {0: (0, 1, 2)}, "bias": {0: (0, 1, 2)}}))
    assert layer.weight.shape[0] == layer.bias.shape[0] == layer.out_channels == 4


def test_group_norm_loses_whole_groups():
    norm = nn.GroupNorm(3, 6)
    cut_(norm, CutPlan({"weight": {0: (0, 1, 4, 5)}, "bias": {0: (0, 1, 4, 5)}}))
    assert (norm.num_groups, norm.num_channels) == (2, 4)


def test_layers_outside_of_the_table_describe_nothing():
    assert described(nn.LSTM(3, 4), {"weight_ih_l0": torch.Size((16, 3))}, {}) == {}
    assert described(nn.BatchNorm1d(3, affine=False, track_running_stats=False), {}, {}) == {}


def test_a_norm_without_weights_reads_its_statistics():
    assert described(nn.BatchNorm1d(3, affine=False), {"running_mean": torch.Size((2,))}, {}) == {"num_features": 2}


def test_a_padding_row_moves_or_goes():
    layer = nn.Embedding(5, 2, padding_idx=3)
    shapes = {"weight": torch.Size((2, 2))}
    assert described(layer, shapes, {"weight": {0: (1, 3)}})["padding_idx"] == 1
    assert described(layer, shapes, {"weight": {0: (1, 2)}})["padding_idx"] is None
    assert "padding_idx" not in described(layer, shapes, {"weight": {1: (0,)}})
