"""What a budget, a penalty and an L2 term add to the loss, and when their multipliers move.

Index conventions: ``Z`` gates of the model in a row; ``U`` counted units.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from secateur.budgets.controller import Controller
from secateur.budgets.penalty import PenaltyTerm
from secateur.errors import GateError, SecateurError
from secateur.pruning.activity import ActivityL2, activity
from secateur.pruning.gateset import GateSet
from secateur.pruning.units import Units

__all__ = ["Pressure"]

#: Most optimizer steps from one move of a budget's multipliers to the next.
STEPS_BETWEEN = 8
#: How often they move at least while the budget's target falls.
MOVES = 1000
#: From so many gates on, each time as many make it one step more, down to so many moves.
GATES_AT_ONCE = 32_768
FEWEST_MOVES = 200


class _Held(NamedTuple):
    """A term of the loss that serves several steps: its value, and its gradient in the gates' parameters."""

    value: Tensor
    sources: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]

    @property
    def fits(self) -> bool:
        """Whether the parameters are still of the type and on the device that they were of."""
        pairs = zip(self.sources, self.grads, strict=True)
        return all(source.dtype == grad.dtype and source.device == grad.device for source, grad in pairs)


class Pressure:
    """The terms of the loss that belong to no minibatch.

    In a long training, and over very many gates, as on single weights, a budget's multipliers move at every k-th
    optimizer step, as far as in k steps, and its gradient stays the same from one move to the next: what a budget takes
    is mostly to look at all gates. A training whose target falls in fewer than `MOVES` steps has k = 1.

    Args:
        units: what is counted.
        controller: of a budget or a penalty, or None.
        l2: of the gated weights, or None.
        scores: from the units that are open, bool ``(U,)``, the order in which they are pushed closed, ``(U,)``.
    """

    def __init__(
        self,
        units: Units,
        controller: Controller | PenaltyTerm | None,
        l2: ActivityL2 | None,
        scores: Callable[[Tensor], Tensor],
    ) -> None:
        self.controller, self.l2 = controller, l2
        self._units, self._scores = units, scores
        self._waited = 0
        self._held: _Held | None = None

    def between(self, gates: GateSet) -> int:
        """Optimizer steps from one move of the multipliers to the next, k."""
        controller = self.controller
        # Norms change with the weights, so what looks at them has another gradient in every step.
        if not isinstance(controller, Controller) or any(gate.method.uses_norms for gate, _ in gates):
            return 1
        many = min(1 + gates.total // GATES_AT_ONCE, controller.ramp // FEWEST_MOVES)
        return min(max(1, many, controller.ramp // MOVES), STEPS_BETWEEN)

    def loss(self, model: nn.Module, gates: GateSet, task_loss: Tensor | None = None) -> Tensor | None:
        """The sum of all terms, a scalar; None where there are none.

        Args:
            model: gated.
            gates: of the model.
            task_loss: what it is added to; its size sets the scale.
        """
        terms = []
        if self.controller is not None:
            terms.append(self._steering(gates, task_loss))
        if self.l2 is not None:
            chances = gates.prob_open()
            weighed = activity(model, chances if self.l2.into_gates else chances.detach())
            terms.append(self.l2.factor * weighed)
        if len(terms) < 2:
            return terms[0] if terms else None
        return terms[0] + terms[1].to(terms[0])

    def step(self, gates: GateSet) -> None:
        """After an optimizer step: move the multipliers, if it is their turn."""
        if self.controller is None:
            return
        self._waited += 1
        passed = self._waited
        if passed < self.between(gates):
            return
        self._waited, self._held = 0, None
        with torch.no_grad():
            is_open = self._units.open(gates.fixed())
            chances = self._units.chances(gates.prob_open())
            self.controller.step(chances, is_open, scores=lambda: self._scores(is_open), passed=passed)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        held = None if self._held is None else {"value": self._held.value, "grads": list(self._held.grads)}
        own = None if self.controller is None else self.controller.state_dict()
        return {"controller": own, "waited": self._waited, "held": held}

    def check_state(self, state: Mapping[str, Any], gates: GateSet) -> None:
        """Refuse what `state_dict` gave of another kind of pressure; nothing is changed.

        Raises:
            GateError: it is.
            BudgetError: it is of another budget.
        """
        advice = "attach with the same arguments as the run that saved it"
        if (state["controller"] is None) != (self.controller is None):
            saved, here = ("without", "with") if state["controller"] is None else ("with", "without")
            raise GateError(
                f"the pruner state was saved {saved} a budget or penalty, and this pruner was attached {here} one;"
                f" {advice}"
            )
        # Copies take it first: they put its numbers in the place of those that they share, and write to none.
        trial = copy.copy(self)
        trial.controller = copy.copy(self.controller)
        other = f"the pruner state was saved with another kind of budget or penalty than this pruner has; {advice}"
        try:
            trial.load_state_dict(state, gates)
        except SecateurError:
            raise
        except Exception as error:
            raise GateError(other) from error
        held = trial._held
        if held is not None and any(a.shape != b.shape for a, b in zip(held.sources, held.grads, strict=True)):
            raise GateError(f"the pruner state is of gates of other shapes than this pruner has; {advice}")

    def load_state_dict(self, state: Mapping[str, Any], gates: GateSet) -> None:
        """Continue from `state_dict`.

        Raises:
            BudgetError: it is of another budget.
        """
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])
        held, sources = state["held"], gates.trained
        self._waited = int(state["waited"])
        self._held = None
        if held is not None:
            grads = (grad.to(source.device) for grad, source in zip(held["grads"], sources, strict=True))
            self._held = _Held(held["value"].to(gates.device), sources, tuple(grads))

    def _steering(self, gates: GateSet, task_loss: Tensor | None) -> Tensor:
        """The controller's term."""
        assert self.controller is not None
        if self._held is not None and self._held.fits and isinstance(self.controller, Controller):
            self.controller.hear(task_loss)
            return _Again.apply(self._held, *self._held.sources)  # type: ignore[no-any-return, no-untyped-call]
        term = self.controller.loss(self._units.chances(gates.prob_open()), task_loss=task_loss)
        if not term.requires_grad or self.between(gates) == 1:
            return term
        sources = gates.trained
        grads = torch.autograd.grad(term, sources, materialize_grads=True)
        self._held = _Held(term.detach(), sources, grads)
        return _Again.apply(self._held, *sources)  # type: ignore[no-any-return, no-untyped-call]


class _Again(torch.autograd.Function):
    """A held term, with the gradient that it had."""

    @staticmethod
    def forward(ctx: Any, held: _Held, *_: Tensor) -> Tensor:
        ctx.held = held
        return held.value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(grad * one for one in ctx.held.grads))
