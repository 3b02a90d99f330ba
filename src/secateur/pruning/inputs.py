"""Single inputs of linear and convolutional layers as units: finer than a group, or where there is no group.

Index conventions: ``I`` positions of the contracted dimension of a layer's weight, which is its dimension 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd

from secateur.errors import GateError
from secateur.pruning.rule import Rule
from secateur.structure.groups import Axis, Group, Member, Term
from secateur.structure.structure import Structure
from secateur.structure.tensors import listed

__all__ = ["CONTRACTED", "input_group", "inputs", "layer_of", "owners", "refusal", "with_inputs"]

#: The dimension of a linear or convolutional weight along which it reads its input.
CONTRACTED = 1


def inputs(model: nn.Module, structure: Structure, rule: Rule) -> tuple[Group, ...]:
    """One group for each layer that the rule is for; unit i is position i of the layer's input.

    A closed input is an exact selection before the layer, so it may lie where the trace froze the dimension.

    Raises:
        GateError: no layer is found, or one that is asked for cannot select its inputs.
    """
    found: list[Group] = []
    refused: list[str] = []
    others: list[str] = []
    for path, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, _ConvNd)):
            continue
        group = input_group(path, layer)
        if not rule.takes(group, layer, path):
            others.append(path)
        elif problem := refusal(structure, path, layer):
            refused.append(f"{path}: {problem}")
        else:
            found.append(group)
    if refused and (rule.where is not None or not found):
        raise GateError(f"{rule}: these layers cannot select their inputs: {listed(refused)}. Narrow where=")
    if not found:
        raise GateError(f"{rule} finds nothing; the linear and convolutional layers are {listed(others) or 'none'}")
    return tuple(found)


def input_group(path: str, layer: nn.Module) -> Group:
    """The inputs of a linear or convolutional layer as a group."""
    assert isinstance(layer, (nn.Linear, _ConvNd))
    size = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    index = np.arange(size, dtype=np.int64).reshape(-1, 1)
    member = Member(f"{path}.weight" if path else "weight", CONTRACTED, index, consumer=True, carrier=False)
    return Group(f"{path}.inputs" if path else "inputs", size, (member,), kind="inputs")


def refusal(structure: Structure, path: str, layer: nn.Module) -> str:
    """Why a layer cannot select its inputs one by one; "" if it can."""
    tensor = f"{path}.weight" if path else "weight"
    if not isinstance(layer, (nn.Linear, _ConvNd)):
        return "it is neither linear nor a convolution"
    if isinstance(layer, _ConvNd) and layer.transposed:
        return "a transposed convolution reads its input along dimension 0"
    if isinstance(layer, _ConvNd) and layer.groups > 1:
        return f"its weight reads each input in one of {layer.groups} convolution groups only"
    if tensor not in structure.shapes:
        return "its weight is computed or tied, and so has another role elsewhere"
    if tensor in structure.aliases.values():
        return "its weight is tied, and so has another role elsewhere"
    is_read = any(term.label == path for term in structure.mac_terms)
    return "" if is_read else "the model's forward does not call it"


def layer_of(group: Group) -> str:
    """Path of the layer whose inputs a group is."""
    return group.members[0].tensor.rpartition(".")[0]


def owners(structure: Structure, group: Group, starts: Sequence[int]) -> NDArray[np.int64]:
    """For each input, the structured unit that it belongs to: int64 ``(I,)``, -1 for none.

    Args:
        structure: what the trace found.
        group: of kind ``"inputs"``.
        starts: position of each structured group's first unit.
    """
    owner = np.full(group.size, -1, dtype=np.int64)
    for start, structured in zip(starts, structure.groups, strict=False):
        for member in structured.members:
            if (member.tensor, member.dim) == (group.members[0].tensor, CONTRACTED):
                units = np.repeat(np.arange(start, start + structured.size), member.index.shape[1])
                owner[member.index.reshape(-1)] = units
    return owner


def with_inputs(structure: Structure, groups: Sequence[Group]) -> Structure:
    """The structure, for counting only, with input groups behind its own.

    Where an input group stands, the layer's parameters and multiply-accumulates count open inputs instead of open units
    of the groups that own them; an input is open if its own gate and its owner's are. So does its latency where that
    depends on owned inputs; other inputs save no time that was measured.
    """
    axes = list(structure.axes)
    terms = {"params": list(structure.param_terms), "macs": list(structure.mac_terms)}
    latency = list(structure.latency_terms)
    for offset, group in enumerate(groups):
        number = len(structure.groups) + offset
        dense = _dense_axis(structure, group)
        axes.append(Axis(0, ((number, 1),)))
        for kind, label in (("params", group.members[0].tensor), ("macs", layer_of(group))):
            rewritten = [
                _rewritten(term, dense, len(axes) - 1, axes) if term.label == label else term for term in terms[kind]
            ]
            if rewritten == terms[kind]:
                raise GateError(f"{label}: the structure counts no {kind} there; trace the model as it is now")
            terms[kind] = rewritten
        if dense.per_group:
            path = layer_of(group)
            latency = [_rewritten(t, dense, len(axes) - 1, axes) if t.label == path else t for t in latency]
    return replace(
        structure,
        groups=(*structure.groups, *groups),
        axes=tuple(axes),
        param_terms=tuple(terms["params"]),
        mac_terms=tuple(terms["macs"]),
        latency_terms=tuple(latency),
    )


def _dense_axis(structure: Structure, group: Group) -> Axis:
    """How the structure counts the inputs of a layer."""
    found: Counter[int] = Counter()
    for number, structured in enumerate(structure.groups):
        for member in structured.members:
            if (member.tensor, member.dim) == (group.members[0].tensor, CONTRACTED):
                found[number] += member.index.shape[1] - member.stays
    owned = sum(structure.groups[number].size * count for number, count in found.items())
    return Axis(group.size - owned, tuple(sorted((number, count) for number, count in found.items() if count)))


def _rewritten(term: Term, dense: Axis, axis: int, axes: Sequence[Axis]) -> Term:
    """The term with the layer's inputs counted by ``axis`` instead of by ``dense``."""
    if not dense.per_group:  # no unit could go there, so the size is in the coefficient
        return Term(term.coefficient / dense.fixed, (*term.axes, axis), term.label)
    for place, number in enumerate(term.axes):
        if axes[number] == dense:
            return Term(term.coefficient, (*term.axes[:place], axis, *term.axes[place + 1 :]), term.label)
    return term
