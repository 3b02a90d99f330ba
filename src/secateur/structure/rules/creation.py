"""Operators that make tensors out of nothing: uniform ones are neutral, others are fixed constants."""

from __future__ import annotations

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Label
from secateur.structure.rules.registry import Call, rule

__all__: list[str] = []


@rule(
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "scalar_tensor",
    "empty_strided",
    "new_empty_strided",
    "empty_permuted",
    "_efficientzerotensor",
    sizes=True,
)
def uniform(c: Coupling, call: Call) -> Label:
    """One value everywhere: neutral, whatever its size (the trial sees sizes that do not follow a cut)."""
    return Label(call.shape, neutral=True)


@rule(
    "rand",
    "randn",
    "rand_like",
    "randn_like",
    "randint",
    "randint_like",
    "randperm",
    "arange",
    "linspace",
    "logspace",
    "eye",
    "tril_indices",
    "triu_indices",
    "bartlett_window",
    "hann_window",
)
def constant(c: Coupling, call: Call) -> Label:
    """Values that differ by position: fixed."""
    return Label(call.shape)
