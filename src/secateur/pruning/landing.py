"""From the gates as they are to a pattern that meets the budget, at the end of a training.

Index conventions: ``U`` counted units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.budgets.budget import Budget, project
from secateur.budgets.costs import CostModel
from secateur.errors import BudgetError
from secateur.pruning.units import Units

__all__ = ["Landing"]

#: Rounds of projection where inputs have gates: the first meets the budget, the others use what it leaves.
PROJECTIONS = 4
#: Halvings in the search for a pattern whose rounded widths are within the budget: to a thousandth of the cost.
HALVINGS = 10


@dataclass(frozen=True, eq=False)
class Landing:
    """Projection onto a budget where units depend on each other.

    Args:
        units: which gate acts on which unit.
        costs: what units cost.
        scores: from bool ``(U,)``, which units are open, the order ``(U,)`` in which they are closed.
    """

    units: Units
    costs: CostModel
    scores: Callable[[Tensor], Tensor]

    def within(self, budget: Budget, was_open: Tensor, round_to: int = 1) -> Tensor:
        """The pattern that is within the budget when its widths are rounded up, and flips few units.

        Args:
            budget: to be met.
            was_open: bool ``(U,)``, on the CPU.
            round_to: number of which widths become multiples.

        Raises:
            BudgetError: the budget is out of reach.
        """
        is_open = self._within(budget, was_open)
        limits = budget.targets(self.costs.dense)
        if round_to == 1 or self._fits(is_open, limits, round_to):
            return is_open
        # The share of the present cost, halving its interval, at which what rounding adds still fits.
        now, fitting = self.costs.exact(is_open), None
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            share = (low + high) / 2
            try:
                tighter = self._within({kind: int(share * now.of(kind)) for kind in limits}, is_open)
            except BudgetError:  # fewer than one unit in every group
                low = share
                continue
            if self._fits(tighter, limits, round_to):
                low, fitting = share, tighter
            else:
                high = share
        if fitting is None:
            raise BudgetError(
                f"round_to={round_to}: with widths rounded up to multiples the model does not get within the budget of"
                f" {', '.join(f'{limit} {kind}' for kind, limit in limits.items())}; raise the budget, or round to less"
            )
        return fitting

    def reaches(self, is_open: Tensor, limits: Mapping[str, int]) -> bool:
        """Whether no cost of these units, bool ``(U,)``, is under its limit."""
        cost = self.costs.exact(is_open)
        return all(cost.of(kind) >= limit for kind, limit in limits.items())

    def _fits(self, is_open: Tensor, limits: Mapping[str, int], round_to: int) -> bool:
        return self.costs.exact(self.units.stays(is_open, round_to)).within(limits)

    def _within(self, budget: Budget | Mapping[str, int], is_open: Tensor) -> Tensor:
        """The pattern within a budget that flips few units, consistent: no input is open whose owner is closed."""
        is_open = self._loosest(budget, is_open)
        for _ in range(PROJECTIONS):
            wanted = project(self.costs, self.scores(is_open), is_open, budget)
            # What closes with its owner makes room that the next round fills.
            before, is_open = is_open, self.units.open(self.units.gates(wanted).float())
            if torch.equal(is_open, before):
                break
        return is_open

    def _loosest(self, budget: Budget | Mapping[str, int], is_open: Tensor) -> Tensor:
        """Where single weights have gates, a pattern within the budget that keeps more than closing down to it would.

        Weights that close take with them units that nothing reads then, and these further weights. So they close down
        to the highest cost, halving its interval, from which what goes with them leads into the budget.
        """
        limits = budget.targets(self.costs.dense) if isinstance(budget, Budget) else budget
        units, now, best = self.units, self.costs.exact(is_open), is_open
        if not units.has_weights or now.within(limits):
            return is_open
        order = self.scores(is_open)
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            share = (low + high) / 2
            looser = {k: limit + int(share * max(now.of(k) - limit, 0)) for k, limit in limits.items()}
            try:
                closed = project(self.costs, order, is_open, looser)
            except BudgetError:  # less than is left with all of the weights closed, but not what goes with them
                low = share
                continue
            found = units.open(units.gates(closed).float())
            if self.costs.exact(found).within(limits):
                low, best = share, found
            else:
                high = share
        return best
