"""Layers that read only some positions of their input while they train: a hook, so that their class stays.

`secateur.structure.select` does the same for a finished model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from secateur.structure.select import select_input_

__all__ = ["read_all", "read_only", "reads_some", "settle"]


class _Reads:
    """Forward pre-hook: the layer gets only some positions of its input.

    Args:
        positions: along ``dim`` of the input.
        dim: counted from the end.
    """

    def __init__(self, positions: Tensor, dim: int) -> None:
        self.positions = positions
        self.dim = dim

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else kwargs["input"]
        if self.positions.device != given.device:
            self.positions = self.positions.to(given.device)
        chosen = given.index_select(self.dim, self.positions)
        return ((chosen, *args[1:]), kwargs) if args else ((), {**kwargs, "input": chosen})


def read_only(layer: nn.Module, positions: Sequence[int]) -> None:
    """Let a layer read only these positions of its input, from now on and instead of those before."""
    _taken(layer)
    dim = -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1  # a read of the weight would draw its gates
    hook = _Reads(torch.tensor(positions, device=next(layer.parameters()).device), dim)
    layer.register_forward_pre_hook(hook, with_kwargs=True)


def read_all(model: nn.Module) -> None:
    """Let every layer read its whole input again."""
    for module in model.modules():
        _taken(module)


def reads_some(layer: nn.Module) -> bool:
    """Whether a layer reads only some positions of its input."""
    return any(isinstance(hook, _Reads) for hook in layer._forward_pre_hooks.values())


def settle(model: nn.Module) -> None:
    """Make the choice part of each layer, as `secateur.compact` does."""
    for module in list(model.modules()):
        if (hook := _taken(module)) is not None:
            select_input_(module, hook.positions)


def _taken(layer: nn.Module) -> _Reads | None:
    """Take the hook off, and return it."""
    for number, hook in list(layer._forward_pre_hooks.items()):
        if isinstance(hook, _Reads):
            del layer._forward_pre_hooks[number]
            layer._forward_pre_hooks_with_kwargs.pop(number, None)
            return hook
    return None
