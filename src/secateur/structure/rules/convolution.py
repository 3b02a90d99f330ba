"""Convolutions: input channels are consumed, output channels are made, places are never cut.

Index conventions: input ``(B, C, *)``, weight ``(F, C / G, *)`` and, transposed, ``(C, F / G, *)`` with ``G`` groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Ids, Label, make_factor
from secateur.structure.rules.contraction import TWO_ACTIVATIONS, carry_rest, contract, count_macs
from secateur.structure.rules.pointwise import meet
from secateur.structure.rules.reduction import given_up
from secateur.structure.rules.registry import Call, rule, set_factors

__all__: list[str] = []

_MEETS_FIXED = "meets a channel of a grouped convolution that cannot be cut"


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", sizes=True)
def convolution(c: Coupling, call: Call) -> Label:
    """``(B, C, *) * (F, C / G, *)``, transposed ``(C, F / G, *)``: input channels are consumed.

    With ``1 < G < C`` equal positions of all groups are tied, so that every group loses the same. A
    depthwise convolution passes its channels on. Kernel and spatial dimensions are never cut.
    """
    x, weight, groups = call.label("input" if call.has("input") else "self"), call.label("weight"), int(call["groups"])
    transposed = bool(call.get("transposed", False))
    n = len(x.shape)
    spatial = range(2, n)
    x = given_up(c, x, spatial, "is a spatial dimension of a convolution")
    weight = given_up(c, weight, spatial, "is a kernel dimension of a convolution")
    if groups > 1:
        x = _channels_alone(c, x)
    _count_macs(c, x, weight, call.shape, groups, transposed)
    if groups == 1:
        x, weight = contract(c, call, x, 1, weight, 0 if transposed else 1)
        out = weight.ids_along(1 if transposed else 0)
    else:
        out = _grouped(c, x, weight, groups, transposed)
    if weight.weight:
        c.carry(out)
        c.width(out)
    batch = [f for f in x.factors if f.dims == (0,)]
    result = set_factors(Label(call.shape), call.shape, [*batch, make_factor([1], out)])
    vanishes = weight.vanishes and (x.vanishes or not batch)
    if not call.has("bias"):
        return replace(result, vanishes=vanishes)
    bias = call.label("bias")
    carry_rest(c, bias)
    lined_up = Label((bias.shape[0], *(1 for _ in spatial)), bias.factors, bias.uniform)
    return Label(result.shape, meet(c, [result, lined_up], result.shape), vanishes=vanishes and bias.vanishes)


def _grouped(c: Coupling, x: Label, weight: Label, groups: int, transposed: bool) -> Ids:
    """Ties of a convolution with several groups; gives the ids of the output channels."""
    channels = x.shape[1]
    rows, inner = weight.ids_along(0), weight.ids_along(1)
    rows_per_group = weight.shape[0] // groups
    ids = x.ids_along(1).reshape(groups, channels // groups)
    if channels == groups:
        # Depthwise: a group is one channel, which goes with all that it makes.
        places = 1 if transposed else rows_per_group
        if 0 not in weight.uniform or rows.any():
            # Otherwise it is one filter, expanded over the channels: as many as there are.
            c.tie(rows.reshape(groups, places), ids, _MEETS_FIXED)
        c.freeze(inner, "lies within the filter of a depthwise convolution")
        if weight.weight:
            c.carry(rows)
        return np.repeat(ids.ravel(), inner.shape[0] if transposed else places)
    if transposed:
        inputs = rows.reshape(groups, -1)
        c.tie(inputs, ids, _MEETS_FIXED)
        c.tie(inputs[:1], inputs, _MEETS_FIXED)
        _consume(c, weight, inputs)
        return np.tile(inner, groups)
    outputs = rows.reshape(groups, -1)
    c.tie(outputs[:1], outputs, _MEETS_FIXED)
    c.tie(ids, np.broadcast_to(inner, ids.shape), _MEETS_FIXED)
    _consume(c, weight, inner)
    return rows


def _consume(c: Coupling, weight: Label, ids: Ids) -> None:
    if weight.weight:
        c.consume(ids.ravel())
    else:
        c.freeze(ids, TWO_ACTIVATIONS)


def _channels_alone(c: Coupling, x: Label) -> Label:
    """Make the channels the only dimension of their factor."""
    factor = x.factor_at(1)
    if factor is None or len(factor.dims) == 1:
        return x
    ids = c.collapse(factor.ids, [k for k, dim in enumerate(factor.dims) if dim != 1], "is merged with channels")
    alone = None if ids is None else make_factor([1], ids)
    return set_factors(x, x.shape, [*(f for f in x.factors if f is not factor), alone], x.uniform)


def _count_macs(c: Coupling, x: Label, weight: Label, shape: Sequence[int], groups: int, transposed: bool) -> None:
    """Every element of the output (of the input where transposed) times the kernel and its channels."""
    places = x.shape if transposed else shape
    times = float(np.prod([places[0], *places[2:], *weight.shape[2:]]))
    if groups > 1 and x.shape[1] == groups:
        # Depthwise: the input's channels, for the filter may be one that is expanded over them.
        count_macs(c, (x, [1]), times=times * (weight.shape[1] if transposed else weight.shape[0] // groups))
    else:
        # Dimension 0 counts all channels of one side, dimension 1 those of one group of the other.
        count_macs(c, (weight, [0, 1]), times=times)
