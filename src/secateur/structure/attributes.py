"""Attributes that hold sizes: found by what the trial needs, never by equal value alone.

Many modules keep the number of heads or a width as an integer and reshape with it. Where a cut model
first deviates, every integer attribute nearby whose value equals a size that the cut changes is a
candidate; one that lets the cut model come further is accepted, for all modules of that class alike.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from secateur.structure.coupling import Freeze
from secateur.structure.grouping import Grouping
from secateur.structure.groups import Attribute, Axis, Keep
from secateur.structure.ids import Ids, Label
from secateur.structure.record import Entry
from secateur.structure.trial import Deviation, Recorded, Trial

__all__ = ["SizedAttributes", "apart", "of_bare_norms", "settle", "shared"]

#: How many modules outward from the place of a deviation are looked at.
_REACH = 3
#: Candidates tried for one deviation; each costs a run up to the deviation.
_MOST = 24
#: Units that groups keep alike: as few as there can be, for dimensions of size 1 have no labels.
_FEW = 2


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


def apart(grouping: Grouping, accepted: SizedAttributes, *, pairs: bool) -> Keep:
    """A keep-set that shows what a trial cannot see where groups happen to keep as many.

    An attribute may count more groups than the one that it follows, as one number of heads for two attentions: groups
    that attributes count are cut, each to another number, and others of such a size stay whole. All that remain keep
    one and the same number, so that code that compares two shapes finds them equal, and a small one, for code that
    does otherwise with few. Groups of two are cut only with ``pairs``.
    """
    groups = grouping.structure.groups
    counted = {group for rule in accepted.rules(grouping) for group, _ in rule.axis.per_group}
    sizes = {groups[group].size for group in counted}
    keep: dict[str, torch.Tensor] = {}
    for number, group in enumerate(groups):
        if group.size <= 2:
            count = 1 if pairs and number in counted else group.size
        elif number in counted:
            count = 2 + (sum(other < number for other in counted) + 1) % (group.size - 2)
        else:
            count = group.size if group.size in sizes else _FEW
        keep[group.name] = torch.from_numpy(np.arange(group.size - count, group.size))
    return keep


def shared(
    trial: Trial, deviation: Deviation, blamed: Mapping[int, Freeze], grouping: Grouping, accepted: SizedAttributes
) -> list[tuple[int, int]]:
    """Pairs of groups that one attribute counts, and that therefore can only be cut alike.

    A blamed group of as many units as one that an attribute of the modules around it follows is given the same
    kept units; where the cut model then comes further, it was the attribute that the two have in common.
    """
    groups, by_scope = grouping.structure.groups, defaultdict(list)
    for rule in accepted.rules(grouping):
        if len(rule.axis.per_group) == 1:
            by_scope[rule.name.rpartition(".")[0]].append(rule.axis.per_group[0][0])
    pairs: list[tuple[int, int]] = []
    for group, freeze in blamed.items():
        around = list(_outward(freeze.module))
        if freeze is deviation.freeze:
            around += [scope for path in reversed(deviation.stack) for scope in _outward(path)]
        counted = (one for scope in dict.fromkeys(around) for one in by_scope.get(scope, ()))
        partner = next((one for one in counted if one != group and groups[one].size == groups[group].size), None)
        if partner is not None:
            pairs.append((group, partner))
    if not pairs:
        return []
    alike = {groups[group].name: trial.keep[groups[partner].name] for group, partner in pairs}
    again = trial.with_keep({**trial.keep, **alike})
    later = again.first_deviation(_values(again, grouping, accepted))
    return pairs if later is None or later.at > deviation.at else []


def of_bare_norms(
    model: nn.Module, returned: Mapping[str, Sequence[Label]], grouping: Grouping
) -> tuple[Attribute, ...]:
    """``num_features`` of batch and instance norms without tensors, which compute with any number but warn of another.

    Args:
        model: what was traced.
        returned: labels of what each module returned, call by call.
        grouping: of their ids.
    """
    found: list[Attribute] = []
    for path, labels in returned.items():
        module = model.get_submodule(path)
        if not isinstance(module, _NormBase) or [*module.parameters(), *module.buffers()]:
            continue
        axes = {grouping.axis(f.ids) for label in labels for f in label.factors if f.dims == (1,)}
        if len(axes) == 1 and (axis := axes.pop()).per_group:
            found.append(Attribute(f"{path}.num_features" if path else "num_features", axis))
    return tuple(found)


def _outward(path: str) -> Iterator[str]:
    """A module and those around it, the root last."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _values(
    trial: Trial, grouping: Grouping, accepted: SizedAttributes, more: Sequence[_Candidate] = ()
) -> dict[str, int]:
    """What attributes become by a trial's cut: those accepted, and those of candidates."""
    groups = grouping.structure.groups
    values = {rule.name: rule.value(groups, trial.keep) for rule in accepted.rules(grouping)}
    for candidate in more:
        for name, ids in candidate.ids.items():
            values[name] = Attribute(name, grouping.axis(ids)).value(groups, trial.keep)
    return values


def settle(
    model: nn.Module, recorded: list[Recorded], trial: Trial, grouping: Grouping, accepted: SizedAttributes
) -> Deviation | None:
    """Run the trial, letting attributes follow the cut where that helps.

    Returns:
        The deviation that no attribute explains, or None where the cut model agrees with the dense one.
    """
    deviation = trial.first_deviation(_values(trial, grouping, accepted))
    while deviation is not None:
        place, tried, other = deviation, [], []
        for candidate in _candidates(model, recorded, grouping, trial, place, accepted):
            deviation = trial.first_deviation(_values(trial, grouping, accepted, [candidate]))
            if deviation is None or deviation.at > place.at:
                accepted.accept(candidate)
                break
            tried.append(candidate)
            if deviation.at == place.at and deviation.freeze.reason != place.freeze.reason:
                other.append(candidate)
        else:
            # Code that checks two sizes in a row, without an operator between, fails at one place for either.
            for first, second in itertools.product(other, tried):
                if first.ids.keys() & second.ids.keys():
                    continue
                deviation = trial.first_deviation(_values(trial, grouping, accepted, [first, second]))
                if deviation is None or deviation.at > place.at:
                    accepted.accept(first)
                    accepted.accept(second)
                    break
            else:
                return place
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
