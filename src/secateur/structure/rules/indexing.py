"""Operators that pick by index: the indexed dimension is chosen by position or data, the others pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Factor, Label, make_factor
from secateur.structure.rules.pointwise import meet
from secateur.structure.rules.reduction import given_up
from secateur.structure.rules.registry import Call, rule, set_factors

__all__: list[str] = []

_BY_INDEX = "is indexed by position or data"


def _freeze_indices(c: Coupling, labels: Sequence[Label]) -> None:
    for label in labels:
        for factor in label.factors:
            c.freeze(factor.ids, "is used as an index")


@rule("index", "_unsafe_index", sizes=True)
def index(c: Coupling, call: Call) -> Label:
    """``self[i, :, j]``: indexed dimensions are replaced by those of the broadcast indices."""
    label = call.label("self")
    indices: list[torch.Tensor | None] = list(call["indices"])
    _freeze_indices(c, call.labels_of([i for i in indices if i is not None]))
    indexed: list[int] = []
    dim = 0
    for item in indices:
        width = item.ndim if item is not None and item.dtype in (torch.bool, torch.uint8) else 1
        if item is not None:
            indexed.extend(range(dim, dim + width))
        dim += width
    label = given_up(c, label, indexed, _BY_INDEX)
    n, out_n = len(label.shape), len(call.shape)
    inserted = out_n - (n - len(indexed))
    together = indexed == list(range(indexed[0], indexed[-1] + 1)) if indexed else True
    start = indexed[0] if together and indexed else 0
    left = [d for d in range(n) if d not in indexed]
    place = {d: (k if k < start else k + inserted) for k, d in enumerate(left)}
    factors = [make_factor([place[d] for d in f.dims], f.ids) for f in label.factors]
    return set_factors(Label(call.shape, weight=label.weight), call.shape, factors)


@rule("index_select", "index_select_copy", sizes=True)
def index_select(c: Coupling, call: Call) -> Label:
    """Slices of one dimension by index."""
    label = given_up(c, call.label("self"), [call.dim()], _BY_INDEX)
    _freeze_indices(c, [call.label("index")])
    return set_factors(label, call.shape, label.factors)


@rule("gather", "take_along_dim", sizes=True)
def gather(c: Coupling, call: Call) -> Label:
    """Elements of one dimension by index; along the others source and index meet."""
    dim = call.dim()
    label = given_up(c, call.label("self"), [dim], _BY_INDEX)
    picked = given_up(c, call.label("index" if "index" in call.values else "indices"), [dim], _BY_INDEX)
    shape = call.shape
    lined_up = tuple(1 if d == dim else size for d, size in enumerate(shape))
    full = all(label.shape[d] == shape[d] for d in range(len(shape)) if d != dim)
    if not full:
        label = given_up(c, label, range(len(shape)), _BY_INDEX)
    source = Label(lined_up, tuple(f for f in label.factors if dim not in f.dims))
    # An index that was expanded over a unit's dimension is the same for every unit: it says nothing of them.
    follows = Label(lined_up, tuple(f for f in picked.factors if dim not in f.dims), neutral=True)
    return Label(shape, meet(c, [source, follows], lined_up))


@rule(
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "index_add",
    "index_copy",
    "index_put",
    "_index_put_impl",
    "index_fill",
    "select_scatter",
    "slice_scatter",
    "masked_scatter",
    "index_reduce",
    "_unsafe_index_put",
    sizes=True,
)
def scatter(c: Coupling, call: Call) -> Label:
    """Writes by index: along the indexed dimension nothing is cut, along the others source and target meet."""
    target = call.label("self")
    n = len(target.shape)
    if call.name in ("index_put", "_index_put_impl", "_unsafe_index_put"):
        dims = [d for d, item in enumerate(call["indices"]) if item is not None]
        _freeze_indices(c, call.labels_of([i for i in call["indices"] if i is not None]))
        source = call.label("values")
        simple = dims == [0] and call["indices"][0].ndim == 1 and len(source.shape) == n
    elif call.name == "masked_scatter":
        dims, source, simple = list(range(n)), call.label("source"), False
    else:
        dims = [call.dim()]
        key = next((k for k in ("src", "source", "value") if k in call.values), None)
        tensor = call.values[key] if key else None
        source = call.label(key) if isinstance(tensor, torch.Tensor) and key else Label((), neutral=True)
        if "index" in call.values and isinstance(call["index"], torch.Tensor):
            _freeze_indices(
                c, [given_up(c, call.label("index"), dims, _BY_INDEX)] if call.name.startswith("index") else []
            )
        simple = len(source.shape) == n and all(source.shape[d] == target.shape[d] for d in range(n) if d not in dims)
    target = given_up(c, target, dims, _BY_INDEX)
    if not source.shape or source.neutral:
        return Label(target.shape, target.factors)
    if call.name == "select_scatter":
        c_dim = dims[0]
        factors: list[Factor | None] = [make_factor([d + (d >= c_dim) for d in f.dims], f.ids) for f in source.factors]
        source = set_factors(source, target.shape, factors)
        simple = True
    if not simple:
        for factor in (*given_up(c, source, range(len(source.shape)), _BY_INDEX).factors, *target.factors):
            c.freeze(factor.ids, _BY_INDEX)
        return Label(target.shape)
    source = given_up(c, source, dims, _BY_INDEX)
    lined_up = tuple(1 if d in dims else size for d, size in enumerate(target.shape))
    pair = [Label(lined_up, s.factors, neutral=s.neutral) for s in (target, source)]
    return Label(target.shape, meet(c, pair, lined_up))


@rule("_embedding_bag", "_embedding_bag_forward_only", sizes=True)
def embedding_bag(c: Coupling, call: Call) -> list[Label]:
    """Sums of rows by index: the vocabulary is chosen by data, the width passes."""
    weight = given_up(c, call.label("weight"), [0], "is a vocabulary, indexed by data")
    for factor in weight.factors:
        c.carry(factor.ids)
    outputs = list(call.out)
    width = weight.shape[1]
    return [
        Label(tuple(out.shape), weight.factors) if out.ndim == 2 and out.shape[1] == width else Label(tuple(out.shape))
        for out in outputs
    ]


@rule("tril", "triu", sizes=True)
def triangle(c: Coupling, call: Call) -> Label:
    """The last two dimensions are masked by position."""
    label = call.label("self")
    n = len(label.shape)
    return given_up(c, Label(label.shape, label.factors), range(max(n - 2, 0), n), "is masked by position")
