"""Whole residual branches as units: a closed one becomes a module that returns zeros without computing.

A branch is a module that returns one tensor, as large as the first that it takes, which the model adds to what it took.
Its gate acts on all that its last layer computes its output with: the rows of a linear or convolutional layer and its
bias, or the affine parameters of a normalisation. The branch's output is the gate times what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from secateur.errors import GateError
from secateur.pruning.rule import Rule
from secateur.structure.groups import Axis, Group, Member, Term
from secateur.structure.structure import Structure
from secateur.structure.tensors import listed

__all__ = ["blocks", "branch_of", "with_blocks"]

#: Layers whose output is proportional to their parameters.
LAST = (nn.Linear, _ConvNd, _BatchNorm, nn.LayerNorm, nn.GroupNorm)
_END = ".block"


def blocks(model: nn.Module, structure: Structure, rule: Rule) -> tuple[Group, ...]:
    """One group of a single unit for each module that ``where=`` names, or for each branch that the trace found.

    Raises:
        GateError: nothing is found, or a module is no branch that can go.
    """
    branches = set(structure.branches)
    if rule.where is None and not branches:
        raise GateError(
            'Rule(units="blocks"): the trace found no module whose output is added to the stream that it reads; name'
            ' the modules that are residual branches: where="*.mlp"'
        )
    found: list[Group] = []
    problems: list[str] = []
    for path, module in model.named_modules():
        if not path or (rule.where is None and path not in branches):
            continue
        last = [(name, layer) for name, layer in module.named_modules(prefix=path) if list(layer.parameters(False))]
        members = tuple(
            Member(name, 0, np.arange(structure.shapes[name][0]).reshape(1, -1), consumer=False, carrier=True)
            for name in (f"{last[-1][0]}.{key}" for key in ("weight", "bias") if last)
            if len(structure.shapes.get(name, ()))
        )
        group = Group(f"{path}{_END}", 1, members, kind="blocks")
        if not rule.takes(group, module, path):
            continue
        problem = _problem(structure, path, last[-1] if last else None)
        if problem:
            problems.append(f"{path}: {problem}")
        else:
            found.append(group)
    if problems and (rule.where is not None or not found):
        raise GateError(f"{rule}: these modules are no branches that can go: {listed(problems)}. Narrow where=")
    if not found:
        raise GateError(f"{rule} finds no module of that name or class")
    return tuple(found)


def _problem(structure: Structure, path: str, last: tuple[str, nn.Module] | None) -> str:
    if last is None:
        return "it has no parameters"
    name, layer = last
    if not isinstance(layer, LAST):
        return (
            f"its last layer with parameters, {name}, is a {type(layer).__name__}; expected a linear or convolutional "
            "layer, or a normalisation"
        )
    if isinstance(layer, _ConvNd) and layer.transposed:
        return f"its last layer, {name}, is a transposed convolution"
    if f"{name}.weight" not in structure.shapes:
        return f"the weight of its last layer, {name}, is missing or tied"
    below = f"{path}."
    for alias, first in structure.aliases.items():
        if alias.startswith(below) != first.startswith(below):
            return f"{alias} and {first} are one tensor, of which one name is outside the branch"
    return ""


def branch_of(group: Group) -> str:
    """Path of the module that a group of kind ``"blocks"`` is."""
    return group.name.removesuffix(_END)


def with_blocks(structure: Structure, groups: Sequence[Group]) -> Structure:
    """The structure with blocks behind its own groups: what lies in a closed one costs nothing."""
    axes = list(structure.axes)
    kinds = [list(terms) for terms in structure.terms]
    for number, group in enumerate(groups, start=len(structure.groups)):
        path = branch_of(group)
        kinds = [
            [
                Term(term.coefficient, (*term.axes, len(axes)), term.label)
                if term.label == path or term.label.startswith(f"{path}.")
                else term
                for term in known
            ]
            for known in kinds
        ]
        axes.append(Axis(0, ((number, 1),)))
    params, macs, latency = (tuple(terms) for terms in kinds)
    return replace(
        structure,
        groups=(*structure.groups, *groups),
        axes=tuple(axes),
        param_terms=params,
        mac_terms=macs,
        latency_terms=latency,
    )
