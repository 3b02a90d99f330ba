"""Settings of gate methods: checked when a method is made, described as JSON when a recipe records it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from secateur.errors import GateError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["CUSTOM", "Checks", "described", "is_a_number"]

#: Prefix under which a user's own function or object is recorded: a name to read, not one to import.
CUSTOM = "custom:"


class Checks:
    """Collects everything that is wrong with an object's settings, then raises once.

    Args:
        where: the class whose settings are checked; begins every message.

    Example:
        >>> checks = Checks("HardConcrete")
        >>> checks.between("gamma", 0.1, None, 0.0)
        >>> checks.done()
        Traceback (most recent call last):
            ...
        secateur.errors.GateError: HardConcrete: gamma is 0.1, expected a number in (-inf, 0)
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.problems: list[str] = []

    def between(self, name: str, value: object, low: float | None, high: float | None, *, advice: str = "") -> None:
        """``value`` must be a finite number with ``low < value < high``; None leaves a side open."""
        bottom = -math.inf if low is None else low
        top = math.inf if high is None else high
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and bottom < value < top):  # type: ignore[arg-type, operator]
            hint = f"; {advice}" if advice else ""
            self.problems.append(f"{name} is {value!r}, expected a number in ({bottom:g}, {top:g}){hint}")

    def pair(self, name: str, value: object, low: float, high: float) -> None:
        """``value`` must be two numbers ``low < a < b < high``."""
        good = isinstance(value, Sequence) and len(value) == 2
        good = good and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value)  # type: ignore[attr-defined]
        if not (good and low < value[0] < value[1] < high):  # type: ignore[index]
            self.problems.append(f"{name} is {value!r}, expected two numbers a < b in ({low:g}, {high:g})")

    def count(self, name: str, value: object, least: int) -> None:
        """``value`` must be a whole number of at least ``least``."""
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self.problems.append(f"{name} is {value!r}, expected a whole number of at least {least}")

    def one_of(self, name: str, value: object, allowed: Sequence[object]) -> None:
        """``value`` must be among ``allowed``."""
        if not any(value is option or (type(value) is type(option) and value == option) for option in allowed):
            self.problems.append(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")

    def holds(self, condition: bool, problem: str) -> None:
        """Record ``problem`` unless ``condition``."""
        if not condition:
            self.problems.append(problem)

    def done(self) -> None:
        """Raise if anything was wrong.

        Raises:
            GateError: names every problem that was recorded.
        """
        if self.problems:
            raise GateError(f"{self.where}: " + "; ".join(self.problems))


def is_a_number(value: object, kind: type) -> bool:
    """Whether ``value`` is of a kind of number of `numbers`, NumPy's among them; a bool is none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def described(settings: DataclassInstance) -> dict[str, Any]:
    """The init fields of ``settings`` as values that JSON can hold.

    Objects with ``settings()`` of their own are nested; a user's function becomes ``"custom:module.name"``,
    which says what it was but cannot be read back.
    """
    return {item.name: _plain(getattr(settings, item.name)) for item in fields(settings) if item.init}


def _plain(value: object) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    nested: Callable[[], dict[str, Any]] | None = getattr(value, "settings", None)
    if callable(nested):
        return nested()
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{CUSTOM}{named.__module__}.{named.__qualname__}"
