"""The trial: cut all groups at once on fake tensors, run again, and compare with the dense record.

Labels cannot see sizes that flow into numbers, or code with sizes written into it. So the cut model
must execute the same operators with the same numbers, and every label must be the dense one restricted
to the kept units. What differs names the place, and the groups at that place are frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from secateur.structure.coupling import Coupling, Freeze
from secateur.structure.cut import cut_
from secateur.structure.example import Example
from secateur.structure.grouping import Grouping
from secateur.structure.groups import Keep
from secateur.structure.ids import Factor, Ids, Label
from secateur.structure.record import Entry
from secateur.structure.runs import Run, RunFailure, run
from secateur.structure.sites import Sites

__all__ = ["Trial", "TrialFailure", "uneven_keep"]


@dataclass(frozen=True)
class TrialFailure:
    """Groups that did not survive the trial.

    Args:
        groups: their positions.
        freeze: why, where.
    """

    groups: tuple[int, ...]
    freeze: Freeze


def uneven_keep(grouping: Grouping, seed: int = 0) -> dict[str, torch.Tensor]:
    """Keep-sets of different sizes at scattered positions: about half of each group, at least one unit."""
    generator = np.random.default_rng(seed)
    keep: dict[str, torch.Tensor] = {}
    for number, group in enumerate(grouping.structure.groups):
        low, high = max(1, group.size // 3), group.size - 1
        count = low + (7 * number + 3) % (high - low + 1)
        keep[group.name] = torch.from_numpy(np.sort(generator.permutation(group.size)[:count]))
    return keep


class Trial:
    """One set of cuts, tried on every recorded run.

    Args:
        sites: the model's sites.
        grouping: its groups.
        keep: kept units; uneven ones of all groups where None.
    """

    def __init__(self, sites: Sites, grouping: Grouping, keep: Keep | None = None) -> None:
        self._sites, self._grouping = sites, grouping
        self._keep = dict(uneven_keep(grouping) if keep is None else keep)
        self._plan = grouping.structure.plan(self._keep)
        kept = {
            name: {dim: np.array(positions, dtype=np.int64) for dim, positions in dims.items()}
            for name, dims in self._plan.tensors.items()
        }
        self._labels = sites.labels(kept)
        self._stays = self._kept_ids()

    def check(
        self, model: nn.Module, example: Example, dense: Run, *, training: bool, fake: bool
    ) -> TrialFailure | None:
        """Run the cut model and compare; None where everything agrees."""
        deaf = Coupling(recording=False)
        try:
            small = run(
                model,
                example,
                self._labels,
                deaf,
                training=training,
                fake=fake,
                prepare=lambda twin: cut_(twin, self._plan),
            )
        except RunFailure as failure:
            return self._raised(dense, failure)
        for position, (before, after) in enumerate(zip(dense.entries, small.entries, strict=False)):
            reason = self._differ(before, after)
            if reason:
                return self._blame(dense, position, reason)
        if len(dense.entries) != len(small.entries):
            return self._blame(
                dense, min(len(dense.entries), len(small.entries)) - 1, "changes which operators the model executes"
            )
        return None

    def _kept_ids(self) -> NDArray[np.bool_]:
        grouping = self._grouping
        stays = np.ones(len(grouping.group_of), dtype=bool)
        for number, group in enumerate(grouping.structure.groups):
            open_units = np.zeros(group.size, dtype=bool)
            open_units[self._keep[group.name].numpy()] = True
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
            if wide.neutral and narrow.neutral:
                continue
            if not self._agrees(wide, narrow):
                return f"does not come through {before.operator} as it should (a size or a position is written into the code)"
        return ""

    def _agrees(self, wide: Label, narrow: Label) -> bool:
        """Whether a label of the cut model is the dense one, restricted to what stays."""
        if len(wide.shape) != len(narrow.shape):
            return False
        expected = [self._restricted(factor) for factor in wide.factors]
        if any(factor is None for factor in expected):
            return False
        sizes = dict(enumerate(wide.shape))
        for factor in expected:
            assert factor is not None
            sizes.update(zip(factor.dims, factor.ids.shape, strict=True))
        if tuple(sizes.values()) != narrow.shape:
            return False
        left = _plain(expected, narrow.shape)
        right = _plain(list(narrow.factors), narrow.shape)
        return left.keys() == right.keys() and all(np.array_equal(left[dims], right[dims]) for dims in left)

    def _restricted(self, factor: Factor) -> Factor | None:
        """A factor without the slices that go; None where they are not whole slices along its axes."""
        stays = self._stays[factor.ids]
        if stays.all():
            return factor
        along = [stays.any(axis=tuple(a for a in range(stays.ndim) if a != axis)) for axis in range(stays.ndim)]
        chosen = np.ix_(*(np.flatnonzero(mask) for mask in along))
        if not stays[chosen].all():
            return None
        return Factor(factor.dims, factor.ids[chosen])

    def _raised(self, dense: Run, failure: RunFailure) -> TrialFailure:
        position = len(failure.entries)
        for k, (before, after) in enumerate(zip(dense.entries, failure.entries, strict=False)):
            reason = self._differ(before, after)
            if reason:
                return self._blame(dense, k, reason)
        at = dense.entries[min(position, len(dense.entries) - 1)]
        module = failure.stack[-1] if failure.stack else at.module
        text = str(failure.error).strip().splitlines()
        return self._blame(
            dense,
            min(position, len(dense.entries) - 1),
            f"does not fit code with sizes of its own ({type(failure.error).__name__}: {text[0][:160] if text else ''})",
            module,
        )

    def _blame(self, dense: Run, position: int, reason: str, module: str | None = None) -> TrialFailure:
        """The groups at the place where the trial failed: those in the operator's tensors, else the module's, else its callers'."""
        entry = dense.entries[position]
        where = entry.module if module is None else module
        freeze = Freeze(reason, entry.operator, where)
        direct = self._grouping.groups_in(_ids_of([*entry.inputs, *entry.labels]))
        if direct:
            return TrialFailure(tuple(sorted(direct)), freeze)
        scope = where
        while True:
            names = [n for n in self._sites.shapes if n.startswith(f"{scope}.") or not scope]
            inside = [e for e in dense.entries if e.module == scope or e.module.startswith(f"{scope}.") or not scope]
            found = self._grouping.groups_in(
                [*_ids_of([label for e in inside for label in e.labels]), *(_own_ids(self._sites, names))]
            )
            if found or not scope:
                return TrialFailure(tuple(sorted(found)), freeze)
            scope = scope.rpartition(".")[0]


def _ids_of(labels: list[Label]) -> list[Ids]:
    return [factor.ids for label in labels for factor in label.factors]


def _own_ids(sites: Sites, names: list[str]) -> list[Ids]:
    wanted = set(names)
    return [sites.ids(site) for site, name in enumerate(sites.tensors) if name in wanted]


def _plain(factors: list[Factor | None], shape: tuple[int, ...]) -> dict[tuple[int, ...], Ids]:
    """Factors by dimension, without dimensions of size 1, whose label says nothing that could differ."""
    plain: dict[tuple[int, ...], Ids] = {}
    for factor in factors:
        if factor is None:
            continue
        dims, ids = factor.dims, factor.ids
        for axis in reversed(range(len(dims))):
            if ids.shape[axis] == 1 or bool((ids == ids.take([0], axis=axis)).all()):
                ids, dims = ids.take(0, axis=axis), dims[:axis] + dims[axis + 1 :]
        if dims:
            plain[dims] = ids
    return plain


def _difference(a: tuple[object, ...], b: tuple[object, ...]) -> str:
    for x, y in zip(a, b, strict=False):
        if x != y:
            return f"{x} became {y}"
    return "more or fewer of them"
