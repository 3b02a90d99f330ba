"""From gates to the units that a cost counts, and back.

Index conventions: ``Z`` gates of the model in a row, rule by rule; the *extended* gates ``(Z + 1,)`` end in a constant
1; ``U`` counted units: those of all structured groups, gated or not, then those of the input groups that have gates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.gates import Layout, Method
from secateur.gateset import extended
from secateur.inputs import owners, with_inputs
from secateur.rule import Chosen
from secateur.structure.groups import Group, Keep, Structure
from secateur.structure.rounding import rounded_keep

__all__ = ["Units"]


class Units:
    """Which gate acts on which counted unit.

    An input that a structured unit owns is open if both its own gate and the owner's are. A structured unit is open if
    its gate is, and if, where every weight that reads it has gates on single inputs, one of these inputs is.

    Args:
        structure: what the trace found.
        chosen: what each rule gates.

    Attributes:
        groups: the gated groups, in the order of their gates, ``Z`` gates together.
        inputs: those of them that are single inputs of a layer.
        counted: the structure that costs are counted on, ``U`` units together.
    """

    def __init__(self, structure: Structure, chosen: Sequence[Chosen]) -> None:
        self.structure = structure
        self.groups: tuple[Group, ...] = tuple(group for one in chosen for group in one.groups)
        self.inputs = fine = tuple(group for group in self.groups if group.kind == "inputs")
        self.counted = with_inputs(structure, fine)
        gates = Layout(tuple(group.size for group in self.groups))
        units = Layout(tuple(group.size for group in self.counted.groups))
        self.sizes = gates.sizes
        rules = Layout(tuple(sum(group.size for group in one.groups) for one in chosen))
        self._rules: tuple[slice, ...] = rules.slices
        self._one_scale = all(_scale(one.method) == _scale(chosen[0].method) for one in chosen)
        #: for each unit the gates that multiply, positions in the extended gates, (2, U)
        sources = np.full((2, units.total), gates.total, dtype=np.int64)
        #: for each gate its unit, (Z,)
        targets = np.empty(gates.total, dtype=np.int64)
        starts = {group.name: start for group, start in zip(self.counted.groups, units.offsets, strict=True)}
        for group, start in zip(self.groups, gates.offsets, strict=True):
            own = np.arange(group.size)
            sources[0, starts[group.name] + own] = start + own
            targets[start + own] = starts[group.name] + own
        #: for each unit the one that owns it, itself where none does, (U,)
        owner_of = np.arange(units.total)
        for group in fine:
            owner = owners(structure, group, units.offsets)
            has = np.flatnonzero(owner >= 0)
            sources[1, starts[group.name] + has] = sources[0, owner[has]]
            owner_of[starts[group.name] + has] = owner[has]
        self._owner_of = torch.from_numpy(owner_of)
        self._owned = self._owner_of != torch.arange(units.total)
        self._sources = torch.from_numpy(sources)
        self._targets = torch.from_numpy(targets)
        self._read, self._inputs = (torch.from_numpy(part) for part in self._only_inputs(fine, starts, units.offsets))
        self._read_once = torch.unique(self._read)

    def chances(self, prob_open: Tensor) -> Tensor:
        """Open chance of every unit ``(U,)`` from that of every gate ``(Z,)``; differentiable.

        A structured unit whose inputs all have gates counts with its own gate's chance, which is an upper bound.
        """
        sources = self._sources.to(prob_open.device)
        chances = extended(prob_open)
        return chances.index_select(0, sources[0]) * chances.index_select(0, sources[1])

    def open(self, gates: Tensor) -> Tensor:
        """Which units are open, bool ``(U,)``, from the gates ``(Z,)`` in evaluation or which of them are open."""
        is_open = self.chances((gates != 0).to(torch.float32)) != 0
        if len(self._read):
            read, inputs, once = (part.to(is_open.device) for part in (self._read, self._inputs, self._read_once))
            count = torch.zeros(len(is_open), device=is_open.device).index_add(0, read, is_open[inputs].float())
            is_open[once] &= count[once] > 0
        return is_open

    def gates(self, is_open: Tensor) -> Tensor:
        """Which gates are open, bool ``(Z,)``, if exactly these units ``(U,)`` are."""
        return is_open.index_select(0, self._targets.to(is_open.device))

    def scores(self, scores: Tensor, is_open: Tensor) -> Tensor:
        """Order in which units are closed, ``(U,)``, from that of the gates ``(Z,)``.

        Infinite where flipping one unit alone has no effect: units without a gate, inputs whose owner is closed, and
        closed owners that only gated inputs read. Scores of different methods have no common scale, so their ranks
        within the rule are compared.

        Args:
            scores: ``(Z,)``, larger stays longer.
            is_open: bool ``(U,)``, on the same device.
        """
        if not self._one_scale:
            scores = torch.cat([_ranks(scores[part]) for part in self._rules])
        spread = scores.new_full((self._sources.shape[1],), torch.inf)
        spread = spread.index_copy(0, self._targets.to(scores.device), scores)
        owner, owned, once = (part.to(is_open.device) for part in (self._owner_of, self._owned, self._read_once))
        idle = ~is_open[owner] & owned
        idle[once] |= ~is_open[once]
        return spread.masked_fill(idle, torch.inf)

    def keep(self, is_open: Tensor) -> Keep:
        """Open units of every counted group that loses some, from bool ``(U,)``."""
        return {
            group.name: torch.nonzero(part).flatten()
            for group, part in self._parts(is_open.cpu())
            if not bool(part.all())
        }

    def stays(self, is_open: Tensor, round_to: int = 1) -> Tensor:
        """Units that a cut to the open ones leaves, bool ``(U,)``: one of a group that lost all, and what rounds up."""
        stays = is_open.cpu().clone()
        rounded = rounded_keep(self.counted, self.keep(stays), round_to)
        for group, part in self._parts(stays):
            if group.name in rounded:
                part.zero_()
                part[rounded[group.name]] = True
        return stays

    def flips(self, before: Tensor, after: Tensor) -> int:
        """How many units, bool ``(U,)``, were opened or closed; inputs that went with their owner are not counted."""
        flipped = before != after
        return int((flipped & ~(self._owned & flipped[self._owner_of])).sum())

    def by_group(self, is_open: Tensor) -> dict[str, tuple[int, int]]:
        """Open and all units of each counted group, from bool ``(U,)``."""
        return {group.name: (int(part.sum()), group.size) for group, part in self._parts(is_open)}

    def _parts(self, flat: Tensor) -> Iterator[tuple[Group, Tensor]]:
        """Each counted group with its part of a vector ``(U,)``, a view."""
        parts = flat.split([group.size for group in self.counted.groups])
        return zip(self.counted.groups, parts, strict=True)

    def _only_inputs(
        self, fine: Sequence[Group], starts: dict[str, int], offsets: Sequence[int]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pairs of a structured unit and an input of it, for units that only gated inputs read."""
        gated = {(group.members[0].tensor, group.members[0].dim): starts[group.name] for group in fine}
        read, inputs = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for group, start in zip(self.structure.groups, offsets, strict=False):
            if not group.at_producers and all((m.tensor, m.dim) in gated for m in group.consumers):
                for member in group.consumers:
                    read.append(np.repeat(np.arange(start, start + group.size), member.index.shape[1]))
                    inputs.append(gated[member.tensor, member.dim] + member.index.reshape(-1))
        return np.concatenate(read), np.concatenate(inputs)


def _scale(method: Method) -> dict[str, Any]:
    """What decides the scale of a method's scores: its settings but the start."""
    return {name: value for name, value in method.settings().items() if name != "init_open"} | {"name": method.name}


def _ranks(scores: Tensor) -> Tensor:
    """Ranks in [0, 1), ties by position."""
    order = scores.argsort(stable=True).argsort(stable=True)
    return order.to(scores.dtype) / max(len(order), 1)
