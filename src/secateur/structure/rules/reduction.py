"""Operators that mix all positions of a dimension: sums, means, softmax, sorting, normalisation.

Along a unit's own dimension they freeze it; along other dimensions they let it pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Label, make_factor
from secateur.structure.rules.pointwise import meet
from secateur.structure.rules.registry import Call, rule, set_factors

__all__ = ["given_up"]


def given_up(c: Coupling, label: Label, dims: Sequence[int], reason: str) -> Label:
    """A label that is not cut along ``dims`` any more; its shape stays."""
    factors = []
    for factor in label.factors:
        axes = [k for k, dim in enumerate(factor.dims) if dim in dims]
        ids = c.collapse(factor.ids, axes, reason)
        if ids is not None:
            factors.append(make_factor([d for d in factor.dims if d not in dims], ids))
    return set_factors(label, label.shape, factors)


def _reduced(c: Coupling, label: Label, dims: Sequence[int], shape: Sequence[int], reason: str) -> Label:
    """A label after a reduction over ``dims``, whether these stay with size 1 or go."""
    label = given_up(c, label, dims, reason)
    if len(shape) == len(label.shape):
        return set_factors(label, shape, label.factors)
    left = [dim for dim in range(len(label.shape)) if dim not in dims]
    return set_factors(label, shape, [make_factor([left.index(d) for d in f.dims], f.ids) for f in label.factors])


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
    "cosine_similarity",
)
def reduce(c: Coupling, call: Call) -> list[Label]:
    """Reductions over some dimensions, or all."""
    label = call.label("self")
    if call.name in ("max", "min") and "other" in call.values:
        return [Label(call.shape, meet(c, call.all_labels(), call.shape))]
    dims = call.dims()
    outputs = [call.out] if not isinstance(call.out, (tuple, list)) else list(call.out)
    reason = f"is reduced over ({call.name})"
    return [_plain(_reduced(c, label, dims, out.shape, reason)) for out in outputs]


def _plain(label: Label) -> Label:
    return Label(label.shape, label.factors)


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
    "_weight_norm_interface",
    "renorm",
)
def along(c: Coupling, call: Call) -> list[Label]:
    """Operators of the same shape that mix the positions of one dimension."""
    label = given_up(c, call.label("self"), call.dims(), f"is mixed over its own dimension ({call.name})")
    outputs = [call.out] if not isinstance(call.out, (tuple, list)) else list(call.out)
    return [Label(label.shape, label.factors) for _ in outputs]


@rule("sort", "argsort", "topk", "msort")
def ordered(c: Coupling, call: Call) -> list[Label]:
    """Orderings along a dimension."""
    dims = call.dims() if "dim" in call.values else (0,)
    outputs = [call.out] if not isinstance(call.out, (tuple, list)) else list(call.out)
    label = given_up(c, call.label("self"), dims, f"is ordered by value ({call.name})")
    return [Label(tuple(out.shape), label.factors) for out in outputs]


@rule("native_layer_norm", sizes=True)
def layer_norm(c: Coupling, call: Call) -> list[Label]:
    """LayerNorm: its mean and variance over a cut dimension change, so that dimension is frozen."""
    x = call.label("input")
    n, k = len(x.shape), len(call["normalized_shape"])
    normalised = range(n - k, n)
    operands = [x]
    for key in ("weight", "bias"):
        if call.get(key) is not None:
            operands.append(call.label(key))
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
        c.normalise(factor.ids)
        return label
    return given_up(c, label, [last], "is normalised over (RMSNorm's mean square would change)")


@rule("_fused_rms_norm", "rms_norm", sizes=True)
def rms_norm(c: Coupling, call: Call) -> list[Label]:
    """RMSNorm: its mean square over a cut dimension changes, so that dimension is frozen."""
    x = call.label("input")
    n, k = len(x.shape), len(call["normalized_shape"])
    operands = [x, *([call.label("weight")] if call.get("weight") is not None else [])]
    label = Label(x.shape, meet(c, operands, x.shape))
    label = given_up(c, label, range(n - k, n), "is normalised over (RMSNorm's mean square would change)")
    rest = Label(tuple(1 if dim >= n - k else size for dim, size in enumerate(x.shape)), label.factors)
    return [label, rest] if isinstance(call.out, (tuple, list)) else [label]


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
    own = [Label(channel, tuple(make_factor([0], f.ids) or f for f in x.factors if f.dims == (1,)))]
    for key in ("weight", "bias", "running_mean", "running_var"):
        if call.get(key) is not None:
            own.append(call.label(key))
            for factor in own[-1].factors:
                c.carry(factor.ids)
    factors = meet(c, own, channel)
    spread = tuple(make_factor([1], f.ids) or f for f in factors)
    outputs = call.out if isinstance(call.out, (tuple, list)) else [call.out]
    return [
        Label(tuple(out.shape), spread)
        if len(out.shape) == len(x.shape)
        else Label(tuple(out.shape), factors if tuple(out.shape) == channel else ())
        for out in outputs
    ]


@rule("native_group_norm", sizes=True)
def group_norm(c: Coupling, call: Call) -> list[Label]:
    """GroupNorm: only a whole group of channels can go; with one group, nothing."""
    x = call.label("input")
    groups, channels = int(call["group"]), x.shape[1]
    x = given_up(c, x, [d for d in range(len(x.shape)) if d != 1], "is normalised over (GroupNorm)")
    own = [Label((channels,), tuple(make_factor([0], f.ids) or f for f in x.factors if f.dims == (1,)))]
    own.extend(call.label(key) for key in ("weight", "bias") if call.get(key) is not None)
    ids = Label((channels,), meet(c, own, (channels,))).ids_along(0).reshape(groups, channels // groups)
    reason = "is normalised over (GroupNorm's mean and variance would change)"
    if groups == 1:
        c.freeze(ids, reason)
        kept: np.ndarray | None = None
    else:
        c.collapse(ids, [1], reason)
        kept = np.repeat(ids[:, :1], ids.shape[1], axis=1).ravel()
    factor = None if kept is None else make_factor([1], kept)
    side = None if kept is None else make_factor([1], ids[:, 0])
    batch = tuple(call.out[1].shape)
    return [
        set_factors(Label(x.shape), x.shape, [factor]),
        set_factors(Label(batch), batch, [side]),
        set_factors(Label(batch), batch, [side]),
    ]


@rule(
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_pool1d_with_indices",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "fractional_max_pool2d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_bilinear2d",
    "upsample_linear1d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
    "lp_pool2d",
    "grid_sampler_2d",
    "grid_sampler_3d",
)
def spatial(c: Coupling, call: Call) -> list[Label]:
    """Pooling, interpolation and sampling: everything happens inside a channel, dimensions before it pass."""
    n_spatial = next((int(ch) for ch in call.name if ch.isdigit() and ch in "123"), 2)
    x = call.label("self") if "self" in call.values else call.label("input")
    n = len(x.shape)
    label = given_up(c, x, range(n - n_spatial, n), f"is a spatial dimension ({call.name})")
    outputs = call.out if isinstance(call.out, (tuple, list)) else [call.out]
    return [Label(tuple(out.shape), label.factors) for out in outputs]
