"""A data set that takes no time: classes are where a bright square lies."""

from __future__ import annotations

import pytest
import torch

from secateur.recipes.images import Images


def squares(shape: tuple[int, int, int], n: int = 240, n_test: int = 60) -> Images:
    """Images of unit noise with a bright square whose place says the class."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n + n_test) % 10
    x = 0.3 * torch.rand(n + n_test, *shape, generator=generator)
    for image, kind in zip(x, y.tolist(), strict=True):
        row, column = 8 + 8 * (kind // 5), 4 + 4 * (kind % 5)
        image[:, row : row + 4, column : column + 4] = 1.0
    return Images("squares", x[:n], y[:n], x[n:], y[n:])


@pytest.fixture(autouse=True)
def _few_timed_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.recipes.papers.run.STEPS", 2)
    monkeypatch.setattr("secateur.recipes.measure.WARM_UP_ROUNDS", 0)


@pytest.fixture
def small_images() -> Images:
    """Of MNIST's shape."""
    return squares((1, 28, 28))
