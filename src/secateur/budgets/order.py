"""The order in which a budget pushes units.

Index conventions: ``U`` units of all groups in a row, ``G`` groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from secateur.budgets.costs import CostModel
from secateur.budgets.runs import on_host

__all__ = ["SMALLEST", "Order"]

#: What is divided by, or has its logarithm taken, is at least this.
SMALLEST = 1e-9


class Order:
    """Scores of all units, worked out only where some must flip.

    Args:
        costs: what units cost.
        chances: ``(U,)``.
        n_open: open units of each group, ``(G,)``.
        given: scores ``(U,)``, or what gives them; None for the chances' logarithms, infinite where exactly 1.

    Attributes:
        dtype: of the chances.
        scores: ``(U,)``, lowest first.
    """

    def __init__(
        self,
        costs: CostModel,
        chances: NDArray[Any],
        n_open: NDArray[np.int64],
        given: Tensor | Callable[[], Tensor] | None,
    ) -> None:
        self.dtype = chances.dtype
        self._costs, self._chances, self._n_open, self._given = costs, chances, n_open, given

    @cached_property
    def scores(self) -> NDArray[Any]:
        """What is given, and more for units of groups that have few left."""
        if self._given is None:
            scores = np.log(np.maximum(self._chances, SMALLEST))
            scores[self._chances == 1.0] = math.inf
        else:
            scores = on_host(self._given() if callable(self._given) else self._given)
        # The fewer units a group has left, the dearer they are: shares of the cost move alike, not counts.
        scarcity = np.log(np.asarray(self._costs.sizes) / np.maximum(self._n_open, 1)).astype(scores.dtype)
        total: NDArray[Any] = self._costs.spread(scarcity) + scores
        return total
