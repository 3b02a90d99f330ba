"""Options that take several numbers."""

from __future__ import annotations

from typing import TypeVar

from secateur.errors import SecateurError

__all__ = ["numbers"]

N = TypeVar("N", int, float)


def numbers(text: str, option: str, kind: type[N]) -> tuple[N, ...]:
    """The numbers of an option, given with commas between.

    Args:
        text: what was given.
        option: its name, for the message.
        kind: ``int`` or ``float``.

    Raises:
        SecateurError: a part is no such number.

    Example:
        >>> numbers("0,1,2", "--seeds", int)
        (0, 1, 2)
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        expected, example = {"int": ("whole numbers", "1,2"), "float": ("numbers", "0.5,0.1")}[kind.__name__]
        raise SecateurError(f"{option} {text!r}: expected {expected} with commas between, such as {example}") from None
