"""The trial: cut all groups at once on fake tensors, run again, and compare with the dense record.

Labels cannot see sizes that flow into numbers, or code with sizes written into it. So the cut model
must execute the same operators with the same numbers, and every label must be the dense one restricted
to the kept units. Where it first differs, an attribute that holds a size may have to follow the cut
(``attributes``); else the groups at that place are frozen, with the place as their reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from secateur.structure.coupling import Coupling, Freeze
from secateur.structure.cut import cut_
from secateur.structure.grouping import Grouping
from secateur.structure.groups import Keep
from secateur.structure.ids import Factor, Ids, Label, first_slice
from secateur.structure.norms import RmsNorm
from secateur.structure.record import Entry
from secateur.structure.rulings import Rulings
from secateur.structure.runs import Run, RunFailure, Setting, run
from secateur.structure.sites import Sites

__all__ = ["Deviation", "Recorded", "Trial", "uneven_keep"]


@dataclass(frozen=True, eq=False)
class Recorded:
    """A dense run and how to repeat it.

    Args:
        setting: its inputs and mode.
        run: what it did.
    """

    setting: Setting
    run: Run


@dataclass(frozen=True)
class Deviation:
    """Where a cut model first did something else than the dense one.

    Args:
        at: position of the run and of the operator in it; larger is later.
        freeze: what it did, and where.
        stack: modules in execution there, the innermost last.
    """

    at: tuple[int, int]
    freeze: Freeze
    stack: tuple[str, ...]


class _Deviates(Exception):  # noqa: N818 - a way out, not an error
    """Ends a run at the first difference."""


def uneven_keep(grouping: Grouping, *, pairs: bool) -> dict[str, torch.Tensor]:
    """Keep-sets of different sizes at scattered positions: between a third and all but one of each group.

    Groups of two are kept whole unless ``pairs``: labels of dimensions of size 1 cannot be told from none.
    """
    generator = np.random.default_rng(0)
    keep: dict[str, torch.Tensor] = {}
    for number, group in enumerate(grouping.structure.groups):
        low, high = (max(2, group.size // 3), group.size - 1) if group.size > 2 else (2 - pairs, 2 - pairs)
        count = low + (7 * number + 3) % (high - low + 1)
        keep[group.name] = torch.from_numpy(np.sort(generator.permutation(group.size)[:count]))
    return keep


class Trial:
    """One cut of all groups, tried on every recorded run.

    Args:
        model: the dense model; copies of it are cut.
        recorded: its dense runs.
        sites: its sites.
        grouping: its groups.
        norms: its RMSNorm layers.
        pairs: whether groups of two are cut to one as well; only sizes and numbers are compared then.
        keep: kept units, where they are to be others than ``uneven_keep`` gives.
    """

    def __init__(
        self,
        model: nn.Module,
        recorded: list[Recorded],
        sites: Sites,
        grouping: Grouping,
        norms: Mapping[str, RmsNorm],
        *,
        pairs: bool = False,
        keep: Keep | None = None,
    ) -> None:
        self._model, self._recorded, self._sites, self._grouping = model, recorded, sites, grouping
        self.keep = dict(uneven_keep(grouping, pairs=pairs) if keep is None else keep)
        self._strict, self._norms = not pairs, norms
        self._plan = grouping.structure.plan(self.keep)
        distinct = {id(positions): positions for dims in self._plan.tensors.values() for positions in dims.values()}
        arrays = {key: np.array(positions, dtype=np.int64) for key, positions in distinct.items()}
        kept = {
            name: {dim: arrays[id(positions)] for dim, positions in dims.items()}
            for name, dims in self._plan.tensors.items()
        }
        self._labels = sites.labels(kept)
        self._rulings = Rulings(Coupling(recording=False))
        self._stays = self._kept_ids()
        self._left: dict[int, Ids | None] = {}
        self._alike: dict[tuple[int, int], bool] = {}
        self._unit = grouping.solution.component
        self._of_parameters = np.zeros(len(grouping.group_of), dtype=bool)
        self._of_parameters[self._unit[1 : sites.starts[-1]]] = True

    def with_keep(self, keep: Keep) -> Trial:
        """The same with other kept units."""
        pairs = not self._strict
        return Trial(self._model, self._recorded, self._sites, self._grouping, self._norms, pairs=pairs, keep=keep)

    def first_deviation(self, attributes: Mapping[str, int]) -> Deviation | None:
        """Cut, set attributes, run everything, and compare; None where everything agrees."""
        plan = replace(self._plan, attributes={**self._plan.attributes, **attributes})
        for number, one in enumerate(self._recorded):
            dense = one.run.entries
            seen = 0

            def compare(position: int, after: Entry, dense: list[Entry] = dense) -> None:
                nonlocal seen
                seen = position + 1
                if position >= len(dense):
                    raise _Deviates(f"makes the model execute {after.operator} where it had ended")
                if reason := self._differ(dense[position], after):
                    seen = position
                    raise _Deviates(reason)

            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # what a cut copy warns of says nothing of the model
                    run(
                        self._model,
                        one.setting,
                        self._labels,
                        self._rulings,
                        self._norms,
                        prepare=lambda twin: cut_(twin, plan),
                        on_entry=compare,
                    )
            except RunFailure as failure:
                return self._deviation(number, min(seen, len(dense) - 1), failure)
            if seen < len(dense):
                entry = dense[seen]
                freeze = Freeze(f"makes the model end before {entry.operator}", entry.operator, entry.module)
                return Deviation((number, seen), freeze, (entry.module,))
        return None

    def blame(self, deviation: Deviation) -> dict[int, Freeze]:
        """The groups at the place, with the reason: those in the operator's tensors, else in the modules around it.

        Modules of the same class that execute the same operator at the same step hold the same code, so their
        groups are blamed as well: one trial then settles all layers of a network.
        """
        dense = self._recorded[deviation.at[0]].run.entries
        entry = dense[deviation.at[1]]
        blamed = dict.fromkeys(self._grouping.groups_in(_ids_of([*entry.inputs, *entry.labels])), deviation.freeze)
        for twin in self._same_step(dense, deviation.at[1]):
            for group in self._grouping.groups_in(_ids_of([*twin.inputs, *twin.labels])):
                blamed.setdefault(group, replace(deviation.freeze, module=twin.module))
        scope = deviation.freeze.module
        while not blamed:
            names = {name for name in self._sites.shapes if _within(name, scope)}
            ids = _ids_of([label for e in dense if _within(e.module, scope) for label in e.labels])
            ids += [self._sites.ids(site) for site, name in enumerate(self._sites.tensors) if name in names]
            blamed = dict.fromkeys(self._grouping.groups_in(ids), deviation.freeze)
            if not scope:
                break
            scope = scope.rpartition(".")[0]
        return blamed

    def _same_step(self, dense: list[Entry], position: int) -> Iterator[Entry]:
        """The same operator at the same step of other modules of the class, where that has layers within."""
        scope = dense[position].module
        modules = dict(self._model.named_modules())
        mine = modules.get(scope)
        if mine is None or not scope or not any(True for _ in mine.children()):
            return
        steps = [k for k, e in enumerate(dense) if _within(e.module, scope)]
        rank = steps.index(position)
        for path, module in modules.items():
            if path != scope and type(module) is type(mine):
                theirs = [e for e in dense if _within(e.module, path)]
                if len(theirs) == len(steps) and theirs[rank].operator == dense[position].operator:
                    yield theirs[rank]

    def _deviation(self, number: int, position: int, failure: RunFailure) -> Deviation:
        entry = self._recorded[number].run.entries[position]
        stack = tuple(failure.stack) or (entry.module,)
        if isinstance(failure.error, _Deviates):
            return Deviation((number, position), Freeze(str(failure.error), entry.operator, entry.module), stack)
        text = (str(failure.error).strip().splitlines() or [""])[0][:160]
        reason = f"does not fit code with sizes of its own ({type(failure.error).__name__}: {text})"
        return Deviation((number, position), Freeze(reason, entry.operator, stack[-1]), stack)

    def _kept_ids(self) -> NDArray[np.bool_]:
        grouping = self._grouping
        stays = np.ones(len(grouping.group_of), dtype=bool)
        for number, group in enumerate(grouping.structure.groups):
            open_units = np.zeros(group.size, dtype=bool)
            open_units[self.keep[group.name].numpy()] = True
            mine = grouping.group_of == number
            stays[mine] = open_units[grouping.unit_of[mine]]
        return stays[grouping.solution.component]

    def _differ(self, before: Entry, after: Entry) -> str:
        """In what the cut model's operator differs from the dense one's; "" where in nothing."""
        if before.operator != after.operator:
            return f"makes the model execute {after.operator} where it executed {before.operator}"
        if before.scalars != after.scalars:
            return (
                f"flows as a size into the numbers of {before.operator} ({_difference(before.scalars, after.scalars)})"
            )
        for wide, narrow in zip(before.labels, after.labels, strict=False):
            # By identity: labels are one object for all tensors of which they say the same.
            pair = id(wide), id(narrow)
            if pair not in self._alike:
                self._alike[pair] = (wide.neutral and narrow.neutral) or self._agrees(wide, narrow)
            if not self._alike[pair]:
                return f"does not come through {before.operator} as it should: the code holds a size or a position"
        return ""

    def _agrees(self, wide: Label, narrow: Label) -> bool:
        """Whether a label of the cut model is the dense one, restricted to what stays."""
        if len(wide.shape) != len(narrow.shape):
            return False
        expected: list[Factor] = []
        for factor in wide.factors:
            restricted = self._restricted(factor)
            if restricted is None:
                return False
            expected.append(restricted)
        sizes = dict(enumerate(wide.shape))
        for factor in expected:
            sizes.update(zip(factor.dims, factor.ids.shape, strict=True))
        # Along dimensions where nothing changes any number of slices is the same thing.
        sizes.update((dim, narrow.shape[dim]) for dim in wide.uniform & narrow.uniform)
        if tuple(sizes.values()) != narrow.shape:
            return False
        if not self._strict:
            return True
        left, right = _by_dims(self._settled(expected)), _by_dims(narrow.factors)
        made = int(self._sites.starts[-1])
        if any(dims not in left for dims in right):
            return False
        # Tensors that the model makes while it runs have ids of their own in the dense run only: units say the rest.
        return all(
            bool((ids >= made).all())
            if dims not in right
            else bool(((ids == right[dims]) | (ids >= made) & (self._unit[ids] == self._unit[right[dims]])).all())
            for dims, ids in left.items()
        )

    def _settled(self, factors: list[Factor]) -> list[Factor]:
        """Factors in which ids of tensors that the model made count only where they go with a parameter's."""
        made = int(self._sites.starts[-1])
        return [
            Factor(f.dims, np.where((f.ids < made) | self._of_parameters[self._unit[f.ids]], f.ids, 0)) for f in factors
        ]

    def _restricted(self, factor: Factor) -> Factor | None:
        """A factor without the slices that go; None where they are not whole slices along its axes."""
        # By identity: the record of the dense run, which lives as long as this, holds all these arrays.
        if id(factor.ids) not in self._left:
            self._left[id(factor.ids)] = self._what_stays(factor.ids)
        left = self._left[id(factor.ids)]
        return None if left is None else Factor(factor.dims, left)

    def _what_stays(self, ids: Ids) -> Ids | None:
        stays = self._stays[ids]
        if stays.all():
            return ids
        along = [stays.any(axis=tuple(a for a in range(stays.ndim) if a != axis)) for axis in range(stays.ndim)]
        chosen = np.ix_(*(np.flatnonzero(mask) for mask in along))
        return ids[chosen] if stays[chosen].all() else None


def _within(name: str, scope: str) -> bool:
    return not scope or name == scope or name.startswith(f"{scope}.")


def _ids_of(labels: list[Label]) -> list[Ids]:
    return [factor.ids for label in labels for factor in label.factors]


def _by_dims(factors: list[Factor] | tuple[Factor, ...]) -> dict[tuple[int, ...], Ids]:
    """Factors by dimension, in one normal form: without dimensions along which the ids do not change."""
    plain: dict[tuple[int, ...], Ids] = {}
    for factor in factors:
        dims, ids = factor.dims, factor.ids
        for axis in reversed(range(len(dims))):
            if ids.shape[axis] == 1 or bool((ids == ids.take([0], axis=axis)).all()):
                ids, dims = first_slice(ids, axis), dims[:axis] + dims[axis + 1 :]
        if dims and ids.any():
            plain[dims] = ids
    return plain


def _difference(a: tuple[object, ...], b: tuple[object, ...]) -> str:
    for x, y in zip(a, b, strict=False):
        if x != y:
            return f"{x} became {y}"
    return "more or fewer of them"
