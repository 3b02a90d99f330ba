"""Operators that only move elements: the same movement, applied to the ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Factor, Label, make_factor, map_dims, matching_blocks, reshape_factor
from secateur.structure.rules.pointwise import meet
from secateur.structure.rules.registry import Call, rule, set_factors

__all__ = ["reshaped", "without_overlap"]


def without_overlap(c: Coupling, factors: Sequence[Factor | None], reason: str) -> list[Factor]:
    """Keep factors with dimensions of their own; of two that came to share one, freeze the smaller."""
    kept: list[Factor] = []
    for factor in sorted((f for f in factors if f is not None), key=lambda f: -len(np.unique(f.ids))):
        if any(set(factor.dims) & set(other.dims) for other in kept):
            c.freeze(factor.ids, reason)
        else:
            kept.append(factor)
    return kept


def reshaped(c: Coupling, label: Label, shape: Sequence[int]) -> Label:
    """A label after ``reshape(shape)``."""
    shape = tuple(shape)
    if shape == label.shape:
        return label
    if 0 in shape or 0 in label.shape:
        for factor in label.factors:
            c.freeze(factor.ids, "is reshaped in a tensor without elements")
        return set_factors(label, shape, [])
    blocks = matching_blocks(label.shape, shape)
    factors = [reshape_factor(factor, label.shape, shape, blocks) for factor in label.factors]
    return set_factors(label, shape, without_overlap(c, factors, "is merged with another unit's dimension"))


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
    if call.func._schema.overload_name == "dtype":
        return call.label("self")
    return reshaped(c, call.label("self"), call.shape)


@rule("unsqueeze")
def unsqueeze(c: Coupling, call: Call) -> Label:
    """A new dimension of size 1."""
    label = call.label("self")
    at = int(call["dim"]) % (len(label.shape) + 1)
    return set_factors(label, call.shape, map_dims(label.factors, lambda dim: dim + (dim >= at)))


@rule("squeeze")
def squeeze(c: Coupling, call: Call) -> Label:
    """Dimensions of size 1 go; a unit that is alone along one is frozen."""
    label = call.label("self")
    gone = [dim for dim in call.dims() if label.shape[dim] == 1]
    return _without(c, label, gone, call.shape, "is the only unit of a dimension that is squeezed")


def _without(c: Coupling, label: Label, gone: Sequence[int], shape: Sequence[int], reason: str) -> Label:
    """Leave dimensions out of a label."""
    left = [dim for dim in range(len(label.shape)) if dim not in gone]
    factors: list[Factor | None] = []
    for factor in label.factors:
        axes = [k for k, dim in enumerate(factor.dims) if dim in gone]
        ids = c.collapse(factor.ids, axes, reason)
        if ids is not None:
            factors.append(make_factor([left.index(d) for d in factor.dims if d not in gone], ids))
    return set_factors(label, shape, factors)


@rule("permute")
def permute(c: Coupling, call: Call) -> Label:
    """Dimensions in another order."""
    label = call.label("self")
    order = [int(dim) % len(label.shape) for dim in call["dims"]]
    return set_factors(label, call.shape, map_dims(label.factors, order.index))


@rule("t", "numpy_T", "mT", "adjoint")
def t(c: Coupling, call: Call) -> Label:
    """The last two dimensions swapped; fewer than two stay."""
    label = call.label("self")
    n = len(label.shape)
    if n < 2:
        return label
    swap = {n - 1: n - 2, n - 2: n - 1}
    return set_factors(label, call.shape, map_dims(label.factors, lambda dim: swap.get(dim, dim)))


@rule("transpose")
def transpose(c: Coupling, call: Call) -> Label:
    """Two dimensions swapped."""
    label = call.label("self")
    if not label.shape:
        return label
    a, b = call.dim("dim0"), call.dim("dim1")
    swap = {a: b, b: a}
    return set_factors(label, call.shape, map_dims(label.factors, lambda dim: swap.get(dim, dim)))


@rule("expand", "broadcast_to", sizes=True)
def expand(c: Coupling, call: Call) -> Label:
    """Dimensions of size 1 repeated, new ones in front."""
    label = call.label("self")
    return set_factors(label, call.shape, meet(c, [label], call.shape))


@rule("repeat", sizes=True)
def repeat(c: Coupling, call: Call) -> Label:
    """Tiles: the ids, tiled. A unit then has several places along the dimension."""
    label = call.label("self")
    shape = call.shape
    extra = len(shape) - len(label.shape)
    times = list(call["repeats"])
    factors: list[Factor | None] = []
    for factor in label.factors:
        reps = [times[dim + extra] for dim in factor.dims]
        factors.append(make_factor([dim + extra for dim in factor.dims], np.tile(factor.ids, reps)))
    return set_factors(label, shape, factors)


@rule("repeat_interleave", sizes=True)
def repeat_interleave(c: Coupling, call: Call) -> Label:
    """Each slice several times in a row (a fixed number of times)."""
    label = call.label("self")
    if call.get("dim") is None or not isinstance(call.get("repeats"), int):
        for factor in label.factors:
            c.freeze(factor.ids, "is repeated a number of times that depends on data")
        return Label(call.shape)
    dim, times = call.dim(), int(call["repeats"])
    factors = [
        make_factor(f.dims, np.repeat(f.ids, times, axis=f.dims.index(dim)) if dim in f.dims else f.ids)
        for f in label.factors
    ]
    return set_factors(label, call.shape, factors)


@rule("cat", "concatenate", "concat")
def cat(c: Coupling, call: Call) -> Label:
    """One after another along a dimension; along all others operands meet element by element."""
    labels = [label for label in call.labels("tensors") if len(label.shape) == len(call.shape)]
    shape = call.shape
    dim = int(call["dim"]) % len(shape)
    others: list[Label] = []
    along: list[np.ndarray] = []
    for label in labels:
        factor = label.factor_at(dim)
        if factor is not None and len(factor.dims) > 1:
            axis = factor.dims.index(dim)
            ids = c.collapse(factor.ids, [axis], "is concatenated along a dimension merged with another")
            rest = None if ids is None else make_factor([d for d in factor.dims if d != dim], ids)
            label = set_factors(label, label.shape, [*(f for f in label.factors if f is not factor), rest])
        along.append(label.ids_along(dim))
        lined_up = [1 if d == dim else size for d, size in enumerate(label.shape)]
        others.append(
            Label(tuple(lined_up), tuple(f for f in label.factors if dim not in f.dims), neutral=label.neutral)
        )
    flat = [1 if d == dim else size for d, size in enumerate(shape)]
    factors = [*meet(c, others, flat), make_factor([dim], np.concatenate(along))]
    return Label(
        shape,
        tuple(f for f in factors if f is not None),
        neutral=all(label.neutral for label in labels) and len(labels) == 1,
        weight=all(label.weight for label in labels),
    )


@rule("stack")
def stack(c: Coupling, call: Call) -> Label:
    """Operands meet element by element; the new dimension is fixed."""
    labels = call.labels("tensors")
    at = int(call["dim"]) % len(call.shape)
    factors = meet(c, labels, labels[0].shape)
    return Label(
        call.shape,
        map_dims(factors, lambda dim: dim + (dim >= at)),
        weight=all(label.weight for label in labels),
    )


@rule("select", "select_copy", sizes=True)
def select(c: Coupling, call: Call) -> Label:
    """One position of a dimension. Along a unit's dimension that is a choice by position: it blocks that cut."""
    label = call.label("self")
    dim, position = call.dim(), int(call["index"])
    factors: list[Factor | None] = []
    for factor in label.factors:
        down = [d - (d > dim) for d in factor.dims if d != dim]
        if dim not in factor.dims:
            factors.append(make_factor(down, factor.ids))
            continue
        axis = factor.dims.index(dim)
        if factor.ids.ndim == 1:
            c.freeze(factor.ids, "is selected by its position")
        else:
            c.rectangle(factor.ids, [axis])
            factors.append(make_factor(down, factor.ids.take(position, axis=axis)))
    return set_factors(label, call.shape, factors)


