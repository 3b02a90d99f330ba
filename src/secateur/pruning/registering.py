"""Parametrizations that are registered whole or not at all."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from secateur.errors import GateError

__all__ = ["register_gate", "reorder"]


def register_gate(owner: nn.Module, key: str, gate: nn.Module) -> None:
    """Put a gate on a tensor of a module, in place; where it raises, nothing has changed.

    Raises:
        GateError: the module's class has no place for it: torch derives one from it that computes the tensor.
    """
    tensors: Any = owner._parameters if key in owner._parameters else owner._buffers
    before, passing = dict(tensors), key in owner._non_persistent_buffers_set
    try:
        register_parametrization(owner, key, gate, unsafe=True)
    except Exception as error:
        tensors.clear()  # the tensor was taken off first; and the order of names is that of state dicts
        tensors.update(before)
        if passing:
            owner._non_persistent_buffers_set.add(key)
        raise GateError(
            f"{key} of a {type(owner).__name__} takes no gate: torch derives a class from {type(owner).__name__} that"
            f" computes it, and {type(error).__name__}: {error}. Leave these layers out with sc.Rule(exclude=...)"
        ) from error


def reorder(tensors: dict[str, Any], order: tuple[str, ...]) -> None:
    """Bring tensors into an order of names, in place; those that it does not name come last."""
    for name in [*(name for name in order if name in tensors), *(name for name in list(tensors) if name not in order)]:
        tensors[name] = tensors.pop(name)
