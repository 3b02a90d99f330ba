"""One row of the zoo: how an architecture is built, small enough for a test and in its real size, and called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur import Example

#: A model and what it is called with.
Built = tuple[nn.Module, Example]


@dataclass(frozen=True)
class Row:
    """One architecture.

    Args:
        name: unique in the zoo.
        family: what kind of network it is.
        origin: who wrote it: a package, or "own".
        tiny: builds it with few and small layers, with an example for it.
        real: builds it in a size in which it is used; called under ``torch.device("meta")``.
        causal: whether it is a language model that generates token by token with a cache.
        quick: whether the default tests build it.
        uncounted: why torch's counter of operations cannot be compared with, or "".
    """

    name: str
    family: str
    origin: str
    tiny: Callable[[], Built]
    real: Callable[[], Built] | None = None
    causal: bool = False
    quick: bool = False
    uncounted: str = ""


def images(size: int = 32, channels: int = 3, batch: int = 2) -> Tensor:
    """Pictures ``(B, C, size, size)``."""
    return torch.randn(batch, channels, size, size)


def tokens(vocabulary: int, time: int = 12, batch: int = 2) -> Tensor:
    """Words ``(B, T)``; the first three numbers are left to padding, start and end."""
    return torch.randint(min(3, vocabulary - 1), vocabulary, (batch, time))


def called(*args: Any, **kwargs: Any) -> Example:
    """The example of a call with these arguments."""
    return Example(args, kwargs)