@rule("unbind", "unbind_copy")
def unbind(c: Coupling, call: Call) -> list[Label]:
    """Every position of a dimension on its own."""
    label = call.label("self")
    dim = call.dim()
    outputs: list[Label] = []
    for position, out in enumerate(call.out):
        factors: list[Factor | None] = []
        for factor in label.factors:
            down = [d - (d > dim) for d in factor.dims if d != dim]
            if dim not in factor.dims:
                factors.append(make_factor(down, factor.ids))
            elif factor.ids.ndim == 1:
                c.freeze(factor.ids, "is taken apart by position")
            else:
                axis = factor.dims.index(dim)
                c.rectangle(factor.ids, [axis])
                factors.append(make_factor(down, factor.ids.take(position, axis=axis)))
        outputs.append(set_factors(label, out.shape, factors))
    return outputs


@rule("slice", "slice_copy", "narrow", sizes=True)
def slice_(c: Coupling, call: Call) -> Label:
    """A range of a dimension. The whole range passes; a part of a unit's dimension blocks that cut."""
    label = call.label("self")
    dim = call.dim()
    size = label.shape[dim] if label.shape else 0
    start, end, step = call.get("start"), call.get("end"), call.get("step", 1)
    start = 0 if start is None else min(max(start + size if start < 0 else start, 0), size)
    end = size if end is None else min(max(end + size if end < 0 else end, 0), size)
    if "length" in call.values:
        end = start + int(call["length"])
    if (start, end, step) == (0, size, 1):
        return label
    return _part(c, label, dim, slice(start, end, step), call.shape)


