"""Labels: which unit each index of a tensor's dimensions belongs to.

Index conventions: a *unit id* is a positive integer, 0 means *fixed* (never removed). A *factor* is a
tuple of ascending dimensions of one tensor and an integer array of just those dimensions' shape: the
slice at ``index`` along ``dims`` belongs to unit ``ids[index]``. Dimensions in no factor are fixed.
The functions here are pure; what must be tied or frozen is said to a ``Coupling`` by the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Factor", "Ids", "Label", "first_slice", "make_factor", "map_dims", "matching_blocks", "reshape_factor"]

Ids = NDArray[np.int64]
Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Factor:
    """Unit ids over some dimensions of a tensor.

    Args:
        dims: ascending dimensions.
        ids: int64 array of the shape of ``dims``; 0 is fixed.
    """

    dims: tuple[int, ...]
    ids: Ids


@dataclass(frozen=True, eq=False)
class Label:
    """What is known of one tensor while a model is traced.

    Args:
        shape: the tensor's shape.
        factors: unit ids; no two factors share a dimension.
        uniform: dimensions along which all slices are equal (all of them for zeros or ones, those that an
            expansion made), so that any number of slices is the same thing: they say nothing about units.
        weight: the way from a parameter to here maps 0 to 0 element by element, so that zeroing the
            parameter's slice zeroes this tensor's.
        data: depends on the model's inputs.
        vanishes: where all parameters' slices of a unit are zero, so is the unit's slice here.
        zero: was made as zeros, or is a copy of such; of what is computed from it nothing is said.
    """

    shape: Shape
    factors: tuple[Factor, ...] = ()
    uniform: frozenset[int] = frozenset()
    weight: bool = False
    data: bool = False
    vanishes: bool = False
    zero: bool = False

    @property
    def neutral(self) -> bool:
        """Whether every element has the same value."""
        return len(self.uniform) == len(self.shape)

    def factor_at(self, dim: int) -> Factor | None:
        """The factor that covers ``dim``, or None where the dimension is fixed."""
        for factor in self.factors:
            if dim in factor.dims:
                return factor
        return None

    def ids_along(self, dim: int) -> Ids:
        """Ids of a dimension that is alone in its factor; zeros where it is fixed or shares its factor."""
        factor = self.factor_at(dim)
        if factor is None or len(factor.dims) > 1:
            return np.zeros(self.shape[dim], dtype=np.int64)
        return factor.ids

    def with_factors(self, shape: Shape, factors: Iterable[Factor], uniform: Iterable[int] = ()) -> Label:
        """The same kind of tensor with another shape, other factors and uniform dimensions."""
        return Label(
            tuple(shape), tuple(factors), frozenset(uniform), weight=self.weight, data=self.data, vanishes=self.vanishes
        )


def make_factor(dims: Sequence[int], ids: Ids) -> Factor | None:
    """A factor in normal form: ascending dimensions, without those along which the ids do not change.

    None where every id is fixed. At least one dimension stays otherwise, so that a dimension of one
    unit keeps its label.
    """
    if not ids.any():
        return None
    if len(dims) == 1:
        return Factor((int(dims[0]),), np.ascontiguousarray(ids))
    order = np.argsort(dims, kind="stable")
    dims, ids = tuple(int(dims[k]) for k in order), ids.transpose(order)
    axis = 0
    while len(dims) > 1 and axis < len(dims):
        if ids.shape[axis] == 1 or bool((ids == ids.take([0], axis=axis)).all()):
            ids = first_slice(ids, axis)
            dims = dims[:axis] + dims[axis + 1 :]
        else:
            axis += 1
    return Factor(dims, np.ascontiguousarray(ids))


def first_slice(ids: Ids, axis: int) -> Ids:
    """The ids at position 0 of an axis, which goes."""
    return np.asarray(np.take(ids, 0, axis=axis), dtype=np.int64)


def map_dims(factors: Iterable[Factor], to: Callable[[int], int]) -> tuple[Factor, ...]:
    """Rename the dimensions of factors, as a permutation or an inserted dimension does."""
    made = (make_factor([to(dim) for dim in factor.dims], factor.ids) for factor in factors)
    return tuple(factor for factor in made if factor is not None)


def matching_blocks(old: Shape, new: Shape) -> list[tuple[range, range]]:
    """Split two shapes of one size into the smallest runs of dimensions with equal products.

    Example:
        >>> matching_blocks((2, 6, 5), (2, 3, 2, 5))
        [(range(0, 1), range(0, 1)), (range(1, 2), range(1, 3)), (range(2, 3), range(3, 4))]
    """
    blocks: list[tuple[range, range]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        left = right = 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        blocks.append((range(start_i, i), range(start_j, j)))
    return blocks


def reshape_factor(factor: Factor, old: Shape, new: Shape, blocks: list[tuple[range, range]]) -> Factor | None:
    """The factor after ``reshape(new)``: the same reshape, applied to the ids of the blocks it touches."""
    touched = [(a, b) for a, b in blocks if any(dim in a for dim in factor.dims)]
    from_dims = [dim for a, _ in touched for dim in a]
    to_dims = [dim for _, b in touched for dim in b]
    lined_up = factor.ids.reshape([old[dim] if dim in factor.dims else 1 for dim in from_dims])
    full = np.broadcast_to(lined_up, [old[dim] for dim in from_dims])
    if not to_dims:
        return None
    return make_factor(to_dims, full.reshape([new[dim] for dim in to_dims]))
