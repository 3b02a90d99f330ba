"""Single weights as units: a gate on every scalar of a weight, the finest there is, and how they count.

Index conventions: ``N`` weights of one tensor, in the order of its flattened values; ``S`` size of one of its
dimensions; ``C`` coarse units, those of all structured and input groups in a row; the *extended* vector ``(C + 1,)``
ends in a constant 1.

A weight counts if its own gate is open and the units that own its row and its column are; expected, that is the product
of their chances. Multiply-accumulates count whole units and inputs only: no dense kernel leaves out a single weight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.errors import GateError
from secateur.pruning.inputs import input_group, refusal
from secateur.pruning.rule import Rule
from secateur.structure.groups import FLAT, Axis, Group, Member, Term
from secateur.structure.structure import Structure
from secateur.structure.tensors import listed, slots_of

__all__ = ["Scalars", "columns", "weights", "with_weights"]


def weights(model: nn.Module, structure: Structure, rule: Rule) -> tuple[Group, ...]:
    """One group for each weight tensor that the rule is for, with one unit for each of its scalars.

    That is every parameter of two or more dimensions that a module multiplies its input with: those of linear,
    convolutional, recurrent and attention layers and of a user's own. Patterns are for names of
    tensors or layers.

    Raises:
        GateError: nothing is found.
    """
    multiply = {term.label for term in structure.mac_terms}
    taken = {group.name for group in structure.groups}
    found: list[Group] = []
    others: list[str] = []
    for name, slot in slots_of(model).items():
        path = name.rpartition(".")[0]
        is_weight = isinstance(slot.tensor, nn.Parameter) and slot.tensor.is_floating_point() and slot.tensor.dim() > 1
        if not is_weight or name not in structure.shapes or path not in multiply:
            continue
        size = math.prod(structure.shapes[name])
        index = np.arange(size, dtype=np.int64).reshape(-1, 1)
        member = Member(name, FLAT, index, consumer=True, carrier=False)
        # Units that several tensors of one module carry, as in an LSTM, are named after the first of these.
        group = Group(f"{name}.weights" if name in taken else name, size, (member,), kind="weights")
        if rule.takes(group, slot.owner, name, path):
            found.append(group)
        else:
            others.append(name)
    if not found:
        raise GateError(f"{rule} finds nothing; the weights are {listed(others) or 'none'}")
    return tuple(found)


def columns(model: nn.Module, structure: Structure, gated: Sequence[Group]) -> tuple[Group, ...]:
    """Input groups, without gates, of the gated weights' layers that can select their inputs: all-zero columns go.

    Args:
        model: plain.
        structure: of the model.
        gated: every group with a gate.
    """
    taken = {group.name for group in gated}
    tensors = {group.members[0].tensor for group in gated if group.kind == "weights"}
    found = []
    for path, layer in model.named_modules():
        tensor = f"{path}.weight" if path else "weight"
        if tensor in tensors and not refusal(structure, path, layer):
            group = input_group(path, layer)
            if group.name not in taken:
                found.append(group)
    return tuple(found)


def with_weights(structure: Structure, groups: Sequence[Group]) -> Structure:
    """The structure, for counting only, with groups of weights behind its own: their parameters are the open ones."""
    if not groups:
        return structure
    axes = list(structure.axes)
    gated = {group.members[0].tensor for group in groups}
    terms = [term for term in structure.param_terms if term.label not in gated]
    for number, group in enumerate(groups, start=len(structure.groups)):
        tensor = group.members[0].tensor
        terms.append(Term(1.0, (len(axes), *_blocks_of(structure, tensor)), tensor))
        axes.append(Axis(0, ((number, 1),)))
    return replace(structure, groups=(*structure.groups, *groups), axes=tuple(axes), param_terms=tuple(terms))


def _blocks_of(structure: Structure, tensor: str) -> list[int]:
    """The axes of the blocks that a tensor lies in."""
    blocks = {number for number, group in enumerate(structure.groups) if group.kind == "blocks"}
    term = next(term for term in structure.param_terms if term.label == tensor)
    return [axis for axis in term.axes if blocks.intersection(group for group, _ in structure.axes[axis].per_group)]


class Scalars:
    """The weights of one tensor, and the coarse units that own its rows and columns.

    Args:
        group: of kind ``"weights"``.
        coarse: structured groups, then input groups.
        offsets: position of each coarse group's first unit.
        shape: of the tensor.

    Attributes:
        tensor: its name.
        size: ``N``.
        owners: by dimension the coarse unit of each position, positions in the extended coarse units, ``(S,)``.
    """

    def __init__(self, group: Group, coarse: Sequence[Group], offsets: Sequence[int], shape: tuple[int, ...]) -> None:
        self.tensor = group.members[0].tensor
        self.size = group.size
        self._shape = shape
        none = sum(one.size for one in coarse)
        unit_of: dict[int, NDArray[np.int64]] = {}
        owner_of: dict[int, NDArray[np.int64]] = {}
        for one, start in zip(coarse, offsets, strict=True):
            if one.kind == "blocks":  # all of the tensor goes with it, which its cost says
                continue
            for member in one.members:
                if member.tensor == self.tensor and member.dim != FLAT:
                    maps = (unit_of,) if one.kind == "inputs" else (unit_of, owner_of)
                    for found in maps:
                        row = found.setdefault(member.dim, np.full(shape[member.dim], none, dtype=np.int64))
                        row[member.index.reshape(-1)] = np.repeat(
                            np.arange(start, start + one.size), member.index.shape[1]
                        )
        self.owners = {dim: torch.from_numpy(unit_of[dim]) for dim in sorted(unit_of)}
        #: by dimension where a later dimension has the same owner, which counts once: z^2 = z
        self._again: dict[int, Tensor] = {}
        for first, second in itertools.combinations(sorted(owner_of), 2):
            same = (owner_of[first][:, None] == owner_of[second][None, :]) & (owner_of[first][:, None] != none)
            if same.any():
                view = [size if dim in (first, second) else 1 for dim, size in enumerate(shape)]
                mask = torch.from_numpy(same).view(view)
                self._again[first] = mask | self._again[first] if first in self._again else mask

    def owned(self, coarse: Tensor) -> Tensor:
        """Product of the owners' chances for every weight, of the tensor's shape, from extended ones ``(C + 1,)``."""
        product = coarse.new_ones([1] * len(self._shape))
        for dim, owners in self.owners.items():
            factor = coarse.index_select(0, owners.to(coarse.device))
            factor = factor.view([-1 if other == dim else 1 for other in range(len(self._shape))])
            if dim in self._again:
                factor = torch.where(self._again[dim].to(coarse.device), torch.ones_like(factor), factor)
            product = product * factor
        return product.expand(self._shape)

    def chances(self, own: Tensor, coarse: Tensor) -> Tensor:
        """Chance that each weight counts, ``(N,)``, from its own gate's ``(N,)`` and the owners', extended."""
        return (own.view(self._shape) * self.owned(coarse)).reshape(-1)

    def used(self, is_open: Tensor, dim: int) -> Tensor:
        """Positions of one dimension that have an open weight, bool ``(S,)``, from bool ``(N,)``."""
        others = [other for other in range(len(self._shape)) if other != dim]
        # The largest of bytes: to ask whether any is True takes torch twenty times as long.
        return is_open.view(torch.uint8).view(self._shape).amax(others).bool() if others else is_open

    def zero_closed_(self, weight: Tensor, is_open: Tensor) -> None:
        """Write 0.0 into a weight where it does not count, in place."""
        with torch.no_grad():
            weight.masked_fill_(~is_open.view(self._shape).to(weight.device), 0.0)
