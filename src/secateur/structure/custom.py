"""Custom groups: units of a user's making, each a union of units that the trace found.

Index conventions: ``U`` custom units, ``k`` traced units of one group in each of them, ``m`` positions that a traced
unit has along one dimension of one tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from secateur.errors import TraceError
from secateur.structure.groups import Axis, Frozen, Group, Member
from secateur.structure.outputs import translated
from secateur.structure.tensors import listed

if TYPE_CHECKING:
    from secateur.structure.structure import Structure

__all__ = ["Parts", "custom_group", "regrouped"]

#: Units of groups by the group's name, or positions by a tensor's name and dimension; an array ``(U, any)`` each.
Parts: TypeAlias = "Mapping[str | tuple[str, int], Any]"

_LEFT_OVER = "is left over beside custom groups, and one of its kind must stay"


def custom_group(structure: Structure, name: str, parts: Parts) -> Group:
    """The group of that name whose unit i is the union of what row i of every part names; see `Structure.custom`."""
    rows = _rows(structure, name, parts)
    claims = _claims(structure, rows)
    found = _parts(structure, name, claims, len(next(iter(rows.values()))))
    members = _members(structure, found)
    group = Group(name, len(found[0][1]), members, kind="custom", parts=found)
    traced = [structure.group(known) for known, _ in found]
    if group.at_producers and not all(one.at_producers for one in traced):
        here = next(one.name for one in traced if one.at_producers)
        there = next(one.name for one in traced if not one.at_producers)
        raise TraceError(
            f"custom group {name!r}: an RMSNorm averages over the units of {here!r}, so they are closed where they "
            f"arise, and those of {there!r} where they are read; one gate cannot do both. Make a group of each."
        )
    return group


def regrouped(structure: Structure, groups: Sequence[Group]) -> Structure:
    """The structure with custom groups in place of the units that they are made of; see `Structure.regrouped`."""
    taken = _taken(structure, groups)
    new: list[Group] = []
    #: by traced group: positions that stay whatever is closed, and (new group, units of the old in each of its units)
    becomes: dict[int, tuple[int, list[tuple[int, int]]]] = {}
    frozen = list(structure.frozen)
    for number, group in enumerate(structure.groups):
        left = np.flatnonzero(~taken[group.name])
        becomes[number] = (0, [])
        if len(left) > 1:
            becomes[number][1].append((len(new), 1))
            new.append(group if len(left) == group.size else _subset(group, left))
        elif len(left):
            becomes[number] = (1, [])
            frozen += _left_over(group, int(left[0]))
        new += [custom for custom in groups if custom.parts[0][0] == group.name]
    numbers = {group.name: number for number, group in enumerate(structure.groups)}
    for custom in groups:
        place = next(number for number, group in enumerate(new) if group is custom)
        for known, units in custom.parts:
            fixed, shares = becomes[numbers[known]]
            stays = int(custom.least == 0)
            becomes[numbers[known]] = (fixed + stays, [*shares, (place, units.shape[1] - stays)])

    def axis(old: Axis) -> Axis:
        fixed = old.fixed
        counts: dict[int, int] = defaultdict(int)
        for number, times in old.per_group:
            fixed += becomes[number][0] * times
            for place, share in becomes[number][1]:
                counts[place] += share * times
        return replace(old, fixed=fixed, per_group=tuple(sorted((g, n) for g, n in counts.items() if n)))

    return replace(
        structure,
        groups=tuple(new),
        frozen=tuple(frozen),
        axes=tuple(axis(one) for one in structure.axes),
        attributes=tuple(replace(one, axis=axis(one.axis)) for one in structure.attributes),
        norms=tuple(replace(one, axis=axis(one.axis)) for one in structure.norms),
        outputs=translated(structure.outputs, {name: np.flatnonzero(~gone) for name, gone in taken.items()}, groups),
        widths=tuple(dict.fromkeys(wide for one in structure.widths if (wide := axis(one)).per_group)),
    )


_Rows = Mapping["str | tuple[str, int]", NDArray[np.int64]]


def _rows(structure: Structure, name: str, parts: Parts) -> _Rows:
    """The parts as arrays, each with one row for each unit."""
    if any(group.name == name for group in structure.groups):
        raise TraceError(f"custom group {name!r}: the structure has a group of that name; choose another one.")
    if not parts:
        raise TraceError(
            f"custom group {name!r}: no parts; expected what its units are made of, such as "
            '{"fc1": [[0, 1], [2, 3]]} (units of a group) or {("fc1.weight", 0): [[0, 1], [2, 3]]} (positions).'
        )
    rows: dict[str | tuple[str, int], NDArray[np.int64]] = {}
    problems: list[str] = []
    for key, given in parts.items():
        try:
            rows[key] = np.asarray(given)
        except ValueError:  # rows of different lengths
            rows[key] = np.zeros(0, dtype=np.int64)
        if problem := _problem(structure, key, rows[key]):
            problems.append(f"{key!r}: {problem}")
    lengths = {len(array) for array in rows.values()}
    if not problems and len(lengths) > 1:
        problems.append(
            f"its parts have {', '.join(map(str, sorted(lengths)))} rows; expected one for each unit in all"
        )
    if problems:
        raise TraceError(f"custom group {name!r}: {listed(problems)}.")
    return rows


def _problem(structure: Structure, key: object, array: NDArray[Any]) -> str:
    """What is wrong with one part; "" where nothing is."""
    size, what = _extent(structure, key)
    if not what and isinstance(key, str):
        hint = ' (a tensor is named with its dimension: ("fc1.weight", 0))' if key in structure.shapes else ""
        return f"no such group{hint}; the groups are {listed([group.name for group in structure.groups]) or 'none'}"
    if not what:
        return "expected a group's name, or the name of a parameter or buffer and one of its dimensions"
    if array.ndim != 2 or not array.size or array.dtype.kind not in "iu":
        return f"expected integers (units, {what} of each): one row for each unit, all rows equally long"
    if array.min() < 0 or array.max() >= size:
        return f"{what} from {array.min()} to {array.max()}, expected them in [0, {size})"
    return "" if len(np.unique(array)) == array.size else "a number is named twice"


def _extent(structure: Structure, key: object) -> tuple[int, str]:
    """How many things there are to name under a key, and what they are; "" where it names nothing."""
    if isinstance(key, str):
        size = next((group.size for group in structure.groups if group.name == key and group.kind != "inputs"), 0)
        return size, "units" if size else ""
    if isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], str) and isinstance(key[1], int):
        shape = structure.shapes.get(structure.aliases.get(key[0], key[0]), ())
        if 0 <= key[1] < len(shape):
            return shape[key[1]], "positions"
    return 0, ""


def _claims(structure: Structure, rows: _Rows) -> list[dict[tuple[str, int], str]]:
    """For each custom unit the traced units that it is made of, with the key that named them."""
    claims: list[dict[tuple[str, int], str]] = [{} for _ in range(len(next(iter(rows.values()))))]
    for key, array in rows.items():
        if isinstance(key, str):
            for mine, row in zip(claims, array.tolist(), strict=True):
                mine.update(((key, unit), key) for unit in row)
        else:
            for number, group, unit in _whole_units(structure, key, array):
                claims[number][group, unit] = str(key)
    return claims


def _whole_units(
    structure: Structure, key: tuple[str, int], array: NDArray[np.int64]
) -> Iterator[tuple[int, str, int]]:
    """Rows, and the traced units that own the positions ``(U, any)`` of one tensor dimension that they name.

    Raises:
        TraceError: a position is frozen, or a unit has more positions there than one row names.
    """
    tensor, dim = structure.aliases.get(key[0], key[0]), key[1]
    owner = np.full(structure.shapes[tensor][dim], -1, dtype=np.int64)
    units: list[tuple[str, int, NDArray[np.int64]]] = []
    for group in structure.groups:
        for member in group.members:
            if (member.tensor, member.dim) == (tensor, dim):
                owner[member.index] = np.arange(len(units), len(units) + group.size)[:, None]
                units += [(group.name, unit, index) for unit, index in enumerate(member.index)]
    owned = owner[array]
    if (owned < 0).any():
        reasons = [one for one in structure.frozen if (one.tensor, one.dim) == (tensor, dim)]
        why = "; ".join(dict.fromkeys(f"{one.reason}{one.place}" for one in reasons)) or "no unit owns it"
        raise TraceError(
            f"positions {_short(array[owned < 0])} along dimension {dim} of {key[0]} are frozen: each {why}. A custom "
            "unit is a union of whole traced units."
        )
    pairs, named = np.unique(np.arange(len(array))[:, None] * len(units) + owned, return_counts=True)
    for pair, count in zip(pairs.tolist(), named.tolist(), strict=True):
        number, (name, unit, index) = pair // len(units), units[pair % len(units)]
        if count < len(index):
            raise TraceError(
                f"unit {number} splits unit {unit} of {name!r}: it names {count} of the positions {_short(index)} that "
                f"this owns along dimension {dim} of {key[0]}, which go together or not at all. A custom unit is a "
                "union of whole traced units."
            )
        yield number, name, unit


def _parts(
    structure: Structure, name: str, claims: list[dict[tuple[str, int], str]], n: int
) -> tuple[tuple[str, NDArray[np.int64]], ...]:
    """The traced groups in the structure's order, each with its units ``(U, k)`` in every custom unit."""
    owner: dict[tuple[str, int], int] = {}
    for number, mine in enumerate(claims):
        for (known, unit), key in mine.items():
            if owner.setdefault((known, unit), number) != number:
                raise TraceError(
                    f"custom group {name!r}: unit {unit} of {known!r} is in its unit {owner[known, unit]} and in its "
                    f"unit {number} (named by {key}); expected it in one of them."
                )
    found = []
    for group in structure.groups:
        units = [sorted(unit for known, unit in mine if known == group.name) for mine in claims]
        counts = sorted({len(one) for one in units})
        if counts == [0]:
            continue
        if len(counts) > 1:
            raise TraceError(
                f"custom group {name!r}: its units hold from {counts[0]} to {counts[-1]} units of {group.name!r}; "
                "those of one group are alike, for a cost counts them. Make one group for each size."
            )
        found.append((group.name, np.array(units, dtype=np.int64)))
    if n == 1 and all(units.shape[1] == 1 for _, units in found):
        raise TraceError(
            f"custom group {name!r}: its only unit holds one unit of {listed([known for known, _ in found])}, and one "
            "of each kind must stay; name more of them."
        )
    return tuple(found)


