"""What two tensors differ by, whatever numbers they lack."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.compaction.distance import distance

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1.0, -4.0], [1.0, -4.5], (0.5, 4.0)),
        ([0.0, 0.0], [0.0, 0.25], (0.25, 1.0)),  # relative to 1 where all is zero
        ([1.0, -INF], [1.5, -INF], (0.5, 1.0)),  # a masked logit on both sides hides nothing
        ([2.0, NAN], [2.0, NAN], (0.0, 2.0)),
        ([-INF, NAN], [-INF, NAN], (0.0, 1.0)),
        ([1.0, INF], [1.0, -INF], (INF, 1.0)),
        ([1.0, NAN], [1.0, 2.0], (INF, 1.0)),
        ([1.0, 2.0], [1.0, INF], (INF, 1.0)),
        ([True, False], [True, False], (0.0, 1.0)),
        ([1, 2], [1, 3], (INF, 1.0)),
        ([3j, 1.0], [4j, 1.0], (1.0, 3.0)),
    ],
)
def test_the_difference_and_the_size(first: list[float], second: list[float], expected: tuple[float, float]) -> None:
    assert distance(torch.tensor(first), torch.tensor(second)) == expected
