"""Whether one trial speaks for both modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.law import check_cut
from torch import Tensor, nn

import secateur as sc
from secateur.structure import trace as tracing
from secateur.structure.trial import Recorded


class Written(nn.Module):
    """Two layers with anything between them."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 8), nn.Linear(8, 2), nn.BatchNorm1d(8)
        self.drop, self.between = nn.Dropout(0.3), between

    def forward(self, x: Tensor) -> Tensor:
        """One hidden layer."""
        return self.second(self.between(self, self.first(x)))


def tried(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[list[bool], sc.Structure]:
    """The modes of the runs that a trial is made of, and the structure."""
    chosen: list[list[Recorded]] = []
    real = tracing.worth_trying

    def seen(*args: Any) -> list[Recorded]:
        chosen.append(real(*args))
        return chosen[-1]

    monkeypatch.setattr(tracing, "worth_trying", seen)
    structure = sc.trace(model, examples=(torch.zeros(3, 4),))
    return [one.setting.training for one in chosen[0]], structure


@pytest.mark.parametrize(
    "between",
    [
        lambda m, h: h.relu(),
        lambda m, h: m.drop(m.norm(h)),
        lambda m, h: F.dropout(h, 0.3, m.training),
        lambda m, h: F.dropout1d(h[:, None], 0.3, m.training)[:, 0],
    ],
)
def test_the_same_code_is_tried_once(between: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    modes, structure = tried(Written(between), monkeypatch)
    assert modes == [False]
    assert structure.group("first").size == 8


@pytest.mark.parametrize(
    "between",
    [
        lambda m, h: h * 2 if m.training else h * 3,
        lambda m, h: h + torch.zeros(8) if m.training else h,
        lambda m, h: h.relu() if m.training else h.tanh(),
        lambda m, h: h * torch.empty(8).bernoulli_(0.5) / h.shape[-1] if m.training else h,
    ],
)
def test_other_code_is_tried_in_both_modes(between: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(Written(between), monkeypatch)[0] == [False, True]


def test_a_size_that_flows_into_numbers_in_training_alone_is_seen() -> None:
    model = Written(lambda m, h: h / h.shape[-1] ** 0.5 if m.training else h)
    assert not sc.trace(model, examples=(torch.zeros(3, 4),)).groups


class SkipsLayers(nn.Module):
    """Skips a layer by chance and has a second head, both in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 8)
        self.head, self.second = nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        """Looks at a number that it draws."""
        x = self.a(x).relu()
        if not (self.training and torch.rand([]) < 0.1):
            x = x + self.b(x).relu()
        return (self.head(x), self.second(x)) if self.training else self.head(x)


def test_training_that_looks_at_a_drawn_number_is_traced() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    structure = check_cut(SkipsLayers(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert any("in training mode, so it was traced on the examples themselves" in note for note in structure.notes)
    assert {(one.tensor, one.dim) for one in structure.group("a").members} >= {("head.weight", 1), ("second.weight", 1)}
    torch.manual_seed(5)
    sc.trace(SkipsLayers(), examples=(torch.zeros(3, 4),))
    again = torch.get_rng_state()
    torch.manual_seed(5)
    SkipsLayers()
    assert torch.equal(again, torch.get_rng_state())
    assert not torch.equal(before, again)