def _members(structure: Structure, parts: tuple[tuple[str, NDArray[np.int64]], ...]) -> tuple[Member, ...]:
    """Every slice of every part; what lies along one dimension of one tensor in one role is one member."""
    pieces: dict[tuple[Any, ...], list[NDArray[np.int64]]] = defaultdict(list)
    patterns: dict[tuple[Any, ...], Member] = {}
    for known, units in parts:
        for member in structure.group(known).members:
            key = (member.tensor, member.dim, member.consumer, member.carrier, member.rescaled)
            patterns.setdefault(key, member)
            pieces[key].append(member.index[units])
    return tuple(replace(patterns[key], **_index(arrays)) for key, arrays in pieces.items())


def _index(arrays: list[NDArray[np.int64]]) -> dict[str, Any]:
    """Positions ``(U, sum of k m)`` from arrays ``(U, k, m)``; of a single unit, those that stay come first."""
    if len(arrays[0]) > 1:
        return {"index": np.sort(np.concatenate([one.reshape(len(one), -1) for one in arrays], axis=1))}
    first = np.concatenate([one[:, 0] for one in arrays], axis=1)
    rest = np.concatenate([one[:, 1:].reshape(1, -1) for one in arrays], axis=1)
    return {"index": np.concatenate([first, rest], axis=1), "stays": first.shape[1]}


