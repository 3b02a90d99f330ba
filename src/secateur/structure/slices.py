"""Single tensors, cut: real, fake, and on the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor

from secateur.structure.fakes import fake
from secateur.structure.tensors import dimension_order, in_order, strides_in_order

__all__ = ["cut_tensor", "index_of", "mode_of"]


def cut_tensor(tensor: torch.Tensor, cuts: Mapping[int, Sequence[int]]) -> torch.Tensor:
    """A detached copy of `tensor` with only the kept positions of some dimensions, laid out in memory as it was."""
    if isinstance(tensor, FakeTensor):
        shape = [len(cuts[dim]) if dim in cuts else size for dim, size in enumerate(tensor.shape)]
        strides = strides_in_order(shape, dimension_order(tensor))
        return fake(tensor.fake_mode, shape, strides, tensor.dtype, tensor.fake_device)
    small = tensor.detach()
    for dim, kept in cuts.items():
        small = small.index_select(dim, index_of(kept, tensor))
    return in_order(small, dimension_order(tensor))


def mode_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """The mode in which new tensors may meet `tensor`."""
    return tensor.fake_mode if isinstance(tensor, FakeTensor) else contextlib.nullcontext()


def index_of(positions: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Positions as an index into `like`."""
    with mode_of(like):
        return torch.tensor(positions, dtype=torch.int64, device=like.device)
