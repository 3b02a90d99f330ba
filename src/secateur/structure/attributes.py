"""Attributes that hold sizes: found by what the trial needs, never by equal value alone.

Many modules keep the number of heads or a width as an integer and reshape with it. Where a cut model
first deviates, every integer attribute nearby whose value equals a size that the cut changes is a
candidate; one that lets the cut model come further is accepted, for all modules of that class alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from secateur.structure.grouping import Grouping
from secateur.structure.groups import Attribute, Axis, Keep
from secateur.structure.ids import Ids
from secateur.structure.record import Entry
from secateur.structure.sites import Sites
from secateur.structure.trial import Deviation, Recorded, Trial

__all__ = ["SizedAttributes", "settle", "told_apart"]

#: How many modules outward from the place of a deviation are looked at.
_REACH = 3
#: Candidates tried for one deviation; each costs a run up to the deviation.
_MOST = 24


@dataclass(frozen=True, eq=False)
class _Candidate:
    """An attribute of all modules of one class, and the ids whose number is its value."""

    ids: dict[str, Ids]


class SizedAttributes:
    """Attributes accepted so far, with the ids that they count."""

    def __init__(self) -> None:
        self._ids: dict[str, Ids] = {}

    def accept(self, candidate: _Candidate) -> None:
        """Take a candidate in."""
        self._ids.update(candidate.ids)

    def rules(self, grouping: Grouping) -> tuple[Attribute, ...]:
        """As functions of open units; without those that no unit changes (any more)."""
        found = (Attribute(name, grouping.axis(ids)) for name, ids in self._ids.items())
        return tuple(rule for rule in found if rule.axis.per_group)

    def __contains__(self, name: str) -> bool:
        return name in self._ids


def told_apart(keep: Keep, grouping: Grouping, sites: Sites, accepted: SizedAttributes) -> Keep | None:
    """A keep-set that shows whether an attribute counts two groups at once, which a trial by ``keep`` cannot.

    Where an accepted attribute's module has another dimension of its size, of units that happen to keep as many, the
    cut is tried again with all of those: a module that needs both to be equal then fails.

    Returns:
        None where every attribute is the size of one thing only.
    """
    groups, whole = grouping.structure.groups, {}
    rules = accepted.rules(grouping)
    inside: dict[str, list[int]] = {rule.name.rpartition(".")[0]: [] for rule in rules}
    for site, tensor in enumerate(sites.tensors) if rules else ():
        scope = tensor
        while scope:
            scope = scope.rpartition(".")[0]
            if scope in inside:
                inside[scope].append(site)
    for rule in rules:
        mine = {group for group, _ in rule.axis.per_group}
        dense, cut = rule.value(groups, {}), rule.value(groups, keep)
        for site in inside[rule.name.rpartition(".")[0]]:
            if sites.starts[site + 1] - sites.starts[site] != dense:
                continue
            axis = grouping.axis(sites.ids(site))
            if axis.per_group and Attribute("", axis).value(groups, keep) == cut:
                others = [groups[group] for group, _ in axis.per_group if group not in mine]
                whole.update({group.name: torch.arange(group.size) for group in others})
    return {**keep, **whole} if whole else None


def settle(
    model: nn.Module, recorded: list[Recorded], trial: Trial, grouping: Grouping, accepted: SizedAttributes
) -> Deviation | None:
    """Run the trial, letting attributes follow the cut where that helps.

    Returns:
        The deviation that no attribute explains, or None where the cut model agrees with the dense one.
    """
    groups = grouping.structure.groups

    def values(more: _Candidate | None = None) -> dict[str, int]:
        known = {rule.name: rule.value(groups, trial.keep) for rule in accepted.rules(grouping)}
        extra = (
            {}
            if more is None
            else {name: Attribute(name, grouping.axis(ids)).value(groups, trial.keep) for name, ids in more.ids.items()}
        )
        return {**known, **extra}

    deviation = trial.first_deviation(values())
    while deviation is not None:
        better = None
        for candidate in _candidates(model, recorded, grouping, trial, deviation, accepted):
            later = trial.first_deviation(values(candidate))
            if later is None or later.at > deviation.at:
                better = candidate
                accepted.accept(candidate)
                deviation = later
                break
        if better is None:
            return deviation
    return None


def _candidates(
    model: nn.Module,
    recorded: list[Recorded],
    grouping: Grouping,
    trial: Trial,
    deviation: Deviation,
    accepted: SizedAttributes,
) -> Iterator[_Candidate]:
    """Attributes near a deviation whose value a cut changes, the nearest module first."""
    dense = recorded[deviation.at[0]].run.entries
    modules = dict(model.named_modules())
    scopes = list(dict.fromkeys([deviation.freeze.module, *reversed(deviation.stack)]))[:_REACH]
    seen: set[tuple[str, str, Axis]] = set()
    produced = 0
    for scope in scopes:
        module = modules.get(scope)
        if module is None:
            continue
        inside = _entries_of(dense, scope)
        for name, value in vars(module).items():
            if type(value) is not int or value < 2 or f"{scope}.{name}" in accepted:
                continue
            for place in _places(inside, value):
                ids = _ids_at(inside, place)
                axis = grouping.axis(ids)
                if not axis.per_group or (scope, name, axis) in seen:
                    continue
                seen.add((scope, name, axis))
                if Attribute("", axis).value(grouping.structure.groups, trial.keep) == value:
                    continue
                yield _for_class(modules, dense, scope, name, place, inside)
                produced += 1
                if produced >= _MOST:
                    return


_Place = tuple[int, int, int, int]


def _entries_of(entries: list[Entry], scope: str) -> list[Entry]:
    return [e for e in entries if not scope or e.module == scope or e.module.startswith(f"{scope}.")]


def _places(entries: list[Entry], size: int) -> Iterator[_Place]:
    """Where, among some operators' outputs, a labelled dimension has that size."""
    for number, entry in enumerate(entries):
        for output, label in enumerate(entry.labels):
            for k, factor in enumerate(label.factors):
                for axis, length in enumerate(factor.ids.shape):
                    if length == size:
                        yield number, output, k, axis


def _ids_at(entries: list[Entry], place: _Place) -> Ids:
    """The ids along one axis: of its first slice, for whole slices go."""
    number, output, k, axis = place
    ids = entries[number].labels[output].factors[k].ids
    along: Ids = np.moveaxis(ids, axis, 0).reshape(ids.shape[axis], -1)[:, 0]
    return along


def _for_class(
    modules: dict[str, nn.Module], dense: list[Entry], scope: str, name: str, place: _Place, inside: list[Entry]
) -> _Candidate:
    """The same attribute of every module of the class that executes the same operator at the same place."""
    found = {f"{scope}.{name}" if scope else name: _ids_at(inside, place)}
    operator, rank = inside[place[0]].operator, len(inside)
    for path, module in modules.items():
        if path == scope or type(module) is not type(modules[scope]):
            continue
        theirs = _entries_of(dense, path)
        if len(theirs) != rank or theirs[place[0]].operator != operator:
            continue
        try:
            ids = _ids_at(theirs, place)
        except IndexError:
            continue
        if len(ids) == vars(module).get(name):
            found[f"{path}.{name}"] = ids
    return _Candidate(found)