def _taken(structure: Structure, groups: Sequence[Group]) -> dict[str, NDArray[np.bool_]]:
    """Which traced units custom groups take, by traced group; after all that can be wrong has been looked for."""
    taken = {group.name: np.zeros(group.size, dtype=bool) for group in structure.groups}
    by: dict[tuple[str, int], str] = {}
    names: set[str] = set()
    for custom in groups:
        if custom.kind != "custom" or not custom.parts:
            raise TraceError(f"{custom.name!r} is no custom group; make one with structure.custom(name, parts).")
        if custom.name in names:
            raise TraceError(f"two custom groups are named {custom.name!r}; expected names of their own.")
        names.add(custom.name)
        again = custom_group(structure, custom.name, dict(custom.parts))
        fits = len(again.members) == len(custom.members) and all(
            (a.tensor, a.dim) == (b.tensor, b.dim) and np.array_equal(a.index, b.index)
            for a, b in zip(again.members, custom.members, strict=True)
        )
        if not fits:
            raise TraceError(
                f"custom group {custom.name!r} was made from another structure; make it anew from this one, and give "
                "all custom groups at once."
            )
        for known, units in custom.parts:
            for unit in units.ravel().tolist():
                if (known, unit) in by:
                    raise TraceError(
                        f"unit {unit} of {known!r} is in the custom groups {by[known, unit]!r} and {custom.name!r}; "
                        "expected it in one of them."
                    )
                by[known, unit] = custom.name
            taken[known][units.ravel()] = True
    return taken


def _subset(group: Group, units: NDArray[np.int64]) -> Group:
    members = tuple(replace(member, index=member.index[units]) for member in group.members)
    return replace(group, size=len(units), members=members)


def _left_over(group: Group, unit: int) -> list[Frozen]:
    return [Frozen(member.tensor, member.dim, len(member.index[unit]), _LEFT_OVER) for member in group.members]


def _short(numbers: NDArray[np.int64]) -> str:
    """A list of numbers; its ends where it is long."""
    values = numbers.ravel().tolist()
    return str(values) if len(values) <= 8 else f"[{values[0]}, {values[1]}, ..., {values[-1]}]"
