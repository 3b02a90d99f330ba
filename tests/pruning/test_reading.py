from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from secateur.pruning.reading import read_all, read_only, settle

LAYERS = {
    "linear": (nn.Linear(3, 2), torch.randn(2, 4, 7)),
    "convolution": (nn.Conv2d(3, 2, 3), torch.randn(2, 7, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_reads_the_positions_that_were_chosen_last(kind: str) -> None:
    layer, x = copy.deepcopy(LAYERS[kind][0]), LAYERS[kind][1]
    dim = -1 if kind == "linear" else 1
    read_only(layer, (0, 1, 2))
    read_only(layer, (1, 4, 6))
    chosen = x.index_select(dim, torch.tensor([1, 4, 6]))
    expected = LAYERS[kind][0](chosen)
    for given in (layer, copy.deepcopy(layer)):
        torch.testing.assert_close(given(x), expected)
        torch.testing.assert_close(given(input=x), expected)
    settle(layer)
    assert not layer._forward_pre_hooks
    torch.testing.assert_close(layer(x), expected)


def test_all_of_the_input_is_read_again() -> None:
    layer, x = copy.deepcopy(LAYERS["linear"][0]), torch.randn(2, 3)
    read_only(layer, (1, 1, 1))
    read_all(layer)
    torch.testing.assert_close(layer(x), LAYERS["linear"][0](x))
