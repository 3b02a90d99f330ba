"""The state of a budget in one training: a price on expected cost, and a push for the gates that must still move.

Index conventions: ``U`` units of all groups in a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.budgets.control import Control
from secateur.budgets.costs import CostModel
from secateur.budgets.expectation import Point
from secateur.budgets.flips import flips, goals, settled
from secateur.budgets.order import SMALLEST, Order
from secateur.budgets.runs import on_host
from secateur.budgets.seen import Seen
from secateur.errors import BudgetError
from secateur.structure.groups import Cost

__all__ = ["Controller"]

#: Memory of the running size of the task loss, in optimizer steps.
LOSS_MEMORY = 10
#: Least push, relative to the size of the task loss: what it starts from in every ramp.
LEAST_PUSH = 0.05
#: Largest push: a single unit of a hundredth of the cost then weighs ten times as much as the loss.
LARGEST_PUSH = 1e3
#: Largest push where the size of the loss is not told, and may be a thousand.
LARGEST_UNTOLD = 1e6
#: The loss counts as at least this share of its largest running mean: pressure does not fade where a loss is nearly 0.
LEAST_SCALE = 0.01


class Controller(Seen):
    r"""Brings the cost of the gates to a target while they train.

    With the expected cost :math:`c_k`, the cost :math:`f_k` of the fixed gates, and a reference :math:`r_k(t)` that is
    held at its start and then falls to the target along a straight line in the logarithm, the loss gets

    .. math:: S \Big(\sum_k \lambda_k \log\frac{c_k(p)}{r_k} + \mu \log c_m(p)\big|_{\text{push}}\Big).

    - The *price* :math:`\lambda_k` is the Lagrange multiplier of :math:`E[\text{cost}] \le r_k`: dual ascent on the
      logarithm of the ratio, so that it means the same at every size, with restarts. It sorts the units by use.
    - The *push* :math:`\mu` belongs to the fixed gates, whose cost is what the user asked for and which the expected
      cost only stands in for (proxy constraints): its gradient reaches the units that a projection onto the reference
      would flip now, and no others, so that it ends where the target is met. While the fixed gates' cost :math:`f_m` of
      the most violated constraint is off by more than the tolerance, the push grows by a fixed factor for each step,
      else it decays: it finds its size, whatever the optimizer and the loss.
    - :math:`S` is a running mean of the size of the task loss, 1 where it is not told.

    Units are pushed up only where every cost is under its *final* target, and where a group has lost its last unit.

    Args:
        costs: what units cost.
        targets: cost to end at, by kind.
        hold: optimizer steps before the reference starts to fall.
        ramp: optimizer steps in which it falls.
        equality: whether costs under all targets are brought up again.
        control: how fast multipliers move.
        calibrated: whether chances are chances. Where they only stand in for them, the expected cost can be over a
            target that the fixed gates meet; its price is then 0 once the reference has arrived.

    Example:
        >>> from secateur.budgets.budget import Budget
        >>> from secateur.budgets.costs import CostModel
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> controller = Budget(keep_params=0.5).start(CostModel(sc.trace(net, examples=(torch.zeros(1, 4),))))
        >>> chances = torch.full((8,), 0.9, requires_grad=True)
        >>> controller.step(chances, chances > 0.5)
        >>> controller.exact.params, controller.target
        (58, {'params': 29})

    Reference:
        Cotter, Jiang, Sridharan, Two-Player Games for Efficient Non-Convex Constrained Optimization, 2019 (proxy
        constraints); Gallego-Posada et al., Controlled Sparsity via Constrained Optimization, 2022 (restarts).
    """

    def __init__(
        self,
        costs: CostModel,
        targets: Mapping[str, int],
        *,
        hold: int,
        ramp: int,
        equality: bool = True,
        control: Control | None = None,
        calibrated: bool = True,
    ) -> None:
        super().__init__(costs)
        self.target: dict[str, int] = dict(targets)
        self.control = control or Control()
        self.hold, self.ramp, self.equality, self.calibrated = hold, ramp, equality, calibrated
        #: optimizer steps so far
        self.steps = 0
        #: Lagrange multipliers of the expected costs, by kind
        self.prices: dict[str, float] = dict.fromkeys(self.target, 0.0)
        #: multiplier of the fixed gates' cost
        self.push = LEAST_PUSH
        self._worst: str = next(iter(self.target))
        self._integral: dict[str, float] = dict(self.prices)
        self._start: dict[str, float] = {}
        self._scale: float | None = None
        self._peak = 0.0
        self._losses: list[float] = []
        self._weights: NDArray[Any] | None = None
        self._point: tuple[NDArray[Any], Point] | None = None

    def reference(self, kind: str) -> float:
        """What the cost of that kind is steered to now: the target at the end of the schedule."""
        goal = math.log(max(self.target[kind], 1))
        start = self._start.get(kind, math.log(max(self.costs.dense.of(kind), 1)))
        passed = self.steps - self.hold
        done = min(max(passed / self.ramp, 0.0), 1.0) if self.ramp else float(passed >= 0)
        return math.exp((1.0 - done) * max(start, goal) + done * goal)

    def loss(self, prob_open: Tensor, fixed_open: Tensor | None = None, *, task_loss: Tensor | None = None) -> Tensor:
        """What to add to the task loss; changes no multiplier, so minibatches can be accumulated.

        Args:
            prob_open: ``(U,)``, chance of each unit, or what stands for it, with a graph to the gates' parameters.
            fixed_open: not needed: the pattern that `step` was told counts.
            task_loss: the loss that this is added to; its size sets the scale, 1 without it.

        Raises:
            BudgetError: the task loss is not finite; nothing was changed.
        """
        size = self.hear(task_loss)
        scale = size if self._scale is None else max(self._scale, LEAST_SCALE * self._peak)
        prices = {kind: price for kind, price in self.prices.items() if price}
        if not prices and self._weights is None:
            return prob_open.new_zeros(())
        chances = on_host(prob_open)
        point = self._at(chances)
        values = {kind: max(cost, SMALLEST) for kind, cost in zip(self.costs.rows, point.values.tolist(), strict=True)}
        scale = scale or 1.0
        value, pull = 0.0, None
        if prices:
            value = scale * sum(price * math.log(values[kind] / self.reference(kind)) for kind, price in prices.items())
            weights = [scale * prices.get(kind, 0.0) / cost for kind, cost in values.items()]
            pull = point.pull(weights, chances.dtype)
        if self._weights is not None:
            worst = [scale / cost if kind == self._worst else 0.0 for kind, cost in values.items()]
            pushed = point.pull(worst, chances.dtype)
            pushed *= self._weights
            pull = pushed if pull is None else np.add(pull, pushed, out=pull)
        return _Pulled.apply(prob_open, torch.from_numpy(pull).to(prob_open), value)  # type: ignore[no-any-return, no-untyped-call]

    def hear(self, task_loss: Tensor | None) -> float | None:
        """Note the size of a task loss, which sets the scale; None is not noted.

        Raises:
            BudgetError: the loss is not finite; nothing was changed.
        """
        if task_loss is None:
            return None
        size = abs(float(task_loss.detach()))
        if not math.isfinite(size):
            raise BudgetError(
                f"Controller.loss: the task loss is {size}, expected a finite number; the budget's multipliers are"
                " unchanged. Lower the learning rate, or find the batch that diverged"
            )
        self._losses.append(size)
        return size

    @torch.no_grad()
    def step(
        self,
        prob_open: Tensor,
        fixed_open: Tensor,
        *,
        scores: Tensor | Callable[[], Tensor] | None = None,
        passed: int = 1,
    ) -> None:
        """Move the multipliers; after each optimizer step, or as far as in so many of them.

        Args:
            prob_open: ``(U,)``, chance of each unit, or what stands for it.
            fixed_open: bool ``(U,)``, units that evaluation opens.
            scores: ``(U,)``, the order in which units are pushed closed, lowest first, infinite for units without a
                gate, or what gives it, asked where units must flip; by default the chances, where exactly 1 means no
                gate.
            passed: optimizer steps since the last call, at least 1.

        Raises:
            BudgetError: a chance is not finite; nothing was changed.
        """
        chances, is_open = on_host(prob_open), on_host(fixed_open)
        values = dict(zip(self.costs.rows, self._at(chances).values.tolist(), strict=True))
        wrong = [f"{kind} {value}" for kind, value in values.items() if not math.isfinite(value)]
        if wrong:
            self._losses.clear()
            raise BudgetError(
                f"Controller.step: the expected cost is {', '.join(wrong)}, expected finite numbers; the multipliers"
                " are unchanged. The gates' parameters have diverged: lower gate_lr and start from the last checkpoint"
            )
        n_open = self.costs.n_open(is_open)
        exact = self.costs.cut(n_open)
        if not self._start:
            self._start = {kind: math.log(max(exact.of(kind), 1)) for kind in self.target}
        self.steps += passed
        self._costs_now = self.costs.cost([*values.values()]), exact
        if self._losses:
            mean = sum(self._losses) / len(self._losses)
            scale = mean if self._scale is None else self._scale
            for _ in range(passed):
                scale += (mean - scale) / LOSS_MEMORY
            self._scale, self._peak = scale, max(self._peak, scale)
            self._losses.clear()
        self._ascend(values, exact, passed)
        if self.control.push_growth:
            order = Order(self.costs, chances, n_open, scores)
            self._weights = self._steered(exact, n_open, is_open, order, passed)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as numbers and one tensor."""
        return {
            "target": dict(self.target),
            "steps": self.steps,
            "prices": dict(self.prices),
            "integral": dict(self._integral),
            "push": self.push,
            "worst": self._worst,
            "start": dict(self._start),
            "scale": self._scale,
            "peak": self._peak,
            "losses": list(self._losses),
            "weights": None if self._weights is None else torch.from_numpy(self._weights.copy()),
            "costs": [[cost.of(name) for name in self.costs.rows] for cost in self._costs_now],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            BudgetError: the state is of another target.
        """
        if dict(state["target"]) != self.target:
            raise BudgetError(
                f"Controller.load_state_dict: the state was steering to {dict(state['target'])}, this budget is"
                f" {self.target}; start from the budget that the state was saved with"
            )
        self.steps, self.push, self._worst = int(state["steps"]), float(state["push"]), state["worst"]
        self.prices, self._integral = dict(state["prices"]), dict(state["integral"])
        self._start, self._scale, self._peak = dict(state["start"]), state["scale"], state["peak"]
        self._weights = None if state["weights"] is None else on_host(state["weights"]).copy()
        expected, exact = (self.costs.cost(numbers) for numbers in state["costs"])
        self._costs_now = expected, exact
        self._losses = [*state["losses"]]

    def _at(self, chances: NDArray[Any]) -> Point:
        """Expected costs with their slopes; worked out once where a step and the loss after it see the same chances."""
        if self._point is None or not np.array_equal(self._point[0], chances):
            self._point = chances.copy(), self.costs.at(chances)
        return self._point[1]

    @property
    def _arrived(self) -> bool:
        """Whether the reference stands at the target."""
        return self.steps >= self.hold + self.ramp

    def _ascend(self, expected: Mapping[str, float], exact: Cost, passed: int) -> None:
        """Dual ascent of the prices."""
        control = self.control
        for kind, target in self.target.items():
            violation = math.log(max(expected[kind], SMALLEST) / self.reference(kind))
            met = not self.calibrated and self._arrived and exact.of(kind) <= target
            if met or (violation <= 0.0 and control.restart):
                self._integral[kind] = self.prices[kind] = 0.0
                continue
            integral = self._integral[kind] + passed * control.price_step * violation
            self._integral[kind] = min(max(integral, 0.0), control.price_limit)
            price = self._integral[kind] + control.proportional * violation
            self.prices[kind] = min(max(price, 0.0), control.price_limit)

    def _steered(
        self, exact: Cost, n_open: NDArray[np.int64], is_open: NDArray[np.bool_], order: Order, passed: int
    ) -> NDArray[Any]:
        """Choose the units to push, and grow or shrink the push; how much each one is pushed, ``(U,)``."""
        control = self.control
        weights, off, over = self._misplaced(exact, is_open, order)
        for group in np.flatnonzero(n_open < self.costs.floor).tolist():
            own = np.flatnonzero(self.costs.segment.numpy() == group)
            weights[own[order.scores[own].argmax()]] = -1.0
        falling = self.hold < self.steps < self.hold + self.ramp
        allowed = control.tolerance
        if falling:
            fall = self._start[self._worst] - math.log(max(self.target[self._worst], 1))
            allowed += control.lag * max(fall, 0.0) / self.ramp
        size = min(max(off / allowed - 1.0, -1.0), 1.0)
        if over and self._arrived:
            # Whatever is over the target now is what a projection would flip at the end, untrained.
            size = 1.0
        growth = (0.5 if falling else 1.0) * control.push_growth if size > 0.0 else control.push_decay
        largest = LARGEST_UNTOLD if self._scale is None else LARGEST_PUSH
        self.push = min(max(self.push * (1.0 + growth * size) ** passed, LEAST_PUSH), largest)
        weights *= min(max(off / allowed, 1.0), control.push_gain) * self.push
        return weights

    def _misplaced(self, exact: Cost, is_open: NDArray[np.bool_], order: Order) -> tuple[NDArray[Any], float, bool]:
        """Direction of the push for each unit ``(U,)``, positive towards closed, how far off the cost is, if over."""
        control = self.control
        now = {kind: math.log(max(exact.of(kind), 1)) for kind in self.target}
        over = {kind: cost - math.log(self.reference(kind)) for kind, cost in now.items()}
        self._worst = max(over, key=lambda kind: over[kind])
        # At the target a unit that opens again costs another one: what is closed is held as hard as others are closed.
        hold = 1.0 if self._arrived else control.hold
        weights = np.multiply(~is_open, hold, dtype=order.dtype)
        if over[self._worst] > 0.0:
            goal = next(goal for goal in goals(self.target) if self._worst in goal)
            limits = {kind: int(self.reference(kind)) for kind in goal}
            weights[self._to_flip(order.scores, is_open, limits, goal, closing=True)] = 1.0
            return weights, over[self._worst], True
        under = {kind: math.log(max(self.target[kind], 1)) - cost for kind, cost in now.items()}
        for goal in goals(self.target) if self.equality else ():
            least = min(goal, key=lambda kind: under[kind])
            if under[least] > 0.0 and len(
                move := self._to_flip(order.scores, is_open, self.target, goal, closing=False)
            ):
                self._worst = least
                weights.fill(-control.leak)
                weights[move] = -1.0
                return weights, under[least], False
        return weights, 0.0, False

    def _to_flip(
        self,
        scores: NDArray[Any],
        is_open: NDArray[np.bool_],
        limits: Mapping[str, int],
        goal: Mapping[str, int],
        *,
        closing: bool,
    ) -> NDArray[np.int64]:
        found = flips(self.costs, scores, is_open, limits, goal, closing=closing)
        if self._arrived and (len(found) or not closing):
            found = settled(self.costs, scores, is_open, limits, goal, found, closing=closing)
        return found


class _Pulled(torch.autograd.Function):
    """A value with a gradient of its own: that of the Lagrangian's terms, and of the push."""

    @staticmethod
    def forward(ctx: Any, prob_open: Tensor, pull: Tensor, value: float) -> Tensor:
        ctx.pull = pull
        return prob_open.new_full((), value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        return outer[0] * ctx.pull, None, None
