"""Fourier transforms: the transformed dimensions are mixed, the others pass."""

from __future__ import annotations

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Label
from secateur.structure.rules.reduction import given_up
from secateur.structure.rules.registry import Call, rule

__all__: list[str] = []


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fourier(c: Coupling, call: Call) -> Label:
    """A transform over some dimensions."""
    label = given_up(c, call.label("self"), call.dims(), "is mixed by a Fourier transform")
    return Label(call.shape, label.factors)
