"""What a budget or a penalty shows of a training."""

from __future__ import annotations

from secateur.budgets.costs import CostModel
from secateur.structure.groups import Cost

__all__ = ["Seen"]


class Seen:
    """Costs at the last step of a training, for displays; those of the dense model before the first.

    Args:
        costs: what units cost.
    """

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self._costs_now = (costs.dense, costs.dense)

    @property
    def expected(self) -> Cost:
        """Expected cost at the last step, rounded."""
        return self._costs_now[0]

    @property
    def exact(self) -> Cost:
        """Cost of the fixed gates at the last step."""
        return self._costs_now[1]
