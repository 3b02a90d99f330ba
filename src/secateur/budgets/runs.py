"""Units of groups that stand in a row: sums over each group, and values of each group at its units.

Costs are counted on the host, in numpy: on a few numbers for each group an operator of torch is mostly overhead.

Index conventions: ``U`` units of all groups in a row, ``G`` groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Runs", "on_host"]

#: Mean number of units of a group from which on each group is reduced by itself: a scatter costs more for each unit, a
#: reduction more for each group.
LONG = 256


def on_host(vector: Tensor | NDArray[Any]) -> NDArray[Any]:
    """The numbers as an array, to be read only: on the CPU it shares the tensor's memory."""
    if isinstance(vector, np.ndarray):
        return vector
    vector = vector.detach()
    if vector.is_floating_point() and vector.element_size() < 4:  # numpy has no bfloat16
        vector = vector.float()
    array: NDArray[Any] = vector.cpu().numpy()
    return array


@dataclass(frozen=True)
class Runs:
    """Units of groups that stand in a row, one group after the other.

    Args:
        sizes: units of each group.

    Attributes:
        segment: int64 ``(U,)``, the group of each unit.

    Example:
        >>> runs = Runs((2, 3))
        >>> runs.sum(np.ones(5)).tolist(), runs.spread(np.array([7, 8])).tolist()
        ([2.0, 3.0], [7, 7, 8, 8, 8])
    """

    sizes: tuple[int, ...]

    @cached_property
    def segment(self) -> NDArray[np.int64]:
        """Which group each unit is of, ``(U,)``."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def sum(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Sums over each group in double precision, ``(U,)`` to ``(G,)``."""
        if self._long:
            return np.array([values[run].sum(dtype=np.float64) for run in self._slices])
        sums: NDArray[np.float64] = np.bincount(self.segment, weights=values, minlength=len(self.sizes)).astype(float)
        return sums

    def count(self, flags: NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many of each group are True, bool ``(U,)`` to int64 ``(G,)``."""
        if self._long:
            return np.array([np.count_nonzero(flags[run]) for run in self._slices], dtype=np.int64)
        return np.bincount(self.segment[flags], minlength=len(self.sizes))

    def spread(self, values: NDArray[Any]) -> NDArray[Any]:
        """Each group's value at each of its units, ``(G,)`` to ``(U,)``."""
        if not self._long:
            return values[self.segment]
        spread = np.empty(len(self.segment), dtype=values.dtype)
        for run, value in zip(self._slices, values.tolist(), strict=True):
            spread[run] = value
        return spread

    @cached_property
    def _long(self) -> bool:
        return sum(self.sizes) > LONG * len(self.sizes)

    @cached_property
    def _slices(self) -> list[slice]:
        ends = list(accumulate(self.sizes))
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
