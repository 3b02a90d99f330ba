"""Operators that act element by element: they tie the units of operands that meet.

Index conventions: operands are aligned at their last dimensions, as broadcasting does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Factor, Label
from secateur.structure.rules.registry import Call, rule

__all__ = ["meet", "pointwise"]

#: Operators that map 0 in a weight to 0 in their result, whatever their other (not data) operands are.
_ZERO_TO_ZERO = frozenset(
    ["mul", "div", "neg", "abs", "relu", "tanh", "sign", "erf", "sin", "sinh", "asinh", "atan", "_to_copy", "clone", "detach", "alias", "lift_fresh", "positive", "view_as_real", "view_as_complex", "leaky_relu", "silu", "gelu", "square", "trunc"]
)
#: Operators whose result is 0 where their first operand is.
_ZERO_AT_ZERO = _ZERO_TO_ZERO - {"mul"} | {"native_dropout", "contiguous"}


def meet(c: Coupling, labels: Sequence[Label], shape: Sequence[int], *, coarse: bool = False) -> tuple[Factor, ...]:
    """Factors of the element-wise combination of operands, broadcast to ``shape``.

    Units at equal positions are tied. A unit that meets a position which is not a unit's (another
    tensor's fixed dimension of full extent, not neutral) is frozen; where its factor has further
    dimensions, it is only tied along the fixed ones. Where a factor meets another over fewer dimensions
    (heads x features and features), either they are cut along the shared ones together, or the smaller
    one is not cut: the solution decides, or, where ``coarse``, the shared ones it is (heads of an
    attention's values follow its scores).
    """
    pieces: list[tuple[tuple[int, ...], Factor]] = []
    fixed: set[int] = set()
    for label in labels:
        offset = len(shape) - len(label.shape)
        covered: set[int] = set()
        for factor in label.factors:
            stretched = [k for k, dim in enumerate(factor.dims) if label.shape[dim] == 1 != shape[dim + offset]]
            ids = c.collapse(factor.ids, stretched, "is the only unit of a dimension that is broadcast")
            if ids is None:
                continue
            dims = tuple(dim + offset for k, dim in enumerate(factor.dims) if k not in stretched)
            pieces.append((dims, Factor(dims, ids)))
            covered.update(dims)
        if not label.neutral:
            fixed.update(
                dim + offset for dim, size in enumerate(label.shape) if size != 1 and dim + offset not in covered
            )
    reason = "meets another tensor's dimension that cannot be cut"
    kept = [_drop(c, factor, fixed, reason) for _, factor in pieces]
    return _merge(c, [factor for factor in kept if factor is not None], coarse)


def _drop(c: Coupling, factor: Factor, dims: set[int], reason: str) -> Factor | None:
    """Give up cutting a factor along some of its dimensions."""
    axes = [k for k, dim in enumerate(factor.dims) if dim in dims]
    if not axes:
        return factor
    ids = c.collapse(factor.ids, axes, reason)
    return None if ids is None else Factor(tuple(d for d in factor.dims if d not in dims), ids)


def _merge(c: Coupling, factors: list[Factor], coarse: bool) -> tuple[Factor, ...]:
    """Tie factors that share dimensions, so that none of the result's do."""
    reason = "meets a unit that is laid out along other dimensions"
    while True:
        clash = next(
            ((a, b) for a, b in combinations(factors, 2) if set(a.dims) & set(b.dims) and a.dims != b.dims),
            None,
        )
        if clash is None:
            break
        wide, narrow = sorted(clash, key=lambda factor: -len(factor.dims))
        rest = [f for f in factors if f is not wide and f is not narrow]
        shared = set(wide.dims) & set(narrow.dims)
        if not coarse and shared == set(narrow.dims):
            c.follows(wide.ids, [wide.dims.index(dim) for dim in narrow.dims], narrow.ids)
            factors = [*rest, wide]
            continue
        narrowed = [_drop(c, factor, set(factor.dims) - shared, reason) for factor in clash]
        factors = [*rest, *(factor for factor in narrowed if factor is not None)]
    merged: dict[tuple[int, ...], Factor] = {}
    for factor in factors:
        first = merged.setdefault(factor.dims, factor)
        c.tie(first.ids, factor.ids)
    return tuple(merged.values())


def pointwise(c: Coupling, call: Call) -> Label:
    """The rule of every operator that torch tags as point-wise, and of some that it does not."""
    labels = call.all_labels()
    shape = call.shape
    weight = (
        call.name in _ZERO_TO_ZERO
        and any(label.weight for label in labels)
        and not any(label.data for label in labels)
        and not (call.name == "div" and len(labels) > 1 and labels[1].factors)
    )
    if not weight:
        for label in labels:
            if label.weight:
                for factor in label.factors:
                    c.carry(factor.ids)
    else:
        # The unit's own slices come first, so that the result keeps the ids of a parameter.
        labels = sorted(labels, key=lambda label: not label.weight)
    return Label(
        tuple(shape),
        meet(c, labels, shape),
        neutral=bool(labels) and all(label.neutral for label in labels),
        weight=weight,
        vanishes=_vanishes(call),
    )


def _vanishes(call: Call) -> bool:
    """Whether a unit's slice of the result is zero where those of the operands that vanish are."""
    labels = call.all_labels()
    if call.name == "mul":
        return any(label.vanishes for label in labels)
    if call.name in ("add", "sub"):
        return len(labels) == 2 and all(label.vanishes for label in labels)
    return call.name in _ZERO_AT_ZERO and labels[0].vanishes


@rule("copy")
def copy(c: Coupling, call: Call) -> Label:
    """``self.copy_(src)``: the source's units, tied to those that were there before."""
    target, source = call.label("self"), call.label("src")
    factors = meet(c, [target, source], call.shape)
    return Label(target.shape, factors, neutral=source.neutral and target.neutral)


@rule(
    "native_dropout",
    "bernoulli",
    "_to_copy",
    "clone",
    "detach",
    "alias",
    "lift_fresh",
    "contiguous",
    "fill",
    "masked_fill",
    "zero",
    "resolve_conj",
    "resolve_neg",
    "_conj",
    "rrelu_with_noise",
    "prelu",
    "_prelu_kernel",
    "normal",
    "uniform",
    "random",
    "exponential",
    "glu_backward",
    "celu",
    "hardswish",
    "mish",
)
def also_pointwise(c: Coupling, call: Call) -> Label | list[Label]:
    """Element by element, but not tagged so by torch (random draws among them: each element's own)."""
    label = pointwise(c, call)
    outputs = [out for out in call.out if out is not None] if isinstance(call.out, (tuple, list)) else [call.out]
    return [label] * len(outputs)
