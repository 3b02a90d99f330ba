"""Where the units of each group lie in one flat vector, and reductions over groups without a loop.

Index conventions: ``G`` groups, ``U`` units of all groups together; leading dimensions ``...`` are draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from secateur.errors import GateError

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """The units of all groups, concatenated in order into one vector of ``U = sum(sizes)`` entries.

    Two layouts are equal if their sizes are; the device is no part of it.

    Args:
        sizes: units of each group, at least 1 each.
        device: where ``segment`` and ``counts`` live; that of the parameters they are used with.

    Attributes:
        segment: int64 ``(U,)``, the group of each unit.
        counts: int64 ``(G,)``, ``sizes`` as a tensor.

    Raises:
        GateError: a size is not a positive whole number.

    Example:
        >>> layout = Layout((2, 3))
        >>> layout.total, layout.offsets, layout.segment.tolist()
        (5, (0, 2), [0, 0, 1, 1, 1])
        >>> layout.sum(torch.ones(5)).tolist()
        [2.0, 3.0]
    """

    sizes: tuple[int, ...]
    device: torch.device | str = field(default="cpu", compare=False, repr=False)
    segment: Tensor = field(init=False, compare=False, repr=False)
    counts: Tensor = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        sizes = tuple(self.sizes)
        given: tuple[object, ...] = sizes
        wrong = [size for size in given if not isinstance(size, int) or isinstance(size, bool) or size < 1]
        if wrong:
            raise GateError(f"Layout: group sizes {wrong!r}, expected whole numbers of at least 1")
        # Both are saved for backward passes, which tensors made in inference mode never can be.
        with torch.inference_mode(False):
            counts = torch.tensor(sizes, dtype=torch.int64).to(self.device)
            segment = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64))
            object.__setattr__(self, "sizes", sizes)
            object.__setattr__(self, "counts", counts)
            object.__setattr__(self, "segment", segment.to(self.device))

    @property
    def total(self) -> int:
        """Units of all groups, ``U``."""
        return sum(self.sizes)

    @property
    def n_groups(self) -> int:
        """Number of groups, ``G``."""
        return len(self.sizes)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Position of each group's first unit."""
        return (0, *accumulate(self.sizes[:-1])) if self.sizes else ()

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where each group lies in the flat vector."""
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.sizes, strict=True))

    def to(self, device: torch.device | str) -> Layout:
        """The same layout for tensors on ``device``."""
        return Layout(self.sizes, device)

    def sum(self, values: Tensor) -> Tensor:
        """Sums over each group: ``(..., U)`` to ``(..., G)``."""
        if len(self.sizes) == 1:  # one reduction; as a scatter all units would queue for one address
            return values.sum(-1, keepdim=True)
        return values.new_zeros(*values.shape[:-1], len(self.sizes)).index_add(-1, self.segment, values)

    def amax(self, values: Tensor) -> Tensor:
        """Maxima over each group, without gradient: ``(..., U)`` to ``(..., G)``."""
        values = values.detach()
        if len(self.sizes) == 1:
            return values.amax(-1, keepdim=True)
        start = values.new_full((*values.shape[:-1], len(self.sizes)), -torch.inf)
        return start.scatter_reduce(-1, self.segment.expand_as(values), values, "amax")

    def spread(self, values: Tensor) -> Tensor:
        """Each group's value at each of its units: ``(..., G)`` to ``(..., U)``."""
        return values.index_select(-1, self.segment)

    def rank(self, values: Tensor) -> Tensor:
        """Ascending rank of each unit in its group, from 0; ties by position: ``(U,)`` to int64 ``(U,)``."""
        by_value = values.detach().argsort(stable=True)
        order = by_value[self.segment[by_value].argsort(stable=True)]
        starts = self.counts.cumsum(0) - self.counts
        positions = torch.arange(self.total, device=values.device) - starts[self.segment]
        return torch.empty_like(order).scatter_(0, order, positions)
