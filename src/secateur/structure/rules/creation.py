"""Operators that make tensors out of nothing: uniform ones say nothing about units, others are fixed constants."""

from __future__ import annotations

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Factor, Label
from secateur.structure.rules.registry import Call, freeze_all, rule

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
    "empty_strided",
    "new_empty_strided",
    "empty_permuted",
    "_efficientzerotensor",
    sizes=True,
)
def uniform(c: Coupling, call: Call) -> Label:
    """One value everywhere, whatever its size (the trial sees sizes that do not follow a cut).

    Its dimensions get ids of their own all the same: two units' dimensions that both meet this tensor have one
    size, as the heads of all layers to which one empty position bias is added.
    """
    shape = call.shape
    fresh = [Factor((dim,), c.new_ids(size)) for dim, size in enumerate(shape) if size > 1 and c.recording]
    return Label(shape, tuple(fresh), uniform=frozenset(range(len(shape))), zero=_zero(call))


@rule("zeros_like", "ones_like", "full_like", "empty_like")
def uniform_like(c: Coupling, call: Call) -> Label:
    """One value everywhere, as wide as another tensor: its dimensions follow that tensor's units."""
    return Label(call.shape, call.label("self").factors, uniform=frozenset(range(len(call.shape))), zero=_zero(call))


@rule("scalar_tensor")
def scalar(c: Coupling, call: Call) -> Label:
    """A number as a tensor: the trial compares it."""
    return Label(call.shape, zero=_zero(call))


def _zero(call: Call) -> bool:
    """Whether the value is the number 0."""
    value = call.get("fill_value", call.get("s"))
    return call.name in _ZEROS or (isinstance(value, (bool, int, float, complex)) and value == 0)


_ZEROS = frozenset({"zeros", "new_zeros", "zeros_like", "_efficientzerotensor"})


@rule(
    "arange",
    "linspace",
    "logspace",
    "eye",
    "tril_indices",
    "triu_indices",
    "bartlett_window",
    "blackman_window",
    "hamming_window",
    "hann_window",
    "kaiser_window",
)
def constant(c: Coupling, call: Call) -> Label:
    """Values that differ by position: fixed."""
    return Label(call.shape)


@rule(
    "rand",
    "randn",
    "rand_like",
    "randn_like",
    "randint",
    "randint_like",
    "randperm",
    "normal",
    "uniform",
    "random",
    "exponential",
    "cauchy",
    "geometric",
    "log_normal",
)
def random(c: Coupling, call: Call) -> Label:
    """Random numbers differ by position, and a smaller model would draw others: fixed.

    Masks of dropout are none of these: they are switched off where a cut is proven.
    """
    written = call.values["self"] if call.func._schema.is_mutable else None
    like = call.name.endswith("_like")
    given = [tensor for tensor in call.tensors() if tensor is not written and not like]
    freeze_all(c, call.labels_of(given), "is the mean or scale of random numbers")
    return Label(call.shape)
