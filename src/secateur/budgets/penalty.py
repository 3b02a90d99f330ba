"""A penalty on what a network is expected to cost, as the papers have it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.budgets.costs import KINDS, NO_LATENCY, CostModel, Kind
from secateur.budgets.seen import Seen
from secateur.errors import BudgetError
from secateur.gates.settings import is_a_number
from secateur.structure.groups import Cost

__all__ = ["Penalty", "PenaltyTerm"]


@dataclass(frozen=True)
class Penalty:
    r"""A weight times the expected cost, as the papers have it; the size that comes out is found by trial.

    ``"count/N"``: :math:`\frac{\lambda}{N} \sum_g |g| P(z_g \ne 0)`, up to the constant cost of what has no gate, with
    the loss a mean over examples. ``"density"``: weight times expected over dense cost.

    Args:
        weight: lambda, >= 0.
        unit: ``"count/N"`` or ``"density"``.
        n_examples: N, the number of training examples; needed for ``"count/N"`` only.
        kind: ``"params"``, ``"macs"`` or ``"latency"`` (nanoseconds, of a `LatencyModel`'s structure).

    Raises:
        BudgetError: a setting is outside its range, or N is missing or superfluous.

    Example:
        >>> Penalty(0.1, n_examples=60_000).factor(Cost(params=266_200, macs=266_200))
        1.6666666666666667e-06

    Reference:
        Louizos, Welling, Kingma, Learning Sparse Neural Networks through L0 Regularization, ICLR 2018, eq. 4.
    """

    weight: float
    unit: Literal["count/N", "density"] = "count/N"
    n_examples: int | None = None
    kind: Kind = "params"

    def __post_init__(self) -> None:
        problems = []
        if not is_a_number(self.weight, Real) or not 0.0 <= self.weight < math.inf:
            problems.append(f"weight={self.weight!r}, expected a finite number of at least 0")
        if self.unit not in ("count/N", "density"):
            problems.append(f"unit={self.unit!r}, expected 'count/N' or 'density'")
        if self.kind not in KINDS:
            problems.append(f"kind={self.kind!r}, expected one of {', '.join(KINDS)}")
        counted = isinstance(self.n_examples, int) and not isinstance(self.n_examples, bool) and self.n_examples >= 1
        if self.unit == "count/N" and not counted:
            problems.append(f"n_examples={self.n_examples!r}, expected the number of training examples for 'count/N'")
        if self.unit == "density" and self.n_examples is not None:
            problems.append(f"n_examples={self.n_examples!r} has no meaning for 'density'; leave it out")
        if problems:
            raise BudgetError("Penalty: " + "; ".join(problems))

    def factor(self, dense: Cost) -> float:
        """What the expected cost is multiplied by."""
        return self.weight / (self.n_examples if self.n_examples is not None else max(dense.of(self.kind), 1))

    def start(self, costs: CostModel, *, calibrated: bool = True) -> PenaltyTerm:
        """This penalty for one training.

        Args:
            costs: what units cost.
            calibrated: makes no difference: a penalty takes the surrogate for what it is.

        Raises:
            BudgetError: it weighs a latency of which there is no model.
        """
        if self.kind == "latency" and not costs.dense.latency:
            raise BudgetError(f"Penalty: {NO_LATENCY}")
        return PenaltyTerm(costs, self)


class PenaltyTerm(Seen):
    """A penalty in one training, with the questions of a `Controller`; its only state is what it displays.

    Args:
        costs: what units cost.
        penalty: the weight.
    """

    def __init__(self, costs: CostModel, penalty: Penalty) -> None:
        super().__init__(costs)
        self.penalty = penalty
        self.target: dict[str, int] = {}
        self._factor = penalty.factor(costs.dense)

    def loss(self, prob_open: Tensor, fixed_open: Tensor | None = None, *, task_loss: Tensor | None = None) -> Tensor:
        """What to add to the task loss; ``prob_open`` is ``(U,)``, the rest is not needed."""
        return self._factor * self.costs.expected(prob_open, self.penalty.kind)

    @torch.no_grad()
    def step(
        self,
        prob_open: Tensor,
        fixed_open: Tensor,
        *,
        scores: Tensor | Callable[[], Tensor] | None = None,
        passed: int = 1,
    ) -> None:
        """Note the costs, after each optimizer step."""
        values = self.costs.expected_vector(prob_open).tolist()
        if not all(math.isfinite(value) for value in values):
            raise BudgetError(f"PenaltyTerm.step: the expected cost is {values}; the gates' parameters have diverged")
        self._costs_now = self.costs.cost(values), self.costs.exact(fixed_open)

    def state_dict(self) -> dict[str, Any]:
        """Empty: a penalty learns nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        if state:
            raise BudgetError(f"PenaltyTerm: got the state of a budget with {', '.join(state)}; expected none")
