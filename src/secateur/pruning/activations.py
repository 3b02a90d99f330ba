"""Positions of what modules return as units, for gates on activations.

Index conventions: ``U`` units, ``m`` positions of each, ``S`` positions of the output's dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from secateur.errors import GateError
from secateur.pruning.rule import ACTIVATIONS, Rule
from secateur.structure.groups import Group, Member
from secateur.structure.outputs import Output
from secateur.structure.structure import Structure
from secateur.structure.tensors import listed

__all__ = ["Link", "activations", "candidates", "fitted", "module_of", "output_group", "output_of"]

_CALL = "()"


class Link(NamedTuple):
    """The group of the trace that an activation group's units are.

    Args:
        group: its name.
        units: int64 ``(U,)``, the unit of that which each of the group's units is.
    """

    group: str
    units: NDArray[np.int64]


def output_group(module: str, units: Sequence[Sequence[int]] | Any, *, dim: int = 1, name: str = "") -> Group:
    """A group over what a module returns: unit i is the positions along ``dim`` that row i names.

    For ``sc.Rule(units=[group])``. Positions that no row names have no gate.

    Args:
        module: its path; it must return one tensor.
        units: integers ``(U, m)``, one row for each unit.
        dim: the dimension of the output; 0 is the batch.
        name: of the group; made from the module's path by default.

    Raises:
        GateError: the rows are no integers of one length, or a position is named twice.

    Example:
        >>> import torch, secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
        >>> halves = sc.output_group("1", [[0, 1, 2], [3, 4, 5]])
        >>> pruner = sc.attach(net, examples=(torch.zeros(2, 4),), gates=[sc.Rule(units=[halves])])
        >>> pruner.groups[0].name, pruner.groups[0].size
        ('1()', 2)
    """
    try:
        rows = np.asarray(units)
    except ValueError:  # rows of different lengths
        rows = np.zeros(0)
    label = name or f"{module}{_CALL}"
    if rows.ndim != 2 or not rows.size or rows.dtype.kind not in "iu":
        raise GateError(f"{label}: expected integers (units, positions of each): one row for each unit, equally long")
    if len(np.unique(rows)) < rows.size or rows.min() < 0:
        raise GateError(f"{label}: a position is negative or named twice")
    member = Member(f"{module}{_CALL}", dim, rows.astype(np.int64), consumer=False, carrier=False)
    return Group(label, len(rows), (member,), kind=ACTIVATIONS)


def activations(model: nn.Module, structure: Structure, rule: Rule) -> tuple[Group, ...]:
    """One group for each module that ``where=`` names, with one unit for each position of ``dim`` of its output.

    Raises:
        GateError: ``where=`` is missing or finds nothing, or a module returns no such tensor.
    """
    if rule.where is None:
        raise GateError('Rule(units="activations") needs where=, the modules whose output gets gates: where="*.act"')
    found: list[Group] = []
    problems: list[str] = []
    for path, module in model.named_modules():
        if not path or not rule.takes(Group(f"{path}{_CALL}", 0, (), kind=ACTIVATIONS), module, path):
            continue
        try:
            output = output_of(structure, path)
            size = output.shape[_dim(output, rule.dim)]
            name = f"{path}{_CALL}" if rule.dim == 1 else f"{path}{_CALL} along {rule.dim}"
            found.append(fitted(structure, output_group(path, np.arange(size)[:, None], dim=rule.dim, name=name)))
        except GateError as error:
            problems.append(str(error))
    if problems:
        raise GateError(f"{rule}: {listed(problems)}. Narrow where=")
    if not found:
        raise GateError(f"{rule} finds no module of that name or class")
    return tuple(found)


def fitted(structure: Structure, group: Group) -> Group:
    """The group with its dimension counted from the first, if the module returns what it needs.

    Raises:
        GateError: it does not.
    """
    (member,) = group.members
    output = output_of(structure, module_of(group))
    dim = _dim(output, member.dim)
    if member.index.max() >= output.shape[dim]:
        raise GateError(
            f"{group.name}: names position {member.index.max()}, but dimension {dim} of the output, of shape "
            f"{output.shape}, has {output.shape[dim]}"
        )
    return replace(group, members=(replace(member, dim=dim),))


def output_of(structure: Structure, path: str) -> Output:
    """What the trace saw a module return.

    Raises:
        GateError: that was not one tensor.
    """
    output = next((one for one in structure.outputs if one.module == path), None)
    if output is None:
        raise GateError(f"{path}: the trace saw it return no single tensor; gate a module in it that does")
    return output


def module_of(group: Group) -> str:
    """Path of the module whose output a group of kind ``"activations"`` is about."""
    return group.members[0].tensor.removesuffix(_CALL)


def candidates(structure: Structure, groups: Sequence[Group]) -> dict[str, Link]:
    """By activation group, the group of the trace whose units lie just where its own do, if there is one.

    No two have the same, and none has one that has gates of its own: there the two multiply.

    Args:
        structure: what the trace found.
        groups: every gated group.
    """
    free = {group.name for group in structure.groups} - {group.name for group in groups}
    found: dict[str, Link] = {}
    for group in groups:
        if group.kind != ACTIVATIONS:
            continue
        (member,) = group.members
        for name, unit in output_of(structure, module_of(group)).units.get(member.dim, {}).items():
            mine = unit[member.index]
            whole = member.index.size == (unit >= 0).sum() and group.size == structure.group(name).size
            if name in free and whole and (mine == mine[:, :1]).all() and (mine >= 0).all():
                found[group.name] = Link(name, mine[:, 0])
                free.discard(name)
                break
    return found


def _dim(output: Output, dim: int) -> int:
    """The dimension, counted from the first."""
    rank = len(output.shape)
    place = dim + rank if dim < 0 else dim
    if not 1 <= place < rank:
        raise GateError(
            f"{output.module}: dimension {dim} of an output of shape {output.shape}; expected one in [1, {rank}), for"
            " dimension 0 is the batch"
        )
    return place
