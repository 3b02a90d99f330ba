"""Widths that hardware likes: which closed units stay so that sizes become multiples of 8, or of any other number."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.errors import CompactionError
from secateur.structure.cut import CutPlan
from secateur.structure.groups import Axis, Group, Keep
from secateur.structure.structure import Structure

__all__ = ["rounded_keep"]


def rounded_keep(structure: Structure, keep: Keep, round_to: int) -> dict[str, torch.Tensor]:
    """The units that stay in a model whose widths are to be multiples: the kept ones, and closed ones that fill up.

    A width is the size of a dimension that matrix products or convolutions run over (``structure.widths``): kept units
    times the positions that each has there. A group gets the smallest number of units, at least the kept ones and at
    most its size, at which the most of its widths are multiples; where more units would not make more of them so,
    none is added. Whole heads of 64 features are multiples of 8 already. A width that several groups share counts each
    group's part alone, and of single inputs of a layer those are counted that it reads. Those that fill up are the
    first closed ones; in a compact model they are zero wherever they are read.

    Args:
        structure: the model's structure.
        keep: kept units by group name, as `secateur.compact` takes them.
        round_to: the number, at least 1; 1 adds nothing.

    Returns:
        The units that stay, ascending, for every group in ``keep``.

    Raises:
        CompactionError: ``round_to`` is no positive integer.

    Example:
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 20), torch.nn.ReLU(), torch.nn.Linear(20, 2))
        >>> structure = sc.trace(net, examples=(torch.zeros(2, 4),))
        >>> rounded_keep(structure, {"0": torch.tensor([3, 5, 19])}, 8)["0"].tolist()
        [0, 1, 2, 3, 4, 5, 6, 19]
        >>> len(rounded_keep(structure, {"0": torch.arange(17)}, 8)["0"])  # 24 do not fit
        17
    """
    if type(round_to) is not int or round_to < 1:
        raise CompactionError(f"round_to={round_to!r}; expected a positive integer such as 8, or 1 for no rounding.")
    numbers = {group.name: number for number, group in enumerate(structure.groups)}
    fine = {name for name in keep if structure.group(name).kind == "inputs"}
    rounded: dict[str, torch.Tensor] = {}
    for name in keep:
        if name not in fine:
            group = structure.group(name)
            axes = _own_axes(structure.widths, numbers[name])
            rounded[name] = _filled(group, keep[name], np.arange(group.size), axes, round_to)
    if fine:
        before, after = (structure.plan({k: v for k, v in kept.items() if k not in fine}) for kept in (keep, rounded))
        for name in fine:
            group = structure.group(name)
            live = np.intersect1d(_offered(group, before), keep[name].detach().cpu().numpy())
            one_each = (Axis(0, ((0, 1),)),)
            rounded[name] = _filled(group, torch.from_numpy(live), _offered(group, after), one_each, round_to)
    return {name: rounded[name] for name in keep}


def _own_axes(widths: tuple[Axis, ...], group: int) -> tuple[Axis, ...]:
    """The widths that only this group changes; where there is none, its part of those that it shares."""
    mine = [axis for axis in widths if any(number == group for number, _ in axis.per_group)]
    alone = [axis for axis in mine if len(axis.per_group) == 1]
    shared = [Axis(0, ((group, times),)) for axis in mine for number, times in axis.per_group if number == group]
    return tuple(dict.fromkeys(alone or shared))


def _filled(
    group: Group, kept: torch.Tensor, candidates: NDArray[np.int64], axes: tuple[Axis, ...], round_to: int
) -> torch.Tensor:
    """The kept ones and as many of the first candidates as make the most axes multiples."""
    stays = np.zeros(group.size, dtype=bool)
    stays[kept.detach().cpu().numpy() if len(kept) else candidates[: group.least]] = True
    counts = np.arange(stays.sum(), max(len(candidates), stays.sum()) + 1)
    fits = np.zeros(len(counts), dtype=np.int64)
    for axis in axes:
        fits += (axis.fixed + axis.per_group[0][1] * counts) % round_to == 0
    closed = candidates[~stays[candidates]]
    stays[closed[: int(np.argmax(fits))]] = True
    return torch.from_numpy(np.flatnonzero(stays))


def _offered(group: Group, plan: CutPlan) -> NDArray[np.int64]:
    """The inputs of a layer that the groups of its producers leave, positions in the dense weight."""
    (member,) = group.members
    left = plan.tensors.get(member.tensor, {}).get(member.dim)
    return np.arange(group.size) if left is None else np.array(left, dtype=np.int64)
