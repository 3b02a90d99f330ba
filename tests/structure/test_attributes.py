"""Attributes that hold sizes: found by need, and never the size of two groups at once."""

from __future__ import annotations

import pytest
import torch
from tests.law import check_cut
from torch import Tensor, nn


class OneStep(nn.Module):
    """One step of a recurrent cell from zeros: its state and its output are two groups, which share hidden_size."""

    def __init__(self, cell: nn.Module, hidden: int) -> None:
        super().__init__()
        self.before, self.cell, self.after = nn.Linear(3, 5), cell, nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.after(self.cell(self.before(x)))
        return made


class TwoHeads(nn.Module):
    """Two widths that one attribute is the size of, in code of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.a, self.b, self.c = nn.Linear(4, width), nn.Linear(4, width), nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).reshape(-1, self.width), self.b(x).reshape(-1, self.width)
        made: Tensor = self.c(torch.cat([a.relu(), b.tanh()], 1))
        return made


@pytest.mark.parametrize("hidden", [2, 3, 4, 9])
@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell])
def test_a_cell_that_runs_once_is_cut_or_frozen(kind, hidden):
    structure = check_cut(OneStep(kind(5, hidden), hidden), torch.randn(4, 3), seeds=range(12))
    assert "before" in {group.name for group in structure.groups}


@pytest.mark.parametrize("width", [2, 3, 4, 9])
def test_an_attribute_that_two_groups_need_is_the_size_of_neither(width):
    structure = check_cut(TwoHeads(width), torch.randn(4, 4), seeds=range(12))
    assert len({group.name for group in structure.groups} & {"a", "b"}) < 2
