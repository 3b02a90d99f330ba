"""Operators that read by index: the indexed dimension is chosen by position or data, the others pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Label, make_factor, map_dims
from secateur.structure.rules.pointwise import meet
from secateur.structure.rules.reduction import given_up
from secateur.structure.rules.registry import Call, freeze_all, rule, set_factors

__all__ = ["BY_INDEX", "Places", "as_index"]

BY_INDEX = "is indexed by position or data"


def as_index(c: Coupling, labels: Sequence[Label]) -> None:
    """Freeze what is used as an index: its values are positions of something else."""
    freeze_all(c, labels, "is used as an index")


@dataclass(frozen=True)
class Places:
    """Where dimensions lie in ``x[i, :, j]``.

    Args:
        indexed: dimensions of ``x`` that indices replace.
        start: where the indices' own dimensions begin in the result.
        inserted: how many they are.
    """

    indexed: tuple[int, ...]
    start: int
    inserted: int

    @classmethod
    def of(cls, indices: Sequence[torch.Tensor | None]) -> Places:
        """Of the indices of an ``index`` or ``index_put`` operator."""
        indexed: list[int] = []
        shapes: list[tuple[int, ...]] = []
        dim = 0
        for item in indices:
            is_mask = item is not None and item.dtype in (torch.bool, torch.uint8)
            width = item.ndim if item is not None and is_mask else 1
            if item is not None:
                indexed.extend(range(dim, dim + width))
                shapes.append((1,) if is_mask else tuple(item.shape))
            dim += width
        inserted = max((len(shape) for shape in shapes), default=0)
        # Neighbours are replaced where they are; indices with a gap between them go to the front.
        together = not indexed or indexed == list(range(indexed[0], indexed[-1] + 1))
        return cls(tuple(indexed), indexed[0] if together and indexed else 0, inserted)

    def in_result(self, dim: int) -> int:
        """Where a dimension of ``x`` that is not indexed lies in the result."""
        rank = dim - sum(d < dim for d in self.indexed)
        return rank if rank < self.start else rank + self.inserted


@rule("index", "_unsafe_index", sizes=True)
def index(c: Coupling, call: Call) -> Label:
    """``self[i, :, j]``: indexed dimensions are replaced by those of the broadcast indices."""
    indices: list[torch.Tensor | None] = list(call["indices"])
    as_index(c, call.labels_of([i for i in indices if i is not None]))
    places = Places.of(indices)
    label = given_up(c, call.label("self"), places.indexed, BY_INDEX)
    label = set_factors(label, call.shape, map_dims(label.factors, places.in_result))
    return Label(label.shape, label.factors, weight=label.weight, vanishes=label.vanishes)


@rule("index_select", sizes=True)
def index_select(c: Coupling, call: Call) -> Label:
    """Slices of one dimension by index."""
    label = given_up(c, call.label("self"), [call.dim()], BY_INDEX)
    as_index(c, [call.label("index")])
    return set_factors(label, call.shape, label.factors, label.uniform)


@rule("gather", "take_along_dim", sizes=True)
def gather(c: Coupling, call: Call) -> Label:
    """Elements of one dimension by index; along the others source and index meet."""
    dim = call.dim()
    label = given_up(c, call.label("self"), [dim], BY_INDEX)
    picked = given_up(c, call.label("index" if call.has("index") else "indices"), [dim], BY_INDEX)
    shape = call.shape
    lined_up = tuple(1 if d == dim else size for d, size in enumerate(shape))
    short = [d for d in range(len(shape)) if d != dim and label.shape[d] != shape[d]]
    # Where the index is shorter than the source, it chooses the first positions.
    label = given_up(c, label, short, BY_INDEX)
    sides = [Label(lined_up, side.factors, side.uniform - {dim}) for side in (label, picked)]
    return Label(shape, meet(c, sides, lined_up))


@rule("embedding", sizes=True)
def embedding(c: Coupling, call: Call) -> Label:
    """Rows by index: the vocabulary is chosen by data, the width passes."""
    weight, indices = call.label("weight"), call.label("indices")
    weight = given_up(c, weight, [0], "is a vocabulary, indexed by data")
    if weight.weight:
        for factor in weight.factors:
            c.carry(factor.ids)
    as_index(c, [indices])
    n = len(indices.shape)
    label = Label(call.shape, vanishes=weight.vanishes)
    return set_factors(label, call.shape, map_dims(weight.factors, lambda dim: dim - 1 + n))


@rule("_embedding_bag", "_embedding_bag_forward_only", sizes=True)
def embedding_bag(c: Coupling, call: Call) -> list[Label]:
    """Sums of rows by index: the vocabulary is chosen by data, the width passes."""
    weight = given_up(c, call.label("weight"), [0], "is a vocabulary, indexed by data")
    for factor in weight.factors:
        c.carry(factor.ids)
    as_index(c, [call.label("indices"), call.label("offsets")])
    call.counts_equal(call.label("indices"))
    if call.has("per_sample_weights"):
        freeze_all(c, [call.label("per_sample_weights")], "weighs the samples of a bag")
    width = weight.shape[1]
    factors = [make_factor([1], f.ids) for f in weight.factors]
    return [
        set_factors(Label(tuple(out.shape)), out.shape, factors if out.ndim == 2 and out.shape[1] == width else [])
        for out in call.outputs
    ]
