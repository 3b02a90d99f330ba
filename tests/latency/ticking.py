"""A clock that moves only when a layer says so, for networks whose latency is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.latency.clock import Clock

NOW = [0.0]
#: What a linear layer takes in nanoseconds, whatever its widths, and for each weight and output.
CALL, WEIGHT, OUTPUT = 1000.0, 3.5, 20.0
#: What the root itself takes.
ROOT = 500.0


class Ticking(Clock):
    """Reads `NOW`; taking a mark takes a while itself."""

    unit_of = "ticks"

    def __init__(self, mark: float = 0.0) -> None:
        self._mark = mark

    def mark(self) -> float:
        NOW[0] += self._mark
        return NOW[0]

    def read(self, marks: Sequence[Any]) -> NDArray[np.float64]:
        return np.array(marks, dtype=np.float64) - marks[0]


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        NOW[0] += CALL + WEIGHT * self.weight.numel() + OUTPUT * self.weight.shape[0]
        return super().forward(x)


class Net(nn.Module):
    """6 -> 16 -> 8 -> 3, the last two in a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Linear(6, 16)
        self.rest = nn.Sequential(nn.ReLU(), Linear(16, 8), nn.ReLU(), Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        NOW[0] += ROOT
        return self.rest(self.first(x))  # type: ignore[no-any-return]


def nanoseconds(hidden: int, second: int) -> float:
    """What a pass of `Net` takes."""
    shapes = ((6, hidden), (hidden, second), (second, 3))
    return ROOT + sum(CALL + WEIGHT * a * b + OUTPUT * b for a, b in shapes)


def tick(monkeypatch: pytest.MonkeyPatch, mark: float = 0.0) -> None:
    """Let every measurement use this clock."""
    for place in ("measure", "model"):
        monkeypatch.setattr(f"secateur.latency.{place}.clock_of", lambda device: Ticking(mark))


def example() -> Tensor:
    return torch.randn(2, 6)
