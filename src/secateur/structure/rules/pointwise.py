"""Operators that act element by element: they tie the units of operands that meet.

Index conventions: operands are aligned at their last dimensions, as broadcasting does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Factor, Label
from secateur.structure.rules.registry import Call, rule

__all__ = ["meet", "pointwise", "uniform_together"]

#: Operators that map 0 in a weight to 0 in their result, whatever their other (not data) operands are.
_ZERO_TO_ZERO = frozenset(
    [
        *("mul", "div", "neg", "abs", "relu", "tanh", "sign", "sgn", "erf", "erfinv", "sin", "sinh", "asin", "asinh"),
        *("tan", "atan", "atanh", "expm1", "log1p", "square", "trunc", "ceil", "floor", "round", "frac", "positive"),
        *("leaky_relu", "silu", "gelu", "mish", "hardswish", "elu", "celu", "hardshrink", "softshrink", "nan_to_num"),
        *("_to_copy", "clone", "detach", "alias", "lift_fresh", "deg2rad", "rad2deg"),
    ]
)
#: Operators that map 0 to 0 if all their operands are weights.
_ZEROS_TO_ZERO = frozenset(["add", "sub", "maximum", "minimum", "fmax", "fmin", "hypot", "lerp"])
#: Operators that give the same numbers again.
_COPIES = frozenset({"_to_copy", "clone", "detach", "alias", "contiguous"})
#: Operators whose result is 0 where their first operand is.
_ZERO_AT_ZERO = _ZERO_TO_ZERO - {"mul"} | {"native_dropout", "contiguous"}

_MET_FIXED = "meets another tensor's dimension that cannot be cut"


def meet(
    c: Coupling, labels: Sequence[Label], shape: Sequence[int], *, coarse: bool = False, joint: bool = False
) -> tuple[Factor, ...]:
    """Factors of the element-wise combination of operands, broadcast to ``shape``.

    Units at equal positions are tied. A unit that meets a position which is not a unit's (another
    tensor's fixed dimension of full extent, not uniform) is frozen; where its factor has further
    dimensions, it is only tied along the fixed ones. Where a factor meets another over fewer dimensions
    (heads x features and features), either they are cut along the shared ones together, or the smaller
    one is not cut: the solution decides, or, where ``coarse``, the shared ones it is (heads of an
    attention's values follow its scores). ``joint``: the operands are weights of which all must be zero
    for the result to be.
    """
    if len(labels) == 1 and labels[0].shape == tuple(shape):
        return labels[0].factors
    pieces: list[Factor] = []
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
            pieces.append(Factor(dims, ids))
            covered.update(dims)
        fixed.update(
            dim + offset
            for dim, size in enumerate(label.shape)
            if size != 1 and dim not in label.uniform and dim + offset not in covered
        )
    kept = [_drop(c, factor, fixed, _MET_FIXED) for factor in pieces]
    return _merge(c, [factor for factor in kept if factor is not None], coarse or joint, joint)


def uniform_together(labels: Sequence[Label], shape: Sequence[int]) -> frozenset[int]:
    """Dimensions along which the element-wise combination of operands does not change."""
    found = set(range(len(shape)))
    for label in labels:
        offset = len(shape) - len(label.shape)
        for dim, size in enumerate(label.shape):
            if dim not in label.uniform and not size == 1 != shape[dim + offset]:
                found.discard(dim + offset)
    return frozenset(found)


def _drop(c: Coupling, factor: Factor, dims: set[int], reason: str) -> Factor | None:
    """Give up cutting a factor along some of its dimensions."""
    axes = [k for k, dim in enumerate(factor.dims) if dim in dims]
    if not axes:
        return factor
    ids = c.collapse(factor.ids, axes, reason)
    return None if ids is None else Factor(tuple(d for d in factor.dims if d not in dims), ids)


def _merge(c: Coupling, factors: list[Factor], coarse: bool, joint: bool) -> tuple[Factor, ...]:
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
    # The result keeps the ids of parameters where there are any; those of pairs rather, which the trial does not know.
    for factor in sorted(factors, key=lambda factor: (not c.crossings.have(factor.ids), c.made(factor.ids))):
        first = merged.setdefault(factor.dims, factor)
        c.tie(first.ids, factor.ids, _MET_FIXED)
        if joint:
            c.join(first.ids, factor.ids)
    return tuple(merged.values())


def pointwise(c: Coupling, call: Call) -> Label:
    """The rule of every operator that torch tags as point-wise, and of some that it does not."""
    labels = call.all_labels()
    shape = call.shape
    weight, joint = _maps_zero_to_zero(call, labels)
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
        meet(c, labels, shape, joint=joint),
        uniform=uniform_together(labels, shape),
        weight=weight,
        vanishes=_vanishes(call),
        zero=call.name in _COPIES and labels[0].zero,
    )


def _maps_zero_to_zero(call: Call, labels: Sequence[Label]) -> tuple[bool, bool]:
    """Whether the result is a weight, and whether all operands must be zero for it to be zero."""
    # A weight whose slices were picked by data is still one; its product with data is not.
    if not any(label.weight for label in labels) or (len(labels) > 1 and any(label.data for label in labels)):
        return False, False
    name = call.name
    if name in _ZEROS_TO_ZERO:
        return len(labels) > 1 and all(label.weight for label in labels), True
    if name == "div" and len(labels) > 1 and (labels[1].factors or not labels[0].weight):
        return False, False
    if name == "where":
        # Zero where both values are, whatever the condition is.
        values = [label for label in labels[1:] if not label.zero]
        return bool(values) and all(label.weight for label in values), len(values) > 1
    if name == "masked_fill":
        return call.get("value") == 0 and labels[0].weight, False
    if name == "pow":
        exponent = call.get("exponent")
        return isinstance(exponent, (int, float)) and exponent > 0 and labels[0].weight, False
    if name in ("hardtanh", "clamp"):
        low, high = call.get("min_val", call.get("min")), call.get("max_val", call.get("max"))
        bounds = all(bound is None or isinstance(bound, (int, float)) for bound in (low, high))
        return bounds and (low is None or low <= 0) and (high is None or high >= 0), False
    return name in _ZERO_TO_ZERO, False


def _vanishes(call: Call) -> bool:
    """Whether a unit's slice of the result is zero where those of the operands that vanish are."""
    labels = call.all_labels()
    if call.name == "mul":
        return any(label.vanishes for label in labels)
    if call.name in ("add", "sub"):
        return len(labels) == 2 and all(label.vanishes for label in labels)
    return call.name in _ZERO_AT_ZERO and bool(labels) and labels[0].vanishes


@rule("copy")
def copy(c: Coupling, call: Call) -> Label:
    """``self.copy_(src)``: the source's units, tied to those that were there before."""
    operands = [call.label("self"), call.label("src")]
    return Label(call.shape, meet(c, operands, call.shape), uniform=uniform_together(operands, call.shape))


@rule("lift_fresh", "lift_fresh_copy")
def written_out(c: Coupling, call: Call) -> Label:
    """Numbers that the code writes out, as in ``torch.tensor(0.0)``."""
    tensor = call["self"]
    known = not isinstance(tensor, FakeTensor) and not tensor.is_meta and tensor.numel() == 1
    with _disable_current_modes():
        zero = known and not bool(tensor.any())
    return replace(pointwise(c, call), zero=zero)


@rule("fill", "zero")
def fill(c: Coupling, call: Call) -> Label:
    """One value everywhere; the tensor stays as wide as its units."""
    return Label(call.shape, call.label("self").factors, uniform=frozenset(range(len(call.shape))))


@rule(
    "native_dropout",
    "bernoulli",
    "_to_copy",
    "clone",
    "detach",
    "alias",
    "alias_copy",
    "contiguous",
    "masked_fill",
    "resolve_conj",
    "resolve_neg",
    "_conj",
    "_conj_physical",
    "_neg_view",
    "complex",
    "polar",
    "frexp",
    "rrelu_with_noise",
    "prelu",
    "_prelu_kernel",
    "celu",
    "hardswish",
    "mish",
)
def also_pointwise(c: Coupling, call: Call) -> list[Label]:
    """Element by element, but not tagged so by torch, or with several results."""
    label = pointwise(c, call)
    return [label] * len(call.outputs)
