"""A labelled image set in memory.

Index conventions: ``B`` examples, ``C`` channels, ``H`` x ``W`` pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Images"]


@dataclass(frozen=True)
class Images:
    """A labelled image set, already split.

    Args:
        name: the data set's name in ``DATA_SETS``.
        x: training images, float32 ``(B, C, H, W)``, standardised by the training pixels' mean and deviation.
        y: training labels, int64 ``(B,)``.
        x_test: test images, standardised by the same two numbers.
        y_test: test labels.
        classes: number of classes; labels lie in ``[0, classes)``.
    """

    name: str
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int = 10

    def to(self, device: torch.device | str) -> Images:
        """The same set with all four tensors on ``device``."""
        return replace(
            self, x=self.x.to(device), y=self.y.to(device), x_test=self.x_test.to(device), y_test=self.y_test.to(device)
        )

    def first(self, n: int) -> Images:
        """The same set with the first ``n`` training images only; 0 for all."""
        return replace(self, x=self.x[:n], y=self.y[:n]) if n else self
