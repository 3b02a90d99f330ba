"""Example inputs: how a model is called while it is traced and proven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from secateur.errors import TraceError

__all__ = ["Example", "Examples", "as_examples", "summary"]


@dataclass(frozen=True)
class Example:
    """One call of the model.

    Args:
        args: positional inputs.
        kwargs: keyword inputs.

    Example:
        >>> Example(args=(1,), kwargs={"mask": None}).args
        (1,)
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


#: What ``examples=`` accepts: a tuple of positional inputs, an Example, or a list of these.
Examples = tuple[Any, ...] | Example | Sequence[tuple[Any, ...] | Example]


def as_examples(examples: Examples) -> tuple[Example, ...]:
    """Give every accepted form of ``examples`` as a tuple of :class:`Example`.

    Raises:
        TraceError: for anything else, a bare tensor among it, or an empty list.

    Example:
        >>> len(as_examples([(1, 2), Example(kwargs={"x": 3})]))
        2
    """
    if isinstance(examples, Example):
        return (examples,)
    if isinstance(examples, tuple):
        return (Example(args=examples),)
    if isinstance(examples, list) and examples:
        return tuple(_one(item, f"examples[{position}]") for position, item in enumerate(examples))
    raise TraceError(
        f"examples: got {type(examples).__name__}{' of length 0' if isinstance(examples, list) else ''}, expected a "
        "tuple of positional inputs such as examples=(x,), an sc.Example(args, kwargs), or a list of these."
    )


def _one(item: object, where: str) -> Example:
    if isinstance(item, Example):
        return item
    if isinstance(item, tuple):
        return Example(args=item)
    raise TraceError(
        f"{where}: got {type(item).__name__}, expected a tuple of positional inputs or an sc.Example(args, kwargs)."
    )


def summary(example: Example) -> str:
    """What a call is made with, in words: types and shapes of tensors, other values as their types.

    Example:
        >>> summary(Example((torch.zeros(2, 3),), {"flag": True}))
        '(float32 (2, 3), flag=bool)'
    """
    given = [_named(value) for value in example.args]
    given += [f"{name}={_named(value)}" for name, value in example.kwargs.items()]
    return f"({', '.join(given)})"


def _named(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__
