"""From a pattern of open units to the nearest one within a budget, by exact counts.

Index conventions: ``U`` units of all groups in a row, ``G`` groups. Costs never fall when a unit opens, which is what
every search here relies on.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.budgets.costs import CostModel
from secateur.budgets.flips import first_length, flips, goals, movable_units, within
from secateur.budgets.runs import on_host
from secateur.errors import BudgetError

__all__ = ["project_onto"]


def project_onto(
    costs: CostModel, scores: Tensor, is_open: Tensor, limits: Mapping[str, int], slack: float = 0.0
) -> Tensor:
    """The pattern within the limits that flips few units, the least wanted ones.

    Over a limit, the lowest-scored open units close until the costs are within; of these, any that fit in what is left
    open again. Under all limits by more than the slack, the highest-scored closed units open; where the next of them
    does not fit, the most expensive ones that do. A group never loses its last unit; a group without an open unit
    counts as one unit, as a cut leaves it, and stays as it is.

    Args:
        costs: what units cost.
        scores: ``(U,)``, larger stays longer; units of infinite score, which have no gate, keep their state.
        is_open: bool ``(U,)``.
        limits: largest allowed cost by kind.
        slack: share of the dense cost that may stay unused before units are opened that were closed, in [0, 1].

    Returns:
        bool ``(U,)`` on the CPU.

    Raises:
        BudgetError: a shape is wrong, a score is NaN, or the limits are below what units without gates cost.
    """
    scores, is_open = scores.detach().cpu(), is_open.detach().to("cpu", torch.bool)
    for name, vector in (("scores", scores), ("open", is_open)):
        if vector.shape != (costs.total,):
            raise BudgetError(f"project: {name} has shape {tuple(vector.shape)}, expected ({costs.total},)")
    if bool(scores.isnan().any()):
        raise BudgetError(f"project: {int(scores.isnan().sum())} of {costs.total} scores are NaN; training diverged")
    floor = {kind: limit - int(slack * costs.dense.of(kind)) for kind, limit in limits.items()}
    pattern = _Pattern(costs, scores, is_open)
    for goal in goals(limits):
        if not pattern.fits(goal):
            flipped = flips(costs, scores, pattern.is_open, goal, goal, closing=True)
            pattern.flip(flipped)
            if not pattern.fits(goal):
                least = costs.cut(pattern.n_open)
                raise BudgetError(
                    "project: the budget cannot be met by closing units that have gates: "
                    + ", ".join(f"{kind} at most {limit}, least {least.of(kind)}" for kind, limit in goal.items())
                    + "; raise the budget or gate more groups"
                )
            pattern.refill(flipped, limits)
    for goal in goals(floor):
        if pattern.below(goal):
            # Up to the floor, not to the limit: what is opened here was never trained.
            upto = {**limits, **goal}
            pattern.flip(flips(costs, scores, pattern.is_open, upto, goal, closing=False))
        if pattern.below(goal):
            movable = movable_units(costs, pattern.scores, goal) & ~pattern.is_open.numpy()
            pattern.fill(np.flatnonzero(movable), limits, goal)
    return pattern.is_open


class _Pattern:
    """A pattern of open units with its group counts, while a projection changes it."""

    def __init__(self, costs: CostModel, scores: Tensor, is_open: Tensor) -> None:
        self.costs = costs
        self.scores = on_host(scores)
        self.is_open = is_open.clone()
        self.n_open = costs.n_open(is_open)

    def flip(self, units: NDArray[np.int64]) -> None:
        """Change the state of these units, int64 positions."""
        where = torch.from_numpy(units)
        self.is_open[where] = ~self.is_open[where]
        self.n_open = self.costs.n_open(self.is_open)

    def fits(self, limits: Mapping[str, int], group: int = 0, more: int | NDArray[np.int64] = 0) -> NDArray[np.bool_]:
        """Whether all costs are within the limits, with each of these numbers of further units of a group."""
        return within(self.costs, self._with(group, more), limits)

    def below(self, floor: Mapping[str, int], group: int = 0, more: int | NDArray[np.int64] = 0) -> NDArray[np.bool_]:
        """Whether all costs are below the floor, alike."""
        return within(self.costs, self._with(group, more), {kind: least - 1 for kind, least in floor.items()})

    def refill(self, units: NDArray[np.int64], limits: Mapping[str, int]) -> None:
        """Open those of the units that fit, highest scores first."""
        left = {group: own[::-1].tolist() for group, own in self._by_group(units).items()}
        queue = [(-float(self.scores[own[-1]]), group) for group, own in left.items()]
        heapq.heapify(queue)
        while queue:
            _, group = heapq.heappop(queue)
            # Opening a unit never makes another one cheaper, so a group whose next unit does not fit is done.
            if self.fits(limits, group, 1):
                self._open(group, [left[group].pop()])
                if left[group]:
                    heapq.heappush(queue, (-float(self.scores[left[group][-1]]), group))

    def fill(self, units: NDArray[np.int64], limits: Mapping[str, int], floor: Mapping[str, int]) -> None:
        """Open units until the costs are not below the floor: one by score, then most expensive groups first."""
        left = {g: own for g, own in self._by_group(units).items() if self.n_open[g] >= self.costs.floor[g]}
        if not left:
            return
        best = max(left, key=lambda group: self.scores[left[group][0]])
        if self.fits(limits, best, 1):
            self._open(best, left[best][:1])
            left[best] = left[best][1:]
        groups = np.array(list(left))
        for group in groups[np.argsort(-self._sizes(groups, limits), kind="stable")].tolist():
            if not self.below(floor):
                return
            own = left[group]
            most = first_length(lambda k, group=group: ~self.fits(limits, group, k), len(own)) - 1  # type: ignore[misc]
            need = first_length(lambda k, group=group: ~self.below(floor, group, k), len(own))  # type: ignore[misc]
            self._open(group, own[: min(most, need)])

    def _by_group(self, units: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
        """The units of each group, highest scores first."""
        ordered = units[np.lexsort((units, -self.scores[units]))]
        groups = self.costs.segment.numpy()[ordered]
        order = np.argsort(groups, kind="stable")
        present, starts = np.unique(groups[order], return_index=True)
        return dict(zip(present.tolist(), np.split(ordered[order], starts[1:]), strict=True)) if len(units) else {}

    def _sizes(self, groups: NDArray[np.int64], limits: Mapping[str, int]) -> NDArray[np.float64]:
        """How much of the dense cost the next unit of each of these groups adds."""
        dense = np.array([max(self.costs.dense.of(kind), 1) for kind in self.costs.rows])
        more = np.eye(len(self.n_open), dtype=np.int64)[groups]
        added = (self.costs.cuts(self.n_open + more) - self.costs.cuts(self.n_open)) / dense
        largest: NDArray[np.float64] = added[:, [self.costs.rows[kind] for kind in limits]].max(-1)
        return largest

    def _with(self, group: int, more: int | NDArray[np.int64]) -> NDArray[np.int64]:
        one = np.zeros_like(self.n_open)
        one[group] = 1
        changed: NDArray[np.int64] = self.n_open + np.asarray(more, dtype=np.int64)[..., None] * one
        return changed

    def _open(self, group: int, units: Sequence[int] | NDArray[np.int64]) -> None:
        self.is_open[torch.as_tensor(np.asarray(units, dtype=np.int64))] = True
        self.n_open[group] += len(units)
