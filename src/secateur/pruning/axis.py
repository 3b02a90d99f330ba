"""What is left of a dimension when some gates are at 0.

Index conventions: ``U`` gates of the model in a row, the *extended* ones ``(U + 1,)`` end in one that is open; ``S``
positions of a dimension, which fall into runs of equal length that open and close together; ``L`` gates that meet at a
position.
"""

from __future__ import annotations

import math
from typing import TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.pruning.placement import Map

__all__ = ["Axis", "Flags"]

Flags: TypeAlias = NDArray[np.bool_]


class Axis:
    """Dimensions of tensors of which a draw leaves the same positions.

    Args:
        whole: gates that must be open for a position to be there, ``(L, S)``.
        read: gates that must be open for it to be read, ``(L, S)``.
        size: ``S``.

    Attributes:
        layers: all these gates, ``(L, S)``.
        run: positions in a run.
        index: int64, the runs that stay; None for all.
        selected: int64, of the runs that are there the ones that are read; None for all.
        share: of the dimension that stays.

    Example:
        >>> axis = Axis(np.array([[0, 0, 1, 1, 2, 2]]), None, 6)
        >>> axis.look(np.array([True, False, True, True])), axis.run, axis.positions().tolist()
        (False, 2, [0, 1, 4, 5])
    """

    def __init__(self, whole: Map | None, read: Map | None, size: int) -> None:
        self.layers = np.concatenate([part for part in (whole, read) if part is not None])
        changes = np.flatnonzero((self.layers[:, 1:] != self.layers[:, :-1]).any(0)) + 1
        self.run = math.gcd(size, *changes.tolist())
        self.size = size
        self._whole = None if whole is None else whole[:, :: self.run]
        self._read = None if read is None else read[:, :: self.run]
        self.index: Tensor | None = None
        self.selected: Tensor | None = None
        self.share = 1.0

    def look(self, is_open: Flags) -> bool:
        """Take in which gates are open, ``(U + 1,)``; whether a closed position had to stay, for one must."""
        runs = self.size // self.run
        everywhere: Flags = np.ones(runs, dtype=np.bool_)
        there = everywhere if self._whole is None else _all_open(is_open, self._whole)
        stays, forced = there, False
        if self._read is not None:
            stays = there & _all_open(is_open, self._read)
            if not stays.any():
                stays[int(there.argmax())] = forced = True
        kept = np.flatnonzero(stays)
        self.share = len(kept) / runs
        self.index = None if len(kept) == runs else torch.from_numpy(kept)
        some = self._read is not None and len(kept) < np.count_nonzero(there)
        self.selected = torch.from_numpy(np.flatnonzero(stays[there])) if some else None
        return forced

    def positions(self) -> NDArray[np.int64] | None:
        """What stays, position by position; None for everything."""
        if self.index is None:
            return None
        runs = cast("NDArray[np.int64]", self.index.numpy())
        return (runs[:, None] * self.run + np.arange(self.run)).reshape(-1)


def _all_open(is_open: Flags, layers: Map) -> Flags:
    return cast("Flags", np.logical_and.reduce(is_open[layers], axis=0))