def _part(c: Coupling, label: Label, dim: int, part: slice, shape: Sequence[int]) -> Label:
    factors: list[Factor | None] = []
    for factor in label.factors:
        if dim not in factor.dims:
            factors.append(factor)
            continue
        axis = factor.dims.index(dim)
        ids = c.collapse(factor.ids, [axis], "is cut into parts by position")
        if ids is not None:
            factors.append(make_factor([d for d in factor.dims if d != dim], ids))
    return set_factors(label, shape, factors)


@rule(
    "split",
    "split_with_sizes",
    "chunk",
    "tensor_split",
    "unsafe_split",
    "unsafe_chunk",
    "split_copy",
    "split_with_sizes_copy",
    sizes=True,
)
def split(c: Coupling, call: Call) -> list[Label]:
    """Parts of a dimension. Equal parts tie equal positions, so that the same split still fits; uneven ones freeze."""
    label = call.label("self")
    dim = call.dim()
    sizes = [int(out.shape[dim]) for out in call.out]
    factor = label.factor_at(dim)
    if factor is None or len(sizes) == 1:
        return [set_factors(label, out.shape, label.factors) for out in call.out]
    others = [f for f in label.factors if f is not factor]
    axis = factor.dims.index(dim)
    if len(set(sizes)) > 1:
        return [_part(c, label, dim, slice(0, 0), out.shape) for out in call.out]
    if factor.ids.ndim == 1:
        parts = factor.ids.reshape(len(sizes), sizes[0])
        c.collapse(parts, [0], "is cut into parts by position")
        return [
            set_factors(label, out.shape, [*others, make_factor([dim], parts[k])]) for k, out in enumerate(call.out)
        ]
    cut = np.split(factor.ids, len(sizes), axis=axis)
    for part in cut[1:]:
        c.tie(cut[0], part)
    return [
        set_factors(label, out.shape, [*others, make_factor(factor.dims, cut[k])]) for k, out in enumerate(call.out)
    ]


@rule(
    "constant_pad_nd",
    "pad",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
    "_pad_circular",
)
def pad(c: Coupling, call: Call) -> Label:
    """Padding; along a unit's dimension the padded places are fixed ones of constant value."""
    label = call.label("self")
    amounts = list(call.get("pad", call.get("padding")))
    shape = call.shape
    factors: list[Factor | None] = []
    n = len(label.shape)
    for factor in label.factors:
        widths = []
        for dim in factor.dims:
            at = 2 * (n - 1 - dim)
            widths.append((amounts[at], amounts[at + 1]) if at < len(amounts) else (0, 0))
        if not any(before or after for before, after in widths):
            factors.append(factor)
        elif call.name == "constant_pad_nd" and factor.ids.ndim == 1 and min(widths[0]) >= 0:
            factors.append(make_factor(factor.dims, np.pad(factor.ids, widths)))
        else:
            c.freeze(factor.ids, "is padded along its own dimension")
    return set_factors(Label(label.shape, label.factors), shape, factors)


@rule("roll", "flip", "rot90", sizes=True)
def roll(c: Coupling, call: Call) -> Label:
    """A shift or reversal. Along a unit's dimension it moves positions: reversal passes, a shift blocks the cut."""
    label = call.label("self")
    dims = call.dims("dims")
    factors: list[Factor | None] = []
    for factor in label.factors:
        axes = [k for k, dim in enumerate(factor.dims) if dim in dims]
        if call.name == "flip":
            factors.append(make_factor(factor.dims, np.flip(factor.ids, axes)) if axes else factor)
            continue
        ids = c.collapse(factor.ids, axes, "is shifted by position")
        if ids is not None:
            factors.append(make_factor([d for d in factor.dims if d not in dims], ids))
    return set_factors(label, call.shape, factors)


@rule("unfold", "as_strided", sizes=True)
def windows(c: Coupling, call: Call) -> Label:
    """Overlapping windows: dimensions that keep their stride and size pass, the others freeze."""
    label = call.label("self")
    if call.name == "as_strided":
        same = tuple(call.shape) == label.shape and tuple(call["stride"]) == tuple(call.values["self"].stride())
        if same and not call.get("storage_offset"):
            return label
        for factor in label.factors:
            c.freeze(factor.ids, "is read through arbitrary strides")
        return Label(call.shape)
    dim = call.dim("dimension")
    return _part(c, label, dim, slice(0, 0), call.shape)
