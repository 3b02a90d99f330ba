"""The parameters and buffers of a module: their names, shapes, sharing and layout in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    "Slot",
    "dimension_order",
    "distinct_tensors",
    "first_names",
    "in_order",
    "in_place_of",
    "listed",
    "misfits",
    "named_tensors",
    "shapes_of",
    "slots_of",
    "strides_in_order",
]

#: Problems that one message lists before it only counts the rest.
N_LISTED = 8


class Slot(NamedTuple):
    """One place where a module holds a parameter or buffer; a tied tensor has several."""

    owner: nn.Module
    key: str
    tensor: torch.Tensor


def slots_of(module: nn.Module) -> dict[str, Slot]:
    """Every place that holds a parameter or buffer, by qualified name; shared modules under each of their names."""

    def each() -> Iterator[tuple[str, Slot]]:
        for path, owner in module.named_modules(remove_duplicate=False):
            for tensors in (owner._parameters, owner._buffers):
                for key, tensor in tensors.items():
                    if tensor is not None:
                        yield f"{path}.{key}" if path else key, Slot(owner, key, tensor)

    return dict(each())


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by all their names: a tied tensor appears under each."""
    return {name: slot.tensor for name, slot in slots_of(module).items()}


def first_names(module: nn.Module) -> dict[str, str]:
    """The first name of the tensor that each name stands for: names that share a tensor share their first name."""
    names: dict[int, str] = {}
    return {name: names.setdefault(id(tensor), name) for name, tensor in named_tensors(module).items()}


def distinct_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, tied ones under their first name."""
    seen: set[int] = set()
    return {
        name: tensor
        for name, tensor in named_tensors(module).items()
        if id(tensor) not in seen and not seen.add(id(tensor))  # type: ignore[func-returns-value]
    }


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters and buffers, tied ones under their first name."""
    return {name: tuple(tensor.shape) for name, tensor in distinct_tensors(module).items()}


def misfits(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What keeps a module from having the given shapes, in words; empty if it has them."""
    tensors = named_tensors(module)
    problems = []
    for name, expected in shapes.items():
        if name not in tensors:
            problems.append(f"{name}: missing, expected shape {tuple(expected)}")
        elif tuple(tensors[name].shape) != tuple(expected):
            problems.append(f"{name}: shape {tuple(tensors[name].shape)}, expected {tuple(expected)}")
    named = {id(tensors[name]) for name in shapes if name in tensors}
    problems += [f"{name}: not expected" for name in shapes_of(module) if id(tensors[name]) not in named]
    return problems


def dimension_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """The dimensions from the slowest to the fastest in memory; ``(0, 2, 3, 1)`` is ``channels_last``."""
    # Where strides tie, a dimension of size 1 is the faster one: so torch lays out (O, 1, 3, 3) in both its formats.
    return tuple(sorted(range(tensor.dim()), key=lambda dim: (-tensor.stride()[dim], tensor.shape[dim] == 1)))


def strides_in_order(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Strides without gaps, the dimensions from the slowest to the fastest in the given order.

    Example:
        >>> strides_in_order((2, 3, 4, 5), (0, 2, 3, 1))
        (60, 1, 15, 3)
    """
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(int(shape[dim]), 1)
    return tuple(strides)


def in_order(tensor: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """`tensor`, copied if need be, so that its dimensions lie in memory in the given order without gaps.

    Example:
        >>> in_order(torch.zeros(2, 3, 4, 5), (0, 2, 3, 1)).is_contiguous(memory_format=torch.channels_last)
        True
    """
    strides = strides_in_order(tensor.shape, order)
    if strides == tensor.stride():
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def in_place_of(old: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """`data` as the parameter or buffer that takes the place of `old`: its class, gradient flag and marks."""
    requires_grad = old.requires_grad and (data.is_floating_point() or data.is_complex())
    if not isinstance(old, nn.Parameter):
        new = data.requires_grad_(requires_grad)
    elif isinstance(data, FakeTensor):
        new = data.requires_grad_(requires_grad)
        new._is_param = True
    elif type(old) is nn.Parameter or type(data) is not torch.Tensor or isinstance(old, FakeTensor):
        new = nn.Parameter(data, requires_grad=requires_grad)
    else:
        new = torch.Tensor._make_subclass(type(old), data, requires_grad)
    if type(data) is torch.Tensor and not isinstance(old, FakeTensor):
        for key, value in vars(old).items():  # marks such as "no weight decay"
            setattr(new, key, value)
    return new


def listed(items: Sequence[str]) -> str:
    """The first few items of a list of problems, and how many more there are."""
    shown = "; ".join(items[:N_LISTED])
    return shown if len(items) <= N_LISTED else f"{shown}; and {len(items) - N_LISTED} more"
