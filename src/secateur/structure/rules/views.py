"""Operators that look at the same elements in another shape or order: the same movement, applied to the ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Factor, Label, make_factor, map_dims, matching_blocks, reshape_factor
from secateur.structure.rules.pointwise import meet, uniform_together
from secateur.structure.rules.registry import Call, freeze_all, rule, set_factors

__all__ = ["leave_out", "renamed", "reshaped"]


def reshaped(c: Coupling, label: Label, shape: Sequence[int]) -> Label:
    """A label after ``reshape(shape)``.

    Where two units' dimensions merge into one, each position has an id for the pair, and the solution decides which
    of the two is cut. Of more than two the units of the later parameters are frozen: which of them stay free must not
    depend on how many are left of either.
    """
    shape = tuple(shape)
    if shape == label.shape:
        return label
    if 0 in shape or 0 in label.shape:
        freeze_all(c, [label], "is reshaped in a tensor without elements")
        return set_factors(label, shape, [])
    blocks = matching_blocks(label.shape, shape)
    kept: list[Factor] = []
    came: list[Factor] = []  # what each of these was before
    unknown: list[Factor] = []
    for factor in sorted(label.factors, key=lambda factor: int(factor.ids.max())):
        made = reshape_factor(factor, label.shape, shape, blocks)
        if made is None:
            continue
        met = [number for number, other in enumerate(kept) if set(made.dims) & set(other.dims)]
        if len(met) == 1 and _can_cross(c, came[met[0]], factor):
            (number,) = met
            first = came.pop(number)
            kept.pop(number)
            pairs = c.cross(first.ids, factor.ids)
            # Pairs that the trial does not know say nothing, but take up their place as well.
            told = pairs if pairs is not None else np.arange(1, 1 + first.ids.size * factor.ids.size)
            both = make_factor([*first.dims, *factor.dims], told.reshape(first.ids.size, -1))
            crossed = None if both is None else reshape_factor(both, label.shape, shape, blocks)
            if both is not None and crossed is not None:
                kept.append(crossed)
                came.append(both)
                if pairs is None:
                    unknown.append(crossed)
        elif met:
            c.freeze(factor.ids, "is merged with another unit's dimension")
        else:
            kept.append(made)
            came.append(factor)
    uniform = [
        dim
        for old, new in blocks
        if all(d in label.uniform or label.shape[d] == 1 for d in old) and any(d in label.uniform for d in old)
        for dim in new
    ]
    known = [factor for factor in kept if all(factor is not other for other in unknown)]
    return set_factors(label, shape, known, uniform)


def _can_cross(c: Coupling, first: Factor, second: Factor) -> bool:
    """Whether all positions of two dimensions are parameters' units, and no unit is in both.

    A dimension of what the model makes as it runs has units in the dense run only.
    """
    a, b = first.ids, second.ids
    return a.ndim == b.ndim == 1 and 0 < int(a.min()) <= int(a.max()) < int(b.min()) and not c.made(b)


def renamed(label: Label, shape: Sequence[int], to: Callable[[int], int]) -> Label:
    """A label whose dimensions were renamed, as a permutation or an inserted dimension does."""
    return set_factors(label, shape, map_dims(label.factors, to), [to(dim) for dim in label.uniform])


def leave_out(c: Coupling, label: Label, gone: Sequence[int], shape: Sequence[int], reason: str) -> Label:
    """Leave dimensions out of a label."""
    left = [dim for dim in range(len(label.shape)) if dim not in gone]
    factors: list[Factor | None] = []
    for factor in label.factors:
        axes = [k for k, dim in enumerate(factor.dims) if dim in gone]
        ids = c.collapse(factor.ids, axes, reason)
        if ids is not None:
            factors.append(make_factor([left.index(d) for d in factor.dims if d not in gone], ids))
    return set_factors(label, shape, factors, [left.index(d) for d in label.uniform if d in left])


@rule(
    "view",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "_reshape_copy",
    "view_copy",
    "flatten",
    "unflatten",
    sizes=True,
)
def view(c: Coupling, call: Call) -> Label:
    """Any reshape."""
    label = call.label("self")
    if call.get("dtype") is not None and call.shape != label.shape:
        # Read as another type, a row of elements becomes a longer or shorter one.
        last = len(label.shape) - 1
        return set_factors(
            leave_out(c, label, [last], label.shape[:-1], _OTHER_TYPE), call.shape, _besides(label, last)
        )
    return reshaped(c, label, call.shape)


_OTHER_TYPE = "is read as numbers of another size"


def _besides(label: Label, dim: int) -> list[Factor]:
    return [factor for factor in label.factors if dim not in factor.dims]


@rule("unsqueeze", "unsqueeze_copy")
def unsqueeze(c: Coupling, call: Call) -> Label:
    """A new dimension of size 1."""
    label = call.label("self")
    at = int(call["dim"]) % (len(label.shape) + 1)
    return renamed(label, call.shape, lambda dim: dim + (dim >= at))


@rule("squeeze", "squeeze_copy")
def squeeze(c: Coupling, call: Call) -> Label:
    """Dimensions of size 1 go; a unit that is alone along one is frozen.

    Without a dimension given, one with a single unit left would go too: then one more unit stays, always.
    """
    label = call.label("self")
    if "dim" not in call.values:
        for factor in label.factors:
            stays = factor.ids[:1] if factor.ids.ndim == 1 else factor.ids
            c.freeze(stays, "must stay: squeeze() without a dimension would drop a dimension of one unit")
    gone = [dim for dim in call.dims() if label.shape[dim] == 1]
    return leave_out(c, label, gone, call.shape, "is the only unit of a dimension that is squeezed")


@rule("permute", "permute_copy")
def permute(c: Coupling, call: Call) -> Label:
    """Dimensions in another order."""
    label = call.label("self")
    order = [int(dim) % len(label.shape) for dim in call["dims"]]
    return renamed(label, call.shape, order.index)


@rule("t", "t_copy", "numpy_T", "mT", "adjoint")
def t(c: Coupling, call: Call) -> Label:
    """The last two dimensions swapped; fewer than two stay."""
    label = call.label("self")
    n = len(label.shape)
    if n < 2:
        return label
    swap = {n - 1: n - 2, n - 2: n - 1}
    return renamed(label, call.shape, lambda dim: swap.get(dim, dim))


@rule("transpose", "transpose_copy")
def transpose(c: Coupling, call: Call) -> Label:
    """Two dimensions swapped."""
    label = call.label("self")
    if not label.shape:
        return label
    a, b = call.dim("dim0"), call.dim("dim1")
    swap = {a: b, b: a}
    return renamed(label, call.shape, lambda dim: swap.get(dim, dim))


@rule("expand", "expand_copy", "broadcast_to", sizes=True)
def expand(c: Coupling, call: Call) -> Label:
    """Dimensions of size 1 repeated, new ones in front: nothing changes along them."""
    label = call.label("self")
    factors = meet(c, [label], call.shape)
    return set_factors(label, call.shape, factors, uniform_together([label], call.shape))


@rule("diagonal", "diagonal_copy")
def diagonal(c: Coupling, call: Call) -> Label:
    """The diagonal of two dimensions, as the last one: positions of both are tied to each other, so neither is cut."""
    label = call.label("self")
    gone = [call.dim("dim1"), call.dim("dim2")]
    return leave_out(c, label, gone, call.shape, "is paired with another dimension (diagonal)")


@rule("diag_embed")
def diag_embed(c: Coupling, call: Call) -> Label:
    """The last dimension on the diagonal of two new ones."""
    label = call.label("self")
    n, last = len(call.shape), len(label.shape) - 1
    new = {int(call["dim1"]) % n, int(call["dim2"]) % n}
    label = leave_out(c, label, [last], label.shape[:-1], "is paired with another dimension (diag_embed)")
    left = [dim for dim in range(n) if dim not in new]
    return renamed(label, call.shape, lambda dim: left[dim])


@rule("unfold", "unfold_copy", sizes=True)
def windows(c: Coupling, call: Call) -> Label:
    """Overlapping windows of one dimension, along a new last one: the others pass."""
    label = call.label("self")
    if not label.shape:
        return Label(call.shape)
    dim = call.dim("dimension")
    rest = leave_out(c, label, [dim], [s for d, s in enumerate(label.shape) if d != dim], "is cut into windows")
    return renamed(rest, call.shape, lambda d: d + (d >= dim))


@rule("as_strided", "as_strided_copy", sizes=True)
def as_strided(c: Coupling, call: Call) -> Label:
    """Arbitrary strides: only the tensor as it is passes."""
    label, tensor = call.label("self"), call["self"]
    same = tuple(call.shape) == label.shape and isinstance(tensor, torch.Tensor)
    if same and tuple(call["stride"]) == tuple(tensor.stride()) and not call.get("storage_offset"):
        return label
    freeze_all(c, [label], "is read through arbitrary strides")
    return Label(call.shape)


@rule("view_as_real", "view_as_real_copy")
def view_as_real(c: Coupling, call: Call) -> Label:
    """Complex numbers as pairs, along a new last dimension."""
    return renamed(call.label("self"), call.shape, lambda dim: dim)


@rule("view_as_complex", "view_as_complex_copy")
def view_as_complex(c: Coupling, call: Call) -> Label:
    """Pairs along the last dimension as complex numbers."""
    label = call.label("self")
    last = len(label.shape) - 1
    return leave_out(c, label, [last], call.shape, "is one half of a complex number")
