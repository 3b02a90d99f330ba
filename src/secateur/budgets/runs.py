"""Units of groups that stand in a row: sums over each group, and values of each group at its units.

Index conventions: ``U`` units of all groups in a row, ``G`` groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Runs"]

#: Mean number of units of a group from which on each group is reduced by itself: a scatter costs more for each unit, a
#: reduction more for each group.
LONG = 256


@dataclass(frozen=True)
class Runs:
    """Units of groups that stand in a row, one group after the other.

    Args:
        sizes: units of each group.
        segment: int64 ``(U,)``, the group of each unit.

    Example:
        >>> runs = Runs((2, 3), torch.tensor([0, 0, 1, 1, 1]))
        >>> runs.sum(torch.ones(5)).tolist(), runs.spread(torch.tensor([7, 8])).tolist()
        ([2.0, 3.0], [7, 7, 8, 8, 8])
    """

    sizes: tuple[int, ...]
    segment: Tensor

    @property
    def _long(self) -> bool:
        return sum(self.sizes) > LONG * len(self.sizes)

    def sum(self, values: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Sums over each group in that precision, ``(U,)`` to ``(G,)``."""
        if self._long:
            return torch.stack([part.sum(dtype=dtype) for part in torch.split(values, list(self.sizes))])
        return values.new_zeros(len(self.sizes), dtype=dtype).index_add(0, self.segment, values.to(dtype))

    def count(self, flags: Tensor) -> Tensor:
        """How many of each group are True, bool ``(U,)`` to int64 ``(G,)``."""
        if self._long:
            return torch.stack([part.count_nonzero() for part in torch.split(flags, list(self.sizes))])
        return self.sum(flags, torch.int64)

    def spread(self, values: Tensor) -> Tensor:
        """Each group's value at each of its units, ``(G,)`` to ``(U,)``."""
        if not self._long:
            return values.index_select(0, self.segment)
        spread = values.new_empty(len(self.segment))
        for part, value in zip(torch.split(spread, list(self.sizes)), values, strict=True):
            part.copy_(value)
        return spread
