"""Gate methods: how units are drawn while training and fixed in evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from secateur.errors import GateError
from secateur.gates.arm import ARM
from secateur.gates.differentiable_sparsification import DifferentiableSparsification
from secateur.gates.diffprune import DiffPrune
from secateur.gates.gate import Estimator, Gate, Method, Params, ScoreFunction
from secateur.gates.hard_concrete import HardConcrete
from secateur.gates.layout import Layout
from secateur.gates.magnitude import Magnitude
from secateur.gates.noise import Correlated, Logistic, Noise, Normal
from secateur.gates.straight_through import StraightThrough

__all__ = [
    "ARM",
    "METHODS",
    "Correlated",
    "DiffPrune",
    "DifferentiableSparsification",
    "Estimator",
    "Gate",
    "HardConcrete",
    "Layout",
    "Logistic",
    "Magnitude",
    "Method",
    "Noise",
    "Normal",
    "Params",
    "ScoreFunction",
    "StraightThrough",
    "method_from_name",
]

#: What makes a method, by the name that commands and recipes use.
METHODS: Mapping[str, Callable[..., Method]] = {
    "hard-concrete": HardConcrete,
    "arm": ARM,
    "ar": partial(ARM, estimator="ar"),
    "diffprune": DiffPrune,
    "diff-sparse": DifferentiableSparsification,
    "magnitude": Magnitude,
    "straight-through": StraightThrough,
}


def method_from_name(name: str, **settings: Any) -> Method:
    """A method by its name, with settings as its ``settings()`` recorded them or fewer.

    Args:
        name: a key of ``METHODS``.
        settings: fields of the method.

    Raises:
        GateError: the name or a setting is unknown, or a value is outside its range.

    Example:
        >>> method_from_name("ar", k=5.0).estimator
        'ar'
        >>> method_from_name("hardconcrete")
        Traceback (most recent call last):
            ...
        secateur.errors.GateError: no gate method 'hardconcrete'; expected one of 'hard-concrete', 'arm', ...
    """
    if name not in METHODS:
        raise GateError(f"no gate method {name!r}; expected one of {', '.join(map(repr, METHODS))}")
    known = list(inspect.signature(METHODS[name]).parameters)
    unknown = [label for label in settings if label not in known]
    if unknown:
        raise GateError(f"{name}: unknown settings {unknown}; expected some of {', '.join(known)}")
    method = METHODS[name](**settings)
    if method.name != name:
        raise GateError(f"{name}: its settings make {method.name!r}; ask for that name or change them")
    return method
