"""Operators that pad, shift, repeat and shuffle: the same movement of the ids where it commutes with removal."""

from __future__ import annotations

import numpy as np

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Factor, Label, make_factor
from secateur.structure.rules.reduction import given_up
from secateur.structure.rules.registry import Call, freeze_all, rule, set_factors
from secateur.structure.rules.views import renamed, reshaped

__all__: list[str] = []


@rule(
    "constant_pad_nd",
    "pad",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
    "_pad_circular",
)
def pad(c: Coupling, call: Call) -> Label:
    """Padding; along a unit's dimension the padded places are fixed ones of constant value."""
    label = call.label("self")
    amounts = [int(amount) for amount in call.get("pad") or call["padding"]]
    n = len(label.shape)
    widths = {
        dim: (amounts[2 * (n - 1 - dim)], amounts[2 * (n - 1 - dim) + 1])
        for dim in range(n)
        if 2 * (n - 1 - dim) < len(amounts)
    }
    padded = {dim for dim, (before, after) in widths.items() if before or after}
    factors: list[Factor | None] = []
    for factor in label.factors:
        dim = factor.dims[0]
        if not padded.intersection(factor.dims):
            factors.append(factor)
        elif call.name == "constant_pad_nd" and factor.ids.ndim == 1 and min(widths[dim]) >= 0:
            factors.append(make_factor(factor.dims, np.pad(factor.ids, widths[dim])))
        else:
            c.freeze(factor.ids, "is padded along its own dimension")
    return set_factors(Label(label.shape), call.shape, factors, label.uniform - padded)


@rule("roll", sizes=True)
def roll(c: Coupling, call: Call) -> Label:
    """A shift: along a unit's dimension it moves positions by a number that does not follow a cut."""
    label = call.label("self")
    return given_up(c, label, call.dims("dims"), "is shifted by position", keep_uniform=True)


@rule("rot90", sizes=True)
def rotate(c: Coupling, call: Call) -> Label:
    """A rotation of two dimensions: neither is cut, and they change places where it is an odd quarter turn."""
    label = call.label("self")
    a, b = call.dims("dims")
    label = given_up(c, label, (a, b), "is rotated with another dimension")
    return set_factors(label, call.shape, label.factors)


@rule("flip")
def flip(c: Coupling, call: Call) -> Label:
    """A reversal commutes with removal: the ids, reversed."""
    label = call.label("self")
    dims = call.dims("dims")
    factors = [
        make_factor(f.dims, np.flip(f.ids, tuple(k for k, dim in enumerate(f.dims) if dim in dims)))
        for f in label.factors
    ]
    return set_factors(label, call.shape, factors, label.uniform)


@rule("repeat", sizes=True)
def repeat(c: Coupling, call: Call) -> Label:
    """Tiles: the ids, tiled. A unit then has several places along the dimension."""
    label = call.label("self")
    shape = call.shape
    extra = len(shape) - len(label.shape)
    times = [int(count) for count in call["repeats"]]
    factors: list[Factor | None] = []
    for factor in label.factors:
        counts = [times[dim + extra] for dim in factor.dims]
        factors.append(make_factor([dim + extra for dim in factor.dims], np.tile(factor.ids, counts)))
    repeated = {dim + extra for dim, size in enumerate(label.shape) if size == 1 != shape[dim + extra]}
    uniform = {*range(extra), *repeated, *(dim + extra for dim in label.uniform)}
    return set_factors(label, shape, factors, uniform)


@rule("repeat_interleave", sizes=True)
def repeat_interleave(c: Coupling, call: Call) -> Label:
    """Each slice several times in a row (a fixed number of times); or the positions that do so, for an index."""
    if not call.has("self"):
        freeze_all(c, call.all_labels(), "is used as a number of repetitions")
        return Label(call.shape)
    label = call.label("self")
    if call.get("dim") is None or not isinstance(call.get("repeats"), int):
        freeze_all(c, call.all_labels(), "is repeated a number of times that depends on data")
        return Label(call.shape)
    dim, times = call.dim(), int(call["repeats"])
    factors = [
        make_factor(f.dims, np.repeat(f.ids, times, axis=f.dims.index(dim)) if dim in f.dims else f.ids)
        for f in label.factors
    ]
    return set_factors(label, call.shape, factors, label.uniform)


@rule("pixel_shuffle")
def pixel_shuffle(c: Coupling, call: Call) -> Label:
    """``(.., C r r, H, W)`` to ``(.., C, H r, W r)``: a channel goes with all the r x r that it is made of."""
    label, r = call.label("self"), int(call["upscale_factor"])
    *batch, channels, height, width = label.shape
    n = len(batch)
    split = reshaped(c, label, (*batch, channels // (r * r), r, r, height, width))
    order = [*range(n), n, n + 3, n + 1, n + 4, n + 2]
    moved = renamed(split, [split.shape[dim] for dim in order], order.index)
    return reshaped(c, _one_axis(c, moved, n, "is shuffled into pixels"), call.shape)


@rule("pixel_unshuffle")
def pixel_unshuffle(c: Coupling, call: Call) -> Label:
    """``(.., C, H r, W r)`` to ``(.., C r r, H, W)``: a channel has r x r places."""
    label, r = call.label("self"), int(call["downscale_factor"])
    *batch, channels, height, width = label.shape
    n = len(batch)
    label = _one_axis(c, label, n, "is shuffled into channels")
    split = reshaped(c, label, (*batch, channels, height // r, r, width // r, r))
    order = [*range(n), n, n + 2, n + 4, n + 1, n + 3]
    return reshaped(c, renamed(split, [split.shape[dim] for dim in order], order.index), call.shape)


def _one_axis(c: Coupling, label: Label, dim: int, reason: str) -> Label:
    """Let factors that reach beyond ``dim`` be cut along no dimension behind it."""
    return given_up(c, label, range(dim + 1, len(label.shape)), reason)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(c: Coupling, call: Call) -> Label:
    """``(B, G, C / G, ..)`` to ``(B, C / G, G, ..)``: equal positions of all G groups go together."""
    label, groups = call.label("self"), int(call["groups"])
    batch, channels, *rest = label.shape
    split = reshaped(c, label, (batch, groups, channels // groups, *rest))
    factor = split.factor_at(2)
    if factor is not None and 1 in factor.dims:
        # The number of groups is written into the call: only the positions within a group can go.
        c.rectangle(factor.ids, [factor.dims.index(1)])
    swap = {1: 2, 2: 1}
    shape = (batch, channels // groups, groups, *rest)
    return reshaped(c, renamed(split, shape, lambda dim: swap.get(dim, dim)), call.shape)
