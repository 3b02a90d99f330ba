"""The stretched and clipped sigmoid that hard concrete and DiffPrune share."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from secateur.gates.settings import Checks

__all__ = ["attached", "check_stretch", "closing_logit", "draw", "pulled", "stretched"]


def stretched(logits: Tensor, gamma: float, zeta: float) -> Tensor:
    """``clip(sigma(logits) (zeta - gamma) + gamma, 0, 1)``; no gradient where clipped."""
    # Unlike clamp, hardtanh has no gradient at 0 itself: a gate that stands there hears nothing.
    return F.hardtanh((torch.sigmoid(logits) * (zeta - gamma)).add_(gamma), 0.0, 1.0)


def draw(noise: Tensor, log_alpha: Tensor, beta: float, gamma: float, zeta: float) -> Tensor:
    """``stretched((noise + log_alpha) / beta)`` without a graph.

    Fresh memory costs more than arithmetic here, so each step works in place.

    Args:
        noise: ``(..., U)``.
        log_alpha: ``(U,)``.
        beta: temperature.
        gamma: lower end.
        zeta: upper end.
    """
    return torch.add(noise, log_alpha).mul_(1.0 / beta).sigmoid_().mul_(zeta - gamma).add_(gamma).clamp_(0.0, 1.0)


def pulled(outer: Tensor, z: Tensor, log_alpha: Tensor, beta: float, gamma: float, zeta: float) -> Tensor:
    """Gradient of ``log_alpha`` from that of a `draw` z, ``(..., U)``: of z alone, and 0 where it is clipped."""
    # With s = (z - gamma) / (zeta - gamma), dz/dlog_alpha = s (1 - s) (zeta - gamma) / beta.
    slope = ((zeta + gamma) - z).mul_(z).sub_(zeta * gamma).mul_(1.0 / (beta * (zeta - gamma)))
    slope = slope.mul_(torch.ops.aten.hardtanh_backward(outer.to(z.dtype), z, 0.0, 1.0))
    return slope if slope.shape == log_alpha.shape else slope.sum_to_size(log_alpha.shape)


def attached(noise: Tensor, log_alpha: Tensor, beta: float, gamma: float, zeta: float) -> Tensor:
    """`draw` with its gradient as a part of autograd's graph."""
    return _Draw.apply(noise, log_alpha, beta, gamma, zeta)  # type: ignore[no-any-return, no-untyped-call]


class _Draw(torch.autograd.Function):
    """Only the draw is kept for the way back."""

    @staticmethod
    def forward(ctx: Any, noise: Tensor, log_alpha: Tensor, beta: float, gamma: float, zeta: float) -> Tensor:
        z = draw(noise, log_alpha, beta, gamma, zeta)
        ctx.save_for_backward(z)
        ctx.settings = log_alpha, beta, gamma, zeta
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[None, Tensor, None, None, None]:
        (z,) = ctx.saved_tensors
        log_alpha = ctx.settings[0]
        return None, pulled(outer[0], z, *ctx.settings).to(log_alpha.dtype), None, None, None


def closing_logit(gamma: float, zeta: float) -> float:
    """``log(-gamma / zeta)``, -ln 11 by default: at this logit and below, `stretched` is exactly 0."""
    return math.log(-gamma / zeta)


def check_stretch(checks: Checks, gamma: float, zeta: float) -> None:
    """The interval must reach beyond [0, 1] on both sides."""
    checks.between("gamma", gamma, None, 0.0, advice="the interval must reach below 0 for exact zeros")
    checks.between("zeta", zeta, 1.0, None, advice="the interval must reach above 1 for exact ones")
