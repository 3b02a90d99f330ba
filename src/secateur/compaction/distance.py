"""How far two tensors are apart that should hold the same numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["distance"]


def distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The largest difference of two tensors and the largest value of the first; infinite where one lacks a number."""
    if not (a.is_floating_point() or a.is_complex()):
        return (0.0 if torch.equal(a, b) else math.inf), 1.0
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return math.inf, 1.0
    a, b = a[finite], b[finite]
    if not a.numel():
        return 0.0, 1.0
    return float((a - b).abs().max()), float(a.abs().max()) or 1.0
