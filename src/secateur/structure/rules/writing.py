"""Operators that write by index: along the indexed dimension nothing is cut, along the others both sides meet.

Where an index is the same everywhere, it writes to one place as often as it is long: what is added up there holds a
size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Label, map_dims
from secateur.structure.rules.indexing import BY_INDEX, Places, as_index
from secateur.structure.rules.pointwise import meet, uniform_together
from secateur.structure.rules.reduction import given_up
from secateur.structure.rules.registry import Call, rule, set_factors

__all__: list[str] = []


def _written(c: Coupling, target: Label, sources: Sequence[Label], dims: Sequence[int]) -> Label:
    """A tensor after a write along ``dims`` of sources that have its dimensions.

    Where a source is shorter along another dimension, the first positions of that one are chosen.
    """
    n = len(target.shape)
    chosen = {*dims, *(d for source in sources for d in range(n) if source.shape[d] != target.shape[d])}
    lined_up = tuple(1 if d in chosen else size for d, size in enumerate(target.shape))
    sides = [given_up(c, side, chosen, BY_INDEX) for side in (target, *sources)]
    sides = [Label(lined_up, side.factors, side.uniform) for side in sides]
    return Label(target.shape, meet(c, sides, lined_up), uniform_together(sides, lined_up) - chosen)


@rule("index_put", "_index_put_impl", "_unsafe_index_put", sizes=True)
def index_put(c: Coupling, call: Call) -> Label:
    """``self[i, :, j] = values``: values are laid out as ``self[i, :, j]``, or broadcast to it."""
    target, values = call.label("self"), call.label("values")
    indices: list[torch.Tensor | None] = list(call["indices"])
    if (mask := _mask_of(target, values, indices)) is not None:
        (where,) = call.labels_of([mask])
        weight = target.weight and values.zero and not where.data and not call.get("accumulate")
        if target.weight and not weight:
            for factor in target.factors:
                c.carry(factor.ids)
        sides = [target, where]
        return Label(target.shape, meet(c, sides, target.shape), uniform_together(sides, target.shape), weight=weight)
    places_by = call.labels_of([i for i in indices if i is not None])
    as_index(c, places_by)
    for label in places_by:
        call.counts_equal(label)
    places = Places.of(indices)
    rest = {places.in_result(dim): dim for dim in range(len(target.shape)) if dim not in places.indexed}
    n = len(rest) + places.inserted
    # Broadcast to the shape of ``self[i, :, j]``; what the indices' own dimensions hold is no unit's.
    shape = [target.shape[rest[dim]] if dim in rest else 0 for dim in range(n)]
    for dim, size in enumerate(values.shape):
        place = dim + n - len(values.shape)
        shape[place] = shape[place] or size
    shape = [size or 1 for size in shape]
    factors = meet(c, [values], shape)
    spread = Label(tuple(shape), factors, uniform_together([values], shape))
    spread = given_up(c, spread, [dim for dim in range(n) if dim not in rest], BY_INDEX)
    source = set_factors(
        Label(()),
        [1 if dim in places.indexed else size for dim, size in enumerate(target.shape)],
        map_dims(spread.factors, rest.__getitem__),
        [rest[dim] for dim in spread.uniform if dim in rest],
    )
    return _written(c, target, [source], places.indexed)


def _mask_of(target: Label, values: Label, indices: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """The mask of ``self[mask] = 0``, which is as large as ``self``: that is done element by element."""
    if len(indices) != 1 or (mask := indices[0]) is None or mask.dtype not in (torch.bool, torch.uint8):
        return None
    return mask if tuple(mask.shape) == target.shape and math.prod(values.shape) == 1 else None


@rule("scatter", "scatter_add", "scatter_reduce", sizes=True)
def scatter(c: Coupling, call: Call) -> Label:
    """Elements of one dimension are written by an index as large as the source."""
    target, dim = call.label("self"), call.dim()
    call.counts_equal(call.label("index"), [dim])
    sources = [call.label(key) for key in ("index", "src") if call.has(key)]
    if not target.shape:
        return Label(call.shape)
    return _written(c, target, sources, [dim])


@rule("index_add", "index_copy", "index_reduce", "index_fill", sizes=True)
def index_add(c: Coupling, call: Call) -> Label:
    """Slices of one dimension are written by a list of positions."""
    target = call.label("self")
    as_index(c, [call.label("index")])
    call.counts_equal(call.label("index"))
    if not target.shape:
        return Label(call.shape)
    sources = [call.label("source")] if call.has("source") else []
    return _written(c, target, sources, [call.dim()])


@rule("select_scatter", sizes=True)
def select_scatter(c: Coupling, call: Call) -> Label:
    """One position of a dimension is written."""
    target, source, dim = call.label("self"), call.label("src"), call.dim()
    shape = (*source.shape[:dim], 1, *source.shape[dim:])
    uniform = [d + (d >= dim) for d in source.uniform]
    widened = set_factors(source, shape, map_dims(source.factors, lambda d: d + (d >= dim)), uniform)
    return _written(c, target, [widened], [dim])


@rule("slice_scatter", sizes=True)
def slice_scatter(c: Coupling, call: Call) -> Label:
    """A range of a dimension is written; where it is the whole of it, source and target meet there as well."""
    target, source, dim = call.label("self"), call.label("src"), call.dim()
    if source.shape == target.shape:
        return Label(target.shape, meet(c, [target, source], target.shape))
    return _written(c, target, [source], [dim])


@rule("masked_scatter")
def masked_scatter(c: Coupling, call: Call) -> Label:
    """Elements of the source, one after another, go where a mask is set: no dimension of either can be cut."""
    for label in call.all_labels():
        given_up(c, label, range(len(label.shape)), BY_INDEX)
    return Label(call.shape)
