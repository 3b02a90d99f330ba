"""Operators that sum over a dimension of two operands: here units are consumed, and MACs arise.

Index conventions: a contraction ``out[b.., m.., n..] = sum_k left[b.., m.., k] right[b.., k, n..]``. Where
one side is a weight, its slices along ``k`` consume the units that the other side carries along ``k``:
zero the slice and the unit has no influence. Where neither is, no cut along ``k`` is possible.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Factor, Ids, Label, map_dims
from secateur.structure.rules.pointwise import meet
from secateur.structure.rules.reduction import given_up
from secateur.structure.rules.registry import Call, Uncovered, rule, set_factors

__all__ = ["TWO_ACTIVATIONS", "carry_rest", "contract", "count_macs"]

TWO_ACTIVATIONS = "is contracted in a product of two activations, where no weight can be zeroed"
_READS_FIXED = "reads a dimension that cannot be cut (the model's input, or something frozen)"


def contract(c: Coupling, call: Call, left: Label, left_dim: int, right: Label, right_dim: int) -> tuple[Label, Label]:
    """Tie, consume or freeze the contracted dimension; give both labels without it (their shapes unchanged)."""
    a, b = left.factor_at(left_dim), right.factor_at(right_dim)
    weight_is_right = right.weight or not left.weight
    weight, w = (right, b) if weight_is_right else (left, a)
    activation, x, at = (left, a, left_dim) if weight_is_right else (right, b, right_dim)
    if not weight.weight or (w is not None and len(w.dims) > 1):
        if left_dim in left.uniform and right_dim in right.uniform:
            call.counts(left.shape[left_dim])
        return given_up(c, left, [left_dim], TWO_ACTIVATIONS), given_up(c, right, [right_dim], TWO_ACTIVATIONS)
    if w is not None:
        if x is not None:
            along = np.moveaxis(x.ids, x.dims.index(at), -1)
            c.tie(along, w.ids, _READS_FIXED)
            c.width(w.ids)
            if activation.weight:
                c.carry(x.ids)
        elif at not in activation.uniform:
            c.freeze(w.ids, _READS_FIXED)
        c.consume(w.ids, vanishes=activation.vanishes)
    elif x is not None:
        c.freeze(x.ids, "is consumed by a weight whose slices cannot be cut")
    return _without(left, a, left_dim), _without(right, b, right_dim)


def _without(label: Label, gone: Factor | None, dim: int) -> Label:
    return set_factors(label, label.shape, [f for f in label.factors if f is not gone], label.uniform - {dim})


def count_macs(c: Coupling, *sides: tuple[Label, Sequence[int]], times: float = 1.0) -> None:
    """Count ``times * prod(sizes)`` over the given dimensions of some labels, units as cost axes."""
    coefficient = times
    axes: list[Ids] = []
    for label, dims in sides:
        seen: set[int] = set()
        for factor in label.factors:
            if all(dim in dims for dim in factor.dims):
                axes.append(factor.ids.ravel())
                seen.update(factor.dims)
        for dim in dims:
            if dim not in seen:
                coefficient *= label.shape[dim]
    c.product(coefficient, axes)


def carry_rest(c: Coupling, label: Label) -> None:
    """Say that what is left of a weight carries its units onward."""
    if label.weight:
        for factor in label.factors:
            c.carry(factor.ids)


def _matrix_product(c: Coupling, call: Call, left: Label, right: Label, shape: Sequence[int]) -> Label:
    """``(B.., m, k) @ (B.., k, n)`` with the same number of dimensions on both sides."""
    n = len(shape)
    if left.factor_at(n - 1) is None:
        # The weight may have units along the sum where the other side has none, as a first state of zeros.
        count_macs(c, (left, range(n - 1)), (right, [n - 2, n - 1]))
    else:
        count_macs(c, (left, range(n)), (right, [n - 1]))
    if not left.weight and not right.weight:
        for factor in left.factors:
            if max(factor.dims) < n - 2:
                c.batch(factor.ids)
    rest_left, rest_right = contract(c, call, left, n - 1, right, n - 2)
    carry_rest(c, rest_left)
    carry_rest(c, rest_right)
    for rest, dim in ((rest_left, n - 2), (rest_right, n - 1)):
        if rest.weight and (made := rest.factor_at(dim)) is not None:
            c.width(made.ids)
    narrow_left = Label((*left.shape[:-1], 1), rest_left.factors, rest_left.uniform)
    narrow_right = Label((*right.shape[:-2], 1, right.shape[-1]), rest_right.factors, rest_right.uniform)
    factors = meet(c, [narrow_left, narrow_right], shape, coarse=True)
    vanishes = all(side.vanishes or not rest.factors for side, rest in ((left, rest_left), (right, rest_right)))
    return Label(tuple(shape), factors, weight=left.weight and right.weight, vanishes=vanishes)


@rule("mm")
def mm(c: Coupling, call: Call) -> Label:
    """``(m, k) @ (k, n)``."""
    return _matrix_product(c, call, call.label("self"), call.label("mat2"), call.shape)


@rule("bmm")
def bmm(c: Coupling, call: Call) -> Label:
    """``(b, m, k) @ (b, k, n)``; the batch dimension meets element by element."""
    return _matrix_product(c, call, call.label("self"), call.label("mat2"), call.shape)


@rule("addmm")
def addmm(c: Coupling, call: Call) -> Label:
    """A matrix product plus a bias."""
    return _plus(c, call, _matrix_product(c, call, call.label("mat1"), call.label("mat2"), call.shape))


@rule("baddbmm")
def baddbmm(c: Coupling, call: Call) -> Label:
    """A batched matrix product plus an addend."""
    return _plus(c, call, _matrix_product(c, call, call.label("batch1"), call.label("batch2"), call.shape))


def _plus(c: Coupling, call: Call, product: Label) -> Label:
    addend = call.label("self")
    absent = call.get("beta", 1) == 0
    carry_rest(c, addend)
    vanishes = product.vanishes and (addend.vanishes or absent)
    return Label(product.shape, meet(c, [product, addend], product.shape), vanishes=vanishes)


@rule("mv")
def mv(c: Coupling, call: Call) -> Label:
    """``(m, k) @ (k,)``."""
    left, right = call.label("self"), call.label("vec")
    count_macs(c, (left, range(2)))
    rest, _ = contract(c, call, left, 1, right, 0)
    carry_rest(c, rest)
    return set_factors(Label(call.shape), call.shape, [f for f in rest.factors if f.dims == (0,)])


@rule("dot", "vdot")
def dot(c: Coupling, call: Call) -> Label:
    """``(k,) @ (k,)``."""
    left, right = call.label("self"), call.label("tensor" if call.has("tensor") else "other")
    count_macs(c, (left, [0]))
    contract(c, call, left, 0, right, 0)
    return Label(call.shape)


@rule("_trilinear", sizes=True)
def bilinear(c: Coupling, call: Call) -> Label:
    """``nn.Bilinear``, ``out[b, o] = sum_ij x[b, i] weight[o, i, j] y[b, j]``: the weight consumes both inputs."""
    x, weight, y = call.label("i1"), call.label("i2"), call.label("i3")
    form = tuple(tuple(call[key]) for key in ("expand1", "expand2", "expand3", "sumdim"))
    shapes_fit = len(x.shape) == len(y.shape) == 2 and len(weight.shape) == 3
    if form != ((1, 3), (0,), (1, 2), (2, 3)) or not shapes_fit or not weight.weight:
        for label in (x, weight, y):
            given_up(c, label, range(len(label.shape)), "is contracted with two other tensors (bilinear)")
        return Label(call.shape)
    count_macs(c, (weight, [0, 1, 2]), times=float(x.shape[0]))
    left, rest = contract(c, call, x, 1, weight, 1)
    right, rest = contract(c, call, y, 1, rest, 2)
    carry_rest(c, rest)
    rows = [Label((x.shape[0], 1), side.factors, side.uniform) for side in (left, right)]
    columns = Label((1, weight.shape[0]), tuple(Factor((1,), f.ids) for f in rest.factors if f.dims == (0,)))
    return Label(call.shape, meet(c, [*rows, columns], call.shape))


@rule("_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_mm(c: Coupling, call: Call) -> Label:
    """``(m, k) @ (g, k, n)``, each row with the matrix of its group (experts): as a product with each of them.

    Other forms, where the rows of a group are a sum or a result of their own, are not covered.
    """
    left, right = (call.label(name) for name in list(call.values)[:2])
    if len(left.shape) != 2 or len(right.shape) != 3:
        raise Uncovered
    right = given_up(c, right, [0], "is chosen by data (experts)")
    one = set_factors(
        Label(right.shape[1:], weight=right.weight, vanishes=right.vanishes),
        right.shape[1:],
        map_dims([factor for factor in right.factors if 0 not in factor.dims], lambda dim: dim - 1),
    )
    return _matrix_product(c, call, left, one, call.shape)
