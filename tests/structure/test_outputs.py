"""What modules return is known call by call."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import secateur as sc


class Shared(nn.Module):
    """One activation behind two layers of equal width, and one layer that is applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act, self.hidden = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8)
        self.again, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.hidden(self.act(self.inner(x))))
        return self.out(self.again(self.again(x)))


def outputs(structure: sc.Structure) -> dict[str, list[set[str]]]:
    """By module, the groups along dimension 1 at the calls that differ."""
    return {
        one.module: [set(units.get(1, {})) for units in (one.units, *one.others)]
        for one in structure.outputs
        if one.module
    }


def test_calls_at_which_other_units_lie_along_the_output() -> None:
    structure = sc.trace(Shared(), (torch.randn(2, 4),))
    inner, again = ({group.name} for group in structure.groups)
    expected = {"inner": [inner], "act": [inner, again], "hidden": [again], "again": [again], "out": [set()]}
    assert outputs(structure) == expected


def test_custom_groups_take_the_place_of_units_at_every_call() -> None:
    structure = sc.trace(Shared(), (torch.randn(2, 4),))
    inner, again = (group.name for group in structure.groups)
    pairs = structure.regrouped([structure.custom("pairs", {again: np.arange(8).reshape(4, 2)})])
    assert outputs(pairs)["act"] == [{inner}, {"pairs"}]
    (act,) = (one for one in pairs.outputs if one.module == "act")
    assert act.others[0][1]["pairs"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
