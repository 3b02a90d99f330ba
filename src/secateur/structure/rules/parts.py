"""Operators that put dimensions together or take them apart: concatenation, splits, slices, single positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Factor, Ids, Label, make_factor, map_dims
from secateur.structure.rules.pointwise import meet, uniform_together
from secateur.structure.rules.registry import Call, rule, set_factors

__all__: list[str] = []

_BY_POSITION = "is cut into parts by position"

#: Slices of so many equal parts may be written with sizes of the tensor itself; the trial tells. Smaller parts are
#: positions that someone chose.
_MOST_PARTS = 4


@rule("cat", "concatenate", "concat")
def cat(c: Coupling, call: Call) -> Label:
    """One after another along a dimension; along all others operands meet element by element."""
    labels = [label for label in call.labels("tensors") if len(label.shape) == len(call.shape)]
    shape = call.shape
    dim = int(call["dim"]) % max(len(shape), 1)
    weight = bool(labels) and all(label.weight for label in labels)
    others: list[Label] = []
    along: list[Ids] = []
    for label in labels:
        rest = label
        factor = label.factor_at(dim)
        if factor is not None and len(factor.dims) > 1:
            axis = factor.dims.index(dim)
            ids = c.collapse(factor.ids, [axis], "is concatenated along a dimension merged with another")
            left = None if ids is None else make_factor([d for d in factor.dims if d != dim], ids)
            rest = set_factors(label, label.shape, [*(f for f in label.factors if f is not factor), left])
        if c.made(rest.ids_along(dim)):
            # Zeros put beside units stay as many as they are.
            c.freeze(rest.ids_along(dim), "is as many as the code says")
            along.append(np.zeros(rest.shape[dim], dtype=np.int64))
        else:
            along.append(rest.ids_along(dim))
        lined_up = tuple(1 if d == dim else size for d, size in enumerate(label.shape))
        others.append(Label(lined_up, tuple(f for f in rest.factors if dim not in f.dims), label.uniform))
    flat = [1 if d == dim else size for d, size in enumerate(shape)]
    factors = [*meet(c, others, flat, joint=weight), make_factor([dim], np.concatenate(along))]
    alone = len(labels) == 1
    return Label(
        shape,
        tuple(f for f in factors if f is not None),
        uniform=frozenset(d for d in uniform_together(others, flat) if alone or d != dim),
        weight=weight,
        vanishes=all(label.vanishes for label in labels),
    )


@rule("stack")
def stack(c: Coupling, call: Call) -> Label:
    """Operands meet element by element; the new dimension is fixed."""
    labels = call.labels("tensors")
    at = int(call["dim"]) % len(call.shape)
    weight = all(label.weight for label in labels)
    factors = meet(c, labels, labels[0].shape, joint=weight)
    return Label(
        call.shape,
        map_dims(factors, lambda dim: dim + (dim >= at)),
        uniform=frozenset(d + (d >= at) for d in uniform_together(labels, labels[0].shape)),
        weight=weight,
        vanishes=all(label.vanishes for label in labels),
    )


@rule("select", "select_copy", sizes=True)
def select(c: Coupling, call: Call) -> Label:
    """One position of a dimension. Along a unit's dimension that is a choice by position: it blocks that cut."""
    return _at_position(c, call.label("self"), call.dim(), int(call["index"]), "is selected by its position")


@rule("unbind", "unbind_copy")
def unbind(c: Coupling, call: Call) -> list[Label]:
    """Every position of a dimension on its own."""
    label, dim = call.label("self"), call.dim()
    return [_at_position(c, label, dim, k, "is taken apart by position") for k in range(len(call.outputs))]


def _at_position(c: Coupling, label: Label, dim: int, position: int, reason: str) -> Label:
    factors: list[Factor | None] = []
    for factor in label.factors:
        down = [d - (d > dim) for d in factor.dims if d != dim]
        if dim not in factor.dims:
            factors.append(make_factor(down, factor.ids))
        elif factor.ids.ndim == 1:
            c.freeze(factor.ids, reason)
        else:
            axis = factor.dims.index(dim)
            c.rectangle(factor.ids, [axis])
            factors.append(make_factor(down, np.asarray(np.take(factor.ids, position, axis=axis), dtype=np.int64)))
    shape = [size for d, size in enumerate(label.shape) if d != dim]
    return set_factors(label, shape, factors, [d - (d > dim) for d in label.uniform if d != dim])


@rule("slice", "slice_copy", "narrow", "narrow_copy", sizes=True)
def slice_(c: Coupling, call: Call) -> Label:
    """A range of a dimension.

    The whole range passes. One of a few equal parts ties equal positions of all parts, so that a range that
    is written with the tensor's own size still fits. Any other range blocks the cut.
    """
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
    width = end - start
    factor = label.factor_at(dim)
    equal = step == 1 and width > 1 and size % width == 0 and start % width == 0 and size // width <= _MOST_PARTS
    if factor is None or factor.ids.ndim > 1 or not equal:
        return _without_positions(c, label, dim, call.shape)
    parts = factor.ids.reshape(-1, width)
    c.collapse(parts, [0], _BY_POSITION)
    others = [f for f in label.factors if f is not factor]
    return set_factors(label, call.shape, [*others, make_factor([dim], parts[start // width])], label.uniform)


def _without_positions(c: Coupling, label: Label, dim: int, shape: Sequence[int]) -> Label:
    """A label after some positions of a dimension were chosen: it is not cut along that one any more."""
    factors: list[Factor | None] = []
    for factor in label.factors:
        if dim not in factor.dims:
            factors.append(factor)
            continue
        axis = factor.dims.index(dim)
        ids = c.collapse(factor.ids, [axis], _BY_POSITION)
        if ids is not None:
            factors.append(make_factor([d for d in factor.dims if d != dim], ids))
    return set_factors(label, shape, factors, label.uniform)


@rule(
    "split",
    "split_with_sizes",
    "chunk",
    "tensor_split",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "unsafe_chunk",
    "split_copy",
    "split_with_sizes_copy",
    sizes=True,
)
def split(c: Coupling, call: Call) -> list[Label]:
    """Parts of a dimension. Equal parts tie equal positions, so that the same split still fits; uneven ones freeze."""
    label = call.label("self")
    dim = call.dim()
    outputs = call.outputs
    sizes = [int(out.shape[dim]) for out in outputs]
    factor = label.factor_at(dim)
    if factor is None or len(sizes) == 1:
        return [set_factors(label, out.shape, label.factors, label.uniform) for out in outputs]
    if len(set(sizes)) > 1:
        return [_without_positions(c, label, dim, out.shape) for out in outputs]
    others = [f for f in label.factors if f is not factor]
    parts = np.split(factor.ids, len(sizes), axis=factor.dims.index(dim))
    if factor.ids.ndim == 1:
        c.collapse(np.stack(parts), [0], _BY_POSITION)
    else:
        for part in parts[1:]:
            c.tie(parts[0], part)
    return [
        set_factors(label, out.shape, [*others, make_factor(factor.dims, part)], label.uniform)
        for out, part in zip(outputs, parts, strict=True)
    ]


@rule("block_diag", "_chunk_cat")
def blocks(c: Coupling, call: Call) -> Label:
    """Operands side by side in both dimensions: no cut fits one block alone."""
    for label in call.all_labels():
        for factor in label.factors:
            c.freeze(factor.ids, "is laid out in blocks by position")
    return Label(call.shape)
