"""What modules return, and which units lie along its dimensions.

Index conventions: ``S`` positions of one dimension of an output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from secateur.structure.groups import Group, Keep
from secateur.structure.ids import Label

if TYPE_CHECKING:
    from secateur.structure.grouping import Grouping

__all__ = ["At", "Output", "outputs_of", "same_units", "translated"]

#: By group name the unit at each position, int64 ``(S,)``, -1 where there is none of this group.
At = Mapping[str, NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class Output:
    """What a module returned, where that is one tensor.

    Args:
        module: its path.
        shape: of the tensor, at the first call, for the first example.
        units: for each dimension that units lie along, which; at the first call.
        others: the same at each further call where it was not the same.
    """

    module: str
    shape: tuple[int, ...]
    units: Mapping[int, At] = field(default_factory=dict)
    others: tuple[Mapping[int, At], ...] = ()

    def kept(self, dim: int, keep: Keep) -> NDArray[np.int64]:
        """Positions along a dimension that are left when only the kept units stay."""
        stays = np.ones(self.shape[dim], dtype=bool)
        for name, unit in self.units.get(dim, {}).items():
            if name in keep:
                stays &= (unit < 0) | np.isin(unit, keep[name].detach().cpu().numpy())
        return np.flatnonzero(stays)


def outputs_of(returned: Mapping[str, Sequence[Label]], grouping: Grouping) -> tuple[Output, ...]:
    """What modules returned in a recorded run, call by call, with the units that grouping made of the ids."""
    found = []
    for module, labels in returned.items():
        first, *further = ({dim: at for dim, at in _units(label, grouping) if at} for label in labels)
        others = tuple(units for units in further if not _alike(units, first))
        found.append(Output(module, labels[0].shape, first, others))
    return tuple(found)


def _alike(one: Mapping[int, At], other: Mapping[int, At]) -> bool:
    return one.keys() == other.keys() and all(same_units(at, other[dim]) for dim, at in one.items())


def same_units(one: At, other: At) -> bool:
    """Whether the same units lie at the same positions."""
    return one.keys() == other.keys() and all(np.array_equal(unit, other[name]) for name, unit in one.items())


def _units(label: Label, grouping: Grouping) -> list[tuple[int, At]]:
    """The dimensions of which each position is one unit's, whatever the positions along other dimensions."""
    found: list[tuple[int, At]] = []
    names = [group.name for group in grouping.structure.groups]
    for factor in label.factors:
        component = grouping.solution.component[factor.ids]
        group = np.where(factor.ids == 0, -1, grouping.group_of[component])
        for axis, dim in enumerate(factor.dims):
            size = factor.ids.shape[axis]
            groups, parts = (np.moveaxis(array, axis, 0).reshape(size, -1) for array in (group, component))
            if size and (groups == groups[:, :1]).all() and (parts == parts[:, :1]).all():
                mine, unit = groups[:, 0], grouping.unit_of[parts[:, 0]]
                numbers = [number for number in np.unique(mine).tolist() if number >= 0]
                found.append((dim, {names[number]: np.where(mine == number, unit, -1) for number in numbers}))
    return found


def translated(
    outputs: Sequence[Output], left: Mapping[str, NDArray[np.int64]], custom: Sequence[Group]
) -> tuple[Output, ...]:
    """The outputs in units of a structure with custom groups.

    Args:
        outputs: in units of the structure before.
        left: by group of that, its units that no custom group took.
        custom: the groups that took the others.
    """

    def over(at: At) -> At:
        found: dict[str, NDArray[np.int64]] = {}
        for name, unit in at.items():
            moves = [(name, np.arange(len(left[name])), left[name])] if len(left[name]) > 1 else []
            for group in custom:
                for known, units in group.parts:
                    if known == name:
                        # Of a single unit the first traced one always stays.
                        parts = units if group.least else units[:, 1:]
                        moves.append((group.name, np.repeat(np.arange(len(parts)), parts.shape[1]), parts.ravel()))
            for new, numbers, old in moves:
                place = np.full(max(int(unit.max()), int(old.max(initial=0))) + 2, -1, dtype=np.int64)
                place[old] = numbers
                mine = place[unit]  # -1 reads the last entry, which is -1
                if (mine >= 0).any():
                    found[new] = np.where(mine >= 0, mine, found.get(new, np.full(len(unit), -1, dtype=np.int64)))
        return found

    def moved(units: Mapping[int, At]) -> dict[int, At]:
        return {dim: now for dim, at in units.items() if (now := over(at))}

    return tuple(
        replace(one, units=moved(one.units), others=tuple(moved(units) for units in one.others)) for one in outputs
    )
