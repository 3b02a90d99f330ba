"""Operators that mix all positions of a dimension: sums, means, softmax, sorting.

Along a unit's own dimension they freeze it; along other dimensions they let it pass.
"""

from __future__ import annotations

from collections.abc import Collection

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Factor, Label, make_factor
from secateur.structure.rules.pointwise import meet
from secateur.structure.rules.registry import Call, rule, set_factors

__all__ = ["given_up"]

#: Reductions of equal values whose result depends on how many there are.
_COUNTING = frozenset({"sum", "nansum", "prod", "norm", "linalg_vector_norm", "logsumexp", "count_nonzero"})


def given_up(c: Coupling, label: Label, dims: Collection[int], reason: str, *, keep_uniform: bool = False) -> Label:
    """A label that is not cut along ``dims`` any more; its shape stays."""
    factors: list[Factor | None] = []
    for factor in label.factors:
        axes = [k for k, dim in enumerate(factor.dims) if dim in dims]
        if not axes:
            factors.append(factor)
        elif (ids := c.collapse(factor.ids, axes, reason)) is not None:
            factors.append(make_factor([d for d in factor.dims if d not in dims], ids))
    uniform = label.uniform if keep_uniform else label.uniform.difference(dims)
    return set_factors(label, label.shape, factors, uniform)


def _reduced(c: Coupling, label: Label, dims: Collection[int], shape: tuple[int, ...], reason: str) -> Label:
    """A label after a reduction over ``dims``, whether these stay with size 1 or go."""
    label = given_up(c, label, dims, reason)
    if len(shape) == len(label.shape):
        return Label(shape, label.factors, label.uniform)
    place = {dim: k for k, dim in enumerate(dim for dim in range(len(label.shape)) if dim not in dims)}
    factors = [make_factor([place[d] for d in f.dims], f.ids) for f in label.factors]
    return set_factors(Label(shape), shape, factors, [place[d] for d in label.uniform])


@rule(
    "sum",
    "mean",
    "amax",
    "amin",
    "aminmax",
    "max",
    "min",
    "prod",
    "any",
    "all",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "logsumexp",
    "argmax",
    "argmin",
    "norm",
    "linalg_vector_norm",
    "median",
    "nanmedian",
    "mode",
    "count_nonzero",
    "nansum",
    "kthvalue",
)
def reduce(c: Coupling, call: Call) -> list[Label]:
    """Reductions over some dimensions, or all."""
    if "other" in call.values:
        return [Label(call.shape, meet(c, call.all_labels(), call.shape))]
    label, dims = call.label("self"), call.dims()
    if call.name in _COUNTING:
        call.counts_equal(label, dims)
    return [_reduced(c, label, dims, tuple(out.shape), f"is reduced over ({call.name})") for out in call.outputs]


@rule(
    "_softmax",
    "_log_softmax",
    "softmax",
    "log_softmax",
    "_safe_softmax",
    "cumsum",
    "cumprod",
    "cummax",
    "cummin",
    "logcumsumexp",
)
def along(c: Coupling, call: Call) -> list[Label]:
    """Operators of the same shape that mix the positions of one dimension."""
    label = given_up(c, call.label("self"), call.dims(), f"is mixed over its own dimension ({call.name})")
    return [Label(label.shape, label.factors, label.uniform) for _ in call.outputs]


@rule("sort", "argsort", "topk", "msort")
def ordered(c: Coupling, call: Call) -> list[Label]:
    """Orderings along a dimension."""
    dims = call.dims() if "dim" in call.values else (0,)
    label = given_up(c, call.label("self"), dims, f"is ordered by value ({call.name})")
    return [Label(tuple(out.shape), label.factors, label.uniform) for out in call.outputs]


@rule("linalg_cross")
def cross(c: Coupling, call: Call) -> Label:
    """The cross product along one dimension of size 3."""
    operands = [call.label("self"), call.label("other")]
    dim = int(call["dim"]) % len(call.shape)
    return given_up(c, Label(call.shape, meet(c, operands, call.shape)), [dim], "is mixed by a cross product")


@rule("tril", "triu")
def triangle(c: Coupling, call: Call) -> Label:
    """The last two dimensions are masked by position."""
    label = call.label("self")
    n = len(label.shape)
    return given_up(c, label, range(max(n - 2, 0), n), "is masked by position")


@rule("_cdist_forward")
def distances(c: Coupling, call: Call) -> Label:
    """Distances of all rows of one tensor to all rows of another: rows pass, the coordinates are summed over."""
    x, y = call.label("x1"), call.label("x2")
    x, y = (given_up(c, side, [len(side.shape) - 1], "is reduced over (cdist)") for side in (x, y))
    columns = Label((*y.shape[:-2], 1, y.shape[-2]), tuple(_down(f, len(y.shape) - 2) for f in y.factors))
    rows = Label((*x.shape[:-1], 1), x.factors)
    return Label(call.shape, meet(c, [rows, columns], call.shape))


def _down(factor: Factor, dim: int) -> Factor:
    """The factor with ``dim`` one place further."""
    return Factor(tuple(d + (d == dim) for d in factor.dims), factor.ids)
