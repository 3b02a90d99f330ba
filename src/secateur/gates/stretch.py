"""The stretched and clipped sigmoid that hard concrete and DiffPrune share."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from secateur.gates.settings import Checks

__all__ = ["check_stretch", "closing_logit", "drawn", "stretched"]


def stretched(logits: Tensor, gamma: float, zeta: float) -> Tensor:
    """``clip(sigma(logits) (zeta - gamma) + gamma, 0, 1)``; no gradient where clipped."""
    # Unlike clamp, hardtanh has no gradient at 0 itself: a gate that stands there hears nothing.
    return F.hardtanh(torch.sigmoid(logits) * (zeta - gamma) + gamma, 0.0, 1.0)


def drawn(noise: Tensor, log_alpha: Tensor, beta: float, gamma: float, zeta: float) -> Tensor:
    """``stretched((noise + log_alpha) / beta)`` in as few passes over memory as there are, gradient included.

    Args:
        noise: ``(..., U)``, without gradient.
        log_alpha: ``(U,)``.
        beta: temperature.
        gamma: lower end.
        zeta: upper end.
    """
    return _Drawn.apply(noise, log_alpha, beta, gamma, zeta)  # type: ignore[no-any-return, no-untyped-call]


class _Drawn(torch.autograd.Function):
    """Fresh memory costs more than arithmetic here, so each step works in place, and only the draw is kept."""

    @staticmethod
    def forward(ctx: Any, noise: Tensor, log_alpha: Tensor, beta: float, gamma: float, zeta: float) -> Tensor:
        z = torch.add(noise, log_alpha).mul_(1.0 / beta).sigmoid_().mul_(zeta - gamma).add_(gamma).clamp_(0.0, 1.0)
        ctx.save_for_backward(z)
        ctx.settings = beta, gamma, zeta, log_alpha
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[None, Tensor, None, None, None]:
        (z,) = ctx.saved_tensors
        beta, gamma, zeta, log_alpha = ctx.settings
        # With s = (z - gamma) / (zeta - gamma), dz/dlog_alpha = s (1 - s) (zeta - gamma) / beta where z is not clipped.
        slope = ((zeta + gamma) - z).mul_(z).sub_(zeta * gamma).mul_(1.0 / (beta * (zeta - gamma)))
        slope = slope.mul_(torch.ops.aten.hardtanh_backward(outer[0], z, 0.0, 1.0))
        return None, slope.sum_to_size(log_alpha.shape).to(log_alpha.dtype), None, None, None


def closing_logit(gamma: float, zeta: float) -> float:
    """``log(-gamma / zeta)``, -ln 11 by default: at this logit and below, `stretched` is exactly 0."""
    return math.log(-gamma / zeta)


def check_stretch(checks: Checks, gamma: float, zeta: float) -> None:
    """The interval must reach beyond [0, 1] on both sides."""
    checks.between("gamma", gamma, None, 0.0, advice="the interval must reach below 0 for exact zeros")
    checks.between("zeta", zeta, 1.0, None, advice="the interval must reach above 1 for exact ones")
