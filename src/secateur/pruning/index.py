"""Whole numbers that a module looks things up by, without being its buffers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Index"]


class Index:
    """Positions, on the device where they are asked for.

    A copy of a module has its own, as any attribute. They are no buffers, for averages of models average their buffers
    (``AveragedModel(use_buffers=True)``), and wrappers for several processes send them in every step; positions have no
    mean, and never change.

    Args:
        positions: int64, of any shape.

    Example:
        >>> Index(np.array([2, 0])).on(torch.device("cpu"))
        tensor([2, 0])
    """

    def __init__(self, positions: NDArray[np.int64]) -> None:
        self._positions = torch.from_numpy(positions)

    @property
    def shape(self) -> torch.Size:
        """Of the positions."""
        return self._positions.shape

    def on(self, device: torch.device) -> Tensor:
        """The positions; copied where the device is another than the last time."""
        if self._positions.device == device:
            return self._positions
        with torch.inference_mode(False):  # they are saved for backward passes
            moved = self._positions.to(device)
        if not moved.is_meta:  # from where nothing comes back
            self._positions = moved
        return moved

    def numpy(self) -> NDArray[np.int64]:
        """The positions for counting on the CPU; not to be written."""
        return self._positions.cpu().numpy()
