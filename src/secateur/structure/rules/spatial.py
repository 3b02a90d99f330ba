"""Operators on the places of feature maps - pooling, interpolation, sampling, windows: channels pass.

Index conventions: ``(B, C, *)`` or ``(C, *)`` with 1 to 3 spatial dimensions last.
"""

from __future__ import annotations

import numpy as np

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Factor, Label, make_factor
from secateur.structure.rules.pointwise import meet
from secateur.structure.rules.reduction import given_up
from secateur.structure.rules.registry import Call, freeze_all, rule, set_factors

__all__: list[str] = []


def _n_spatial(name: str) -> int:
    """The number of spatial dimensions, which is written in the operator's name."""
    return next(int(character) for character in name if character in "123")


@rule(
    "max_pool1d",
    "max_pool1d_with_indices",
    "max_pool2d",
    "max_pool2d_with_indices",
    "max_pool3d",
    "max_pool3d_with_indices",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "_upsample_lanczos2d_aa",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
)
def spatial(c: Coupling, call: Call) -> list[Label]:
    """Pooling and interpolation: everything happens inside a channel, dimensions before it pass."""
    label = _without_places(c, call, call.label("self" if call.has("self") else "input"))
    return [Label(tuple(out.shape), label.factors) for out in call.outputs]


def _without_places(c: Coupling, call: Call, label: Label) -> Label:
    n = len(label.shape)
    return given_up(c, label, range(n - _n_spatial(call.name), n), f"is a spatial dimension ({call.name})")


@rule("fractional_max_pool2d", "fractional_max_pool3d")
def fractional(c: Coupling, call: Call) -> list[Label]:
    """Pooling with random places, which each channel draws for itself: a smaller model would draw others."""
    freeze_all(c, call.all_labels(), "is pooled at random places")
    return [Label(tuple(out.shape)) for out in call.outputs]


@rule("max_unpool2d", "max_unpool3d", sizes=True)
def unpool(c: Coupling, call: Call) -> Label:
    """The inverse of max-pooling: values and their places are of the same channels."""
    values, places = (_without_places(c, call, call.label(key)) for key in ("self", "indices"))
    n, k = len(values.shape), _n_spatial(call.name)
    lined_up = tuple(1 if dim >= n - k else size for dim, size in enumerate(values.shape))
    return Label(call.shape, meet(c, [Label(lined_up, side.factors) for side in (values, places)], lined_up))


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d", "_grid_sampler_2d_cpu_fallback", "cudnn_grid_sampler")
def grid_sampler(c: Coupling, call: Call) -> Label:
    """Samples of every channel at the same places; the coordinates of these places cannot be cut."""
    x, grid = call.label("input" if call.has("input") else "self"), call.label("grid")
    n = len(x.shape)
    x = given_up(c, x, range(2, n), "is a spatial dimension (grid_sampler)")
    grid = given_up(c, grid, range(1, n), "is a coordinate (grid_sampler)")
    lined_up = (x.shape[0], x.shape[1], *([1] * (n - 2)))
    batch = Label((x.shape[0], *([1] * (n - 1))), grid.factors)
    return Label(call.shape, meet(c, [Label(lined_up, x.factors), batch], lined_up))


@rule("im2col", sizes=True)
def windows(c: Coupling, call: Call) -> Label:
    """``(B, C, H, W)`` to ``(B, C k k, L)``: a channel has a place for each element of the kernel."""
    label = call.label("self")
    n = len(label.shape)
    label = given_up(c, label, range(n - 2, n), "is a spatial dimension (im2col)")
    times = call.shape[n - 3] // max(label.shape[n - 3], 1)
    factors = [_spread(f, n - 3, times) for f in label.factors]
    return set_factors(Label(call.shape), call.shape, factors)


def _spread(factor: Factor, dim: int, times: int) -> Factor | None:
    if dim not in factor.dims:
        return factor
    return make_factor(factor.dims, np.repeat(factor.ids, times, axis=factor.dims.index(dim)))


@rule("col2im", sizes=True)
def unwindow(c: Coupling, call: Call) -> Label:
    """``(B, C k k, L)`` to ``(B, C, H, W)``: a channel goes with all k x k that it is summed from."""
    label = call.label("self")
    n = len(label.shape)
    label = given_up(c, label, [n - 1], "is the window of a sum (col2im)")
    per_channel = int(np.prod(call["kernel_size"]))
    factors: list[Factor | None] = []
    for factor in label.factors:
        if n - 2 not in factor.dims:
            factors.append(factor)
        elif factor.ids.ndim > 1:
            c.freeze(factor.ids, "is summed over with another unit's dimension (col2im)")
        else:
            parts = factor.ids.reshape(-1, per_channel)
            ids = c.collapse(parts, [1], "is summed over (col2im)")
            factors.append(None if ids is None else make_factor([n - 2], ids))
    return set_factors(Label(call.shape), call.shape, factors)
