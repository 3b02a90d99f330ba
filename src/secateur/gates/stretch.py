"""The stretched and clipped sigmoid that hard concrete and DiffPrune share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secateur.gates.settings import Checks

__all__ = ["check_stretch", "closing_logit", "stretched"]


def stretched(logits: Tensor, gamma: float, zeta: float) -> Tensor:
    """``clip(sigma(logits) (zeta - gamma) + gamma, 0, 1)``; no gradient where clipped."""
    return (torch.sigmoid(logits) * (zeta - gamma) + gamma).clamp(0.0, 1.0)


def closing_logit(gamma: float, zeta: float) -> float:
    """``log(-gamma / zeta)``, -ln 11 by default: at this logit and below, `stretched` is exactly 0."""
    return math.log(-gamma / zeta)


def check_stretch(checks: Checks, gamma: float, zeta: float) -> None:
    """The interval must reach beyond [0, 1] on both sides."""
    checks.between("gamma", gamma, None, 0.0, advice="the interval must reach below 0 for exact zeros")
    checks.between("zeta", zeta, 1.0, None, advice="the interval must reach above 1 for exact ones")
