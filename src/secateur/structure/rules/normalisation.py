"""Normalisations: units pass where each has statistics of its own, and are frozen where the statistics are shared."""

from __future__ import annotations

import numpy as np

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Factor, Label, make_factor
from secateur.structure.rules.pointwise import meet
from secateur.structure.rules.reduction import given_up
from secateur.structure.rules.registry import Call, rule, set_factors

__all__: list[str] = []


@rule("native_layer_norm", sizes=True)
def layer_norm(c: Coupling, call: Call) -> list[Label]:
    """LayerNorm: its mean and variance over a cut dimension change, so that dimension is frozen."""
    x = call.label("input")
    n, k = len(x.shape), len(call["normalized_shape"])
    normalised = range(n - k, n)
    operands = [x, *(call.label(key) for key in ("weight", "bias") if call.has(key))]
    label = Label(x.shape, meet(c, operands, x.shape))
    label = given_up(c, label, normalised, "is normalised over (LayerNorm's mean and variance would change)")
    rest = Label(tuple(1 if dim in normalised else size for dim, size in enumerate(x.shape)), label.factors)
    return [label, rest, rest]


@rule("secateur::rms_norm")
def known_rms_norm(c: Coupling, call: Call) -> Label:
    """An RMSNorm whose eps is known: its width can be cut if the units that go are zero at its input."""
    x, weight = call.label("x"), call.label("weight")
    last = len(x.shape) - 1
    label = Label(x.shape, meet(c, [x, weight], x.shape), vanishes=x.vanishes)
    factor = label.factor_at(last)
    if factor is None:
        return label
    if factor.dims == (last,) and x.vanishes:
        c.normalise(factor.ids, str(call["path"]))
        return label
    return given_up(c, label, [last], "is normalised over (RMSNorm's mean square would change)")


@rule("_fused_rms_norm", "rms_norm", sizes=True)
def rms_norm(c: Coupling, call: Call) -> list[Label]:
    """RMSNorm: its mean square over a cut dimension changes, so that dimension is frozen."""
    x = call.label("input")
    n, k = len(x.shape), len(call["normalized_shape"])
    operands = [x, *([call.label("weight")] if call.has("weight") else [])]
    label = Label(x.shape, meet(c, operands, x.shape))
    label = given_up(c, label, range(n - k, n), "is normalised over (RMSNorm's mean square would change)")
    rest = Label(tuple(1 if dim >= n - k else size for dim, size in enumerate(x.shape)), label.factors)
    return [label, rest][: len(call.outputs)]


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "_native_batch_norm_legit_functional",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "batch_norm",
    "miopen_batch_norm",
    "_batch_norm_impl_index",
)
def batch_norm(c: Coupling, call: Call) -> list[Label]:
    """BatchNorm and InstanceNorm statistics are each channel's own: channels pass."""
    x = call.label("input")
    x = given_up(c, x, [d for d in range(len(x.shape)) if d != 1], "is normalised over (BatchNorm)")
    channel = (x.shape[1],)
    own = [Label(channel, tuple(Factor((0,), f.ids) for f in x.factors if f.dims == (1,)))]
    for key in ("weight", "bias", "running_mean", "running_var"):
        if call.has(key):
            own.append(call.label(key))
            for factor in own[-1].factors:
                c.carry(factor.ids)
    factors = meet(c, own, channel)
    spread = tuple(Factor((1,), f.ids) for f in factors)
    made: list[Label] = []
    for out in call.outputs:
        shape = tuple(out.shape)
        if len(shape) == len(x.shape):
            made.append(Label(shape, spread))
        else:
            made.append(Label(shape, factors if shape == channel else ()))
    return made


@rule("native_group_norm", sizes=True)
def group_norm(c: Coupling, call: Call) -> list[Label]:
    """GroupNorm: only a whole group of channels can go; with one group, nothing."""
    x = call.label("input")
    groups, channels = int(call["group"]), x.shape[1]
    x = given_up(c, x, [d for d in range(len(x.shape)) if d != 1], "is normalised over (GroupNorm)")
    own = [Label((channels,), tuple(Factor((0,), f.ids) for f in x.factors if f.dims == (1,)))]
    own.extend(call.label(key) for key in ("weight", "bias") if call.has(key))
    ids = Label((channels,), meet(c, own, (channels,))).ids_along(0).reshape(groups, channels // groups)
    reason = "is normalised over (GroupNorm's mean and variance would change)"
    batch = tuple(call.outputs[1].shape)
    if groups == 1:
        c.freeze(ids, reason)
        return [Label(x.shape), Label(batch), Label(batch)]
    c.collapse(ids, [1], reason)
    whole = make_factor([1], np.repeat(ids[:, :1], ids.shape[1], axis=1).ravel())
    side = set_factors(Label(batch), batch, [make_factor([1], ids[:, 0])])
    return [set_factors(Label(x.shape), x.shape, [whole]), side, side]


@rule("_weight_norm_interface")
def weight_norm(c: Coupling, call: Call) -> list[Label]:
    """``g v / |v|``, a norm for each position of one dimension: that one passes, the others are mixed.

    The result is no weight: closing a slice of ``v`` changes the scale of the others.
    """
    v, g = call.label("v"), call.label("g")
    dim = int(call["dim"]) % len(v.shape)
    v = given_up(c, v, [d for d in range(len(v.shape)) if d != dim], "is normalised over (weight norm)")
    for label in (v, g):
        for factor in label.factors:
            c.carry(factor.ids)
    side = g.with_factors(g.shape, [f for f in g.factors if f.dims == (dim,)])
    factors = meet(c, [Label(v.shape, v.factors), Label(side.shape, side.factors)], v.shape)
    norms = tuple(f for f in factors if f.dims == (dim,))
    return [Label(v.shape, factors), Label(tuple(call.outputs[1].shape), norms)]


@rule("renorm")
def renorm(c: Coupling, call: Call) -> Label:
    """Slices along one dimension are scaled to a largest norm: that one passes, the others are mixed."""
    label = call.label("self")
    mixed = [d for d in range(len(label.shape)) if d != call.dim()]
    label = given_up(c, label, mixed, "is normalised over (renorm)")
    return Label(label.shape, label.factors)
