"""Operators that sum over a dimension of two operands: here units are consumed, and MACs arise.

Index conventions: a contraction ``out[b.., m.., n..] = sum_k left[b.., m.., k] right[b.., k, n..]``. Where
one side is a weight, its slices along ``k`` consume the units that the other side carries along ``k``:
zero the slice and the unit has no influence. Where neither is, no cut along ``k`` is possible.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Factor, Ids, Label, make_factor, map_dims
from secateur.structure.rules.pointwise import meet
from secateur.structure.rules.registry import Call, rule, set_factors

__all__ = ["contract", "count_macs"]

_TWO_ACTIVATIONS = "is contracted in a product of two activations, where no weight can be zeroed"
_READS_FIXED = "reads a dimension that cannot be cut (the model's input, or something frozen)"


def contract(c: Coupling, left: Label, left_dim: int, right: Label, right_dim: int) -> tuple[Label, Label]:
    """Tie, consume or freeze the contracted dimension; give both labels without it (their shapes unchanged)."""
    a, b = left.factor_at(left_dim), right.factor_at(right_dim)
    weight_is_right = right.weight or not left.weight
    weight, w = (right, b) if weight_is_right else (left, a)
    activation, x = (left, a) if weight_is_right else (right, b)
    if not weight.weight or (w is not None and len(w.dims) > 1):
        left = _give_up(c, left, left_dim, _TWO_ACTIVATIONS)
        right = _give_up(c, right, right_dim, _TWO_ACTIVATIONS)
        return left, right
    if w is not None:
        if x is None:
            if not activation.neutral:
                c.freeze(w.ids, _READS_FIXED)
        else:
            at = left_dim if weight_is_right else right_dim
            along = np.moveaxis(x.ids, x.dims.index(at), -1)
            c.tie(along, w.ids, _READS_FIXED)
            c.consume(w.ids, vanishes=activation.vanishes)
            c.width(w.ids)
            if weight.weight and activation.weight:
                c.carry(x.ids)
    elif x is not None:
        c.freeze(x.ids, "is consumed by a weight whose slices cannot be cut")
    drop_a = [f for f in left.factors if f is not a]
    drop_b = [f for f in right.factors if f is not b]
    return set_factors(left, left.shape, drop_a), set_factors(right, right.shape, drop_b)


def _give_up(c: Coupling, label: Label, dim: int, reason: str) -> Label:
    """Do not cut along ``dim``: tie along it, or freeze."""
    factor = label.factor_at(dim)
    if factor is None:
        return label
    ids = c.collapse(factor.ids, [factor.dims.index(dim)], reason)
    rest = None if ids is None else make_factor([d for d in factor.dims if d != dim], ids)
    return set_factors(label, label.shape, [*(f for f in label.factors if f is not factor), rest])


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


def _carry_rest(c: Coupling, label: Label) -> None:
    if label.weight:
        for factor in label.factors:
            c.carry(factor.ids)


def _matrix_product(c: Coupling, left: Label, right: Label, shape: Sequence[int]) -> Label:
    """``(B.., m, k) @ (B.., k, n)`` with the same number of dimensions on both sides."""
    n = len(shape)
    if left.factor_at(n - 1) is None:
        # The weight may have units along the sum where the other side has none, as a first state of zeros.
        count_macs(c, (left, range(n - 1)), (right, [n - 2, n - 1]))
    else:
        count_macs(c, (left, range(n)), (right, [n - 1]))
    rest_left, rest_right = contract(c, left, n - 1, right, n - 2)
    _carry_rest(c, rest_left)
    _carry_rest(c, rest_right)
    for rest, dim in ((rest_left, n - 2), (rest_right, n - 1)):
        if rest.weight and (made := rest.factor_at(dim)) is not None:
            c.width(made.ids)
    narrow_left = Label((*left.shape[:-1], 1), rest_left.factors, neutral=left.neutral)
    narrow_right = Label((*right.shape[:-2], 1, right.shape[-1]), rest_right.factors, neutral=right.neutral)
    factors = meet(c, [_batched(c, narrow_left, n - 1), _batched(c, narrow_right, n - 2)], shape, coarse=True)
    vanishes = all(side.vanishes or not rest.factors for side, rest in ((left, rest_left), (right, rest_right)))
    return Label(tuple(shape), factors, weight=left.weight and right.weight, vanishes=vanishes)


def _batched(c: Coupling, label: Label, gone: int) -> Label:
    """Make sure that no factor still holds the contracted dimension."""
    return set_factors(label, label.shape, [f for f in label.factors if gone not in f.dims])


@rule("mm")
def mm(c: Coupling, call: Call) -> Label:
    """``(m, k) @ (k, n)``."""
    return _matrix_product(c, call.label("self"), call.label("mat2"), call.shape)


@rule("bmm")
def bmm(c: Coupling, call: Call) -> Label:
    """``(b, m, k) @ (b, k, n)``; the batch dimension meets element by element."""
    return _matrix_product(c, call.label("self"), call.label("mat2"), call.shape)


@rule("addmm")
def addmm(c: Coupling, call: Call) -> Label:
    """A matrix product plus a bias."""
    return _plus(c, call, _matrix_product(c, call.label("mat1"), call.label("mat2"), call.shape))


@rule("baddbmm")
def baddbmm(c: Coupling, call: Call) -> Label:
    """A batched matrix product plus an addend."""
    return _plus(c, call, _matrix_product(c, call.label("batch1"), call.label("batch2"), call.shape))


def _plus(c: Coupling, call: Call, product: Label) -> Label:
    addend = call.label("self")
    neutral = addend.neutral or call.get("beta", 1) == 0
    _carry_rest(c, addend)
    vanishes = product.vanishes and (addend.vanishes or call.get("beta", 1) == 0)
    addend = Label(addend.shape, () if neutral else addend.factors, neutral=neutral)
    return Label(product.shape, meet(c, [product, addend], product.shape), vanishes=vanishes)


@rule("mv")
def mv(c: Coupling, call: Call) -> Label:
    """``(m, k) @ (k,)``."""
    left, right = call.label("self"), call.label("vec")
    count_macs(c, (left, range(2)))
    rest, _ = contract(c, left, 1, right, 0)
    _carry_rest(c, rest)
    return set_factors(Label(call.shape), call.shape, [f for f in rest.factors if f.dims == (0,)])


@rule("dot", "vdot")
def dot(c: Coupling, call: Call) -> Label:
    """``(k,) @ (k,)``."""
    contract(c, call.label("self"), 0, call.label(list(call.values)[1]), 0)
    return Label(call.shape)


@rule("embedding", sizes=True)
def embedding(c: Coupling, call: Call) -> Label:
    """Rows by index: the vocabulary is chosen by data, the width passes."""
    weight, indices = call.label("weight"), call.label("indices")
    for factor in weight.factors:
        if 0 in factor.dims:
            c.freeze(factor.ids, "is a vocabulary, indexed by data")
        elif weight.weight:
            c.carry(factor.ids)
    n = len(indices.shape)
    rest = [f for f in weight.factors if 0 not in f.dims]
    for factor in indices.factors:
        c.freeze(factor.ids, "is used as an index")
    label = Label(call.shape, vanishes=weight.vanishes)
    return set_factors(label, call.shape, map_dims(rest, lambda dim: dim - 1 + n))


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", sizes=True)
def convolution(c: Coupling, call: Call) -> Label:
    """``(B, C, *) * (F, C / groups, *)``, transposed ``(C, F / groups, *)``: input channels are consumed.

    With ``1 < groups`` equal positions of all groups are tied, so that every group loses the same. A
    depthwise convolution passes its channels on. Kernel and spatial dimensions are never cut.
    """
    x, weight, groups = call.label("input"), call.label("weight"), int(call["groups"])
    transposed = bool(call["transposed"])
    n = len(x.shape)
    spatial = range(2, n)
    for dim in spatial:
        x = _give_up(c, x, dim, "is a spatial dimension of a convolution")
        weight = _give_up(c, weight, dim, "is a kernel dimension of a convolution")
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    _count_convolution(c, x, weight, call.shape, in_dim, out_dim, groups, transposed)
    if groups == 1:
        x, weight = contract(c, x, 1, weight, in_dim)
        out = weight.ids_along(out_dim)
    else:
        out = _grouped(c, x, weight, groups, in_dim, out_dim, transposed)
    if weight.weight:
        c.carry(out)
        c.width(out)
    factors = [f for f in x.factors if f.dims == (0,)]
    result = set_factors(Label(call.shape), call.shape, [*factors, make_factor([1], out)])
    if call["bias"] is None:
        return result
    bias = call.label("bias")
    _carry_rest(c, bias)
    bias = Label((bias.shape[0], *(1 for _ in spatial)), bias.factors, neutral=bias.neutral)
    return Label(result.shape, meet(c, [result, bias], result.shape))


def _grouped(c: Coupling, x: Label, weight: Label, groups: int, in_dim: int, out_dim: int, transposed: bool) -> Ids:
    """Ties of a grouped convolution; gives the ids of the output channels."""
    reason = "meets a channel of a grouped convolution that cannot be cut"
    channels = x.shape[1]
    x = _narrow(c, x, 1)
    ids = x.ids_along(1).reshape(groups, channels // groups)
    stays = weight.factor_at(0)
    rows = stays.ids if stays is not None and stays.dims == (0,) else np.zeros(weight.shape[0], np.int64)
    inner = weight.ids_along(1)
    if not transposed:
        outputs = rows.reshape(groups, -1)
        if channels == groups:
            # Depthwise: a group is one channel, which goes with all that it makes.
            c.tie(outputs, ids, reason)
            c.freeze(inner, "is the single input of a depthwise convolution's filter")
            return np.repeat(ids, outputs.shape[1], axis=1).ravel() if not rows.any() else outputs.ravel()
        c.tie(outputs[:1], outputs, reason)
        c.tie(ids, np.broadcast_to(inner, ids.shape), reason)
        if weight.weight:
            c.consume(inner)
        return outputs.ravel()
    inputs = rows.reshape(groups, -1)
    per_group = inner.shape[0]
    if channels == groups and per_group == 1:
        c.tie(inputs, ids, reason)
        c.freeze(inner, "is the single output of a depthwise convolution's filter")
        return inputs.ravel()
    c.tie(inputs, ids, reason)
    c.tie(inputs[:1], inputs, reason)
    if weight.weight:
        c.consume(inputs.ravel())
    return np.tile(inner, groups)


def _narrow(c: Coupling, label: Label, dim: int) -> Label:
    """Make ``dim`` the only dimension of its factor."""
    factor = label.factor_at(dim)
    if factor is None or len(factor.dims) == 1:
        return label
    return _give_up(c, label, dim, "is a channel merged with another dimension")


def _count_convolution(
    c: Coupling, x: Label, weight: Label, shape: Sequence[int], in_dim: int, out_dim: int, groups: int, transposed: bool
) -> None:
    """MACs: every element of the output (of the input where transposed) times the kernel and its channels."""
    places = x.shape if transposed else shape
    times = float(np.prod([places[0], *places[2:], *weight.shape[2:]]))
    channels = x.shape[1]
    if groups == 1:
        count_macs(c, (weight, [in_dim, out_dim]), times=times)
    elif not transposed and channels == groups:
        count_macs(c, (weight, [0]), times=times)
    else:
        # dim 0 counts all channels of one side, dim 1 those of one group of the other.
        count_macs(c, (weight, [0, 1]), times=times)


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_attention_math_for_mps",
    sizes=True,
)
def attention(c: Coupling, call: Call) -> list[Label]:
    """``softmax(q k^T) v`` over ``(B, H, T, D)``: heads go together, value features pass, others are contracted."""
    q, k, v = call.label("query"), call.label("key"), call.label("value")
    q = _give_up(c, _give_up(c, q, 3, _TWO_ACTIVATIONS), 2, "is the time of an attention")
    k = _give_up(c, _give_up(c, k, 3, _TWO_ACTIVATIONS), 2, "is the time of an attention")
    v = _give_up(c, v, 2, "is the time of an attention")
    if k.shape[1] != q.shape[1]:
        k, v = _repeat_heads(c, k, q.shape[1]), _repeat_heads(c, v, q.shape[1])
    head_shape = (*q.shape[:2], 1, 1)
    operands = [Label(head_shape, q.factors), Label(head_shape, k.factors)]
    masks = [key for key in ("attn_mask", "attn_bias") if call.get(key) is not None]
    for key in masks:
        bias = call.label(key)
        for dim in range(len(bias.shape) - 2, len(bias.shape)):
            bias = _give_up(c, bias, dim, "is the time of an attention")
        lined_up = tuple(1 if dim >= len(bias.shape) - 2 else size for dim, size in enumerate(bias.shape))
        operands.append(Label(lined_up, bias.factors, neutral=bias.neutral))
    score = Label(head_shape, meet(c, operands, head_shape))
    t, s = q.shape[2], k.shape[2]
    count_macs(c, (q, [0, 1]), times=float(t * s * q.shape[3]))
    count_macs(c, (v, [0, 1, 3]), times=float(t * s))
    out_shape = (*q.shape[:3], v.shape[3])
    value = Label((v.shape[0], v.shape[1], 1, v.shape[3]), v.factors)
    out = Label(out_shape, meet(c, [score, value], (*q.shape[:2], 1, v.shape[3]), coarse=True))
    rest = [tensor for tensor in call.out[1:] if hasattr(tensor, "shape")]
    side = [
        set_factors(Label(tuple(t.shape)), t.shape, [f for f in score.factors if len(t.shape) > 1 and f.dims == (1,)])
        if len(t.shape) > 1 and t.shape[1] == q.shape[1]
        else Label(tuple(t.shape))
        for t in rest
    ]
    return [out, *side]


def _repeat_heads(c: Coupling, label: Label, heads: int) -> Label:
    times = heads // label.shape[1]
    shape = (label.shape[0], heads, *label.shape[2:])
    factors: list[Factor | None] = [
        make_factor(f.dims, np.repeat(f.ids, times, axis=f.dims.index(1)) if 1 in f.dims else f.ids)
        for f in label.factors
    ]
    return set_factors(label, shape, factors)
