"""Some positions of a tensor, by an operator whose gradient is zero at all others.

Index conventions: ``S`` positions of one dimension, ``k`` runs of neighbouring positions that are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.structure.tensors import dimension_order, in_order

__all__ = ["Place", "narrowed"]


@dataclass(frozen=True, eq=False)
class Place:
    """What is read of one dimension.

    Args:
        dim: the dimension, counted from the start.
        index: int64 ``(k,)``, numbers of runs, ascending.
        run: length of a run, of which the dimension is a whole number: 1 for single positions.
    """

    dim: int
    index: Tensor
    run: int = 1

    def runs(self, tensor: Tensor) -> Tensor:
        """The tensor with its runs in a dimension of their own behind this one."""
        return tensor if self.run == 1 else tensor.unflatten(self.dim, (-1, self.run))  # type: ignore[no-untyped-call]


def narrowed(tensor: Tensor, places: Sequence[Place]) -> Tensor:
    """The tensor at these places, laid out in memory as it was; no graph where none is recorded.

    As ``index_select``, but runs are copied whole and the gradient is written once instead of added up: a weight of
    500 x 800, of which a third of the rows and of the runs of 16 columns is read, takes a fifth of the time back.

    Example:
        >>> weight = torch.arange(8.0).reshape(2, 4).requires_grad_()
        >>> part = narrowed(weight, [Place(0, torch.tensor([1])), Place(1, torch.tensor([1]), run=2)])
        >>> part.tolist(), torch.autograd.grad(part.sum(), weight)[0].tolist()
        ([[6.0, 7.0]], [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    """
    if tensor.requires_grad and torch.is_grad_enabled():
        return _Narrowed.apply(tensor, tuple(places))  # type: ignore[no-any-return, no-untyped-call]
    return _read(tensor, places)


def _read(tensor: Tensor, places: Sequence[Place]) -> Tensor:
    order = None if tensor.is_contiguous() else dimension_order(tensor)
    for place in places:
        part = place.runs(tensor).index_select(place.dim, place.index)
        tensor = part if place.run == 1 else part.flatten(place.dim, place.dim + 1)
    return tensor if order is None else in_order(tensor, order)


class _Narrowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, places: tuple[Place, ...]) -> Tensor:
        shapes = [tensor.shape]
        for place in places[:-1]:
            sizes = list(shapes[-1])
            sizes[place.dim] = len(place.index) * place.run
            shapes.append(torch.Size(sizes))
        ctx.places, ctx.shapes, ctx.strides = places, shapes, tensor.stride()
        return _read(tensor, places)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        (grad,) = outer
        for number in reversed(range(len(ctx.places))):
            place, shape = ctx.places[number], ctx.shapes[number]
            if number:
                wide = grad.new_zeros(shape)
            else:
                wide = torch.empty_strided(shape, ctx.strides, dtype=grad.dtype, device=grad.device).zero_()
            place.runs(wide).index_copy_(place.dim, place.index, place.runs(grad))
            grad = wide
        return grad, None
