"""What a wrapper for several processes sees of gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["reaching"]


class _Reaching(torch.autograd.Function):
    """A tensor as it is, in whose graph parameters are that get no gradient by it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *parameters: Tensor) -> Tensor:
        ctx.others = (None,) * len(parameters)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad, *ctx.others)


def reaching(output: Any, parameters: Sequence[Tensor]) -> Any:
    """The output of a forward pass, with parameters of gates in its graph where a wrapper asks what is there.

    ``DistributedDataParallel(find_unused_parameters=True)`` takes what the output does not depend on for done before
    the backward pass, and fails where a gradient comes all the same: that of a term of the loss, as a budget's or that
    of ARM gates.

    Args:
        output: of the model.
        parameters: that take a gradient.
    """
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if wrapper is None or not wrapper.find_unused_parameters or not parameters:
        return output
    leaves, spec = tree_flatten(output)
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaves[number] = _Reaching.apply(leaf, *parameters)  # type: ignore[no-untyped-call]
            return tree_unflatten(leaves, spec)
    return output
