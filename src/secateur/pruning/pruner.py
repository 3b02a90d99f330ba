"""The pruner that accompanies the training of a gated model.

Index conventions: ``Z`` gates of the model in a row, rule by rule; ``U`` counted units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.budgets.budget import Budget, Controller, PenaltyTerm, project
from secateur.budgets.costs import CostModel
from secateur.compaction.compact import cut_of
from secateur.errors import BudgetError, GateError
from secateur.pruning.activity import ActivityL2, activity
from secateur.pruning.draws import Draw, Live, gates_of, live_of
from secateur.pruning.estimate import Closure, task_loss
from secateur.pruning.finalize import Report, baked, cut_to, differences, pin, proved, with_multipliers_
from secateur.pruning.gateset import GateSet
from secateur.pruning.loading import refuse_dense_keys
from secateur.pruning.optimizers import check_groups, groups_in_use, parameter_groups
from secateur.pruning.outputs import multipliers
from secateur.pruning.placement import strip
from secateur.pruning.units import Units
from secateur.structure.example import Example, Examples, as_examples
from secateur.structure.groups import Cost, Group
from secateur.structure.tensors import named_tensors

__all__ = ["Pruner"]

#: Version of what `Pruner.state_dict` returns.
STATE_VERSION = 1
#: Rounds of projection where inputs have gates: the first meets the budget, the others use what it leaves.
PROJECTIONS = 4
#: Halvings in the search for a pattern whose rounded widths are within the budget: to a thousandth of the cost.
HALVINGS = 10


class Pruner:
    """Accompanies the training of a gated model; made by `attach`.

    Attributes:
        model: the gated model, None after `detach` or an in-place `finalize`.
        structure: what can go from it.
        groups: what has gates, in the order of the gates.
        costs: cost as a function of open units.
        controller: the state of the budget or penalty, for displays (``controller.target``); None without either.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Units,
        costs: CostModel,
        budget: Budget | None,
        controller: Controller | PenaltyTerm | None,
        examples: tuple[Example, ...],
        l2: ActivityL2 | None = None,
    ) -> None:
        self.structure = units.structure
        self.groups: tuple[Group, ...] = units.groups
        self.costs = costs
        self._model: nn.Module | None = model
        self._units = units
        self._budget = budget
        self.controller = controller
        self._examples = examples
        self._l2 = l2
        self._checked = False

    @property
    def model(self) -> nn.Module:
        """The gated model."""
        if self._model is None:
            raise GateError("the pruner is detached: its model is plain again; call sc.attach to prune it anew")
        return self._model

    @property
    def gates(self) -> GateSet:
        """The module in the model's tree that owns all gates."""
        return gates_of(self.model)

    @property
    def expected(self) -> Cost:
        """Expected cost of a draw, rounded."""
        with torch.no_grad():
            values = self.costs.expected_vector(self._units.chances(self.gates.prob_open())).tolist()
        return self.costs.cost(values)

    @property
    def exact(self) -> Cost:
        """Cost of the gates that evaluation uses now."""
        return self.costs.exact(self._units.open(self.gates.fixed()).cpu())

    def param_groups(self, lr: float, gate_lr: float | None = None, **options: Any) -> list[dict[str, Any]]:
        """Groups for an optimizer: the weights, then the gates.

        Args:
            lr: rate of the weights.
            gate_lr: rate of the gates, by default 20 times that of the weights (for Adam; plain SGD needs far more).
            options: all else for both groups (``betas``, ``momentum``, ...); ``weight_decay`` reaches only the weights.
        """
        gates = list(self.gates.parameters())
        own = {id(parameter) for parameter in gates}
        weights = [parameter for parameter in self.model.parameters() if id(parameter) not in own]
        return parameter_groups(weights, gates, lr, gate_lr, options)

    def check(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that gives gates weight decay or leaves some out; warn if they share one with weights.

        Raises:
            GateError: with what to do.
        """
        self._checked = True
        check_groups(optimizer.param_groups, self._trained())

    def loss(self, closure: Closure, scale: float = 1.0, draws: int = 1) -> Tensor:
        """Run the model and return one scalar whose backward is right for every gate: task loss plus pressure.

        Args:
            closure: runs the model on one minibatch and returns its loss. It is called once, twice with ARM gates.
            scale: factor of task loss and pressure alike: 1/k where k minibatches make one optimizer step.
            draws: of ARM and AR gates, whose estimates are averaged; each takes passes of its own, without a graph but
                for the first. Other gates have one draw, whatever this says.

        Raises:
            GateError: the closure returns no finite scalar; gates, draws, buffers and random states are unchanged then.
        """
        task = task_loss(self.model, closure, draws)
        pressure = self._pressure(task.detach() if self.gates.training else None)
        return scale * (task if pressure is None else task + pressure.to(task.device))

    def backward(self, closure: Closure, scale: float = 1.0, draws: int = 1) -> Tensor:
        """`loss`, its backward pass, and the detached value."""
        loss = self.loss(closure, scale, draws)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def penalty(self) -> Tensor:
        """The pressure of budget or penalty and of ``l2``, to be added to the task loss; a zero where there is none.

        Raises:
            GateError: a gate's method needs `loss`, for its draws carry no gradient.
        """
        if needed := self.gates.estimators - {"pathwise"}:
            raise GateError(
                f"gates with the estimator {', '.join(sorted(needed))} get the task's gradient only from"
                " pruner.loss(closure); use it instead of adding pruner.penalty()"
            )
        pressure = self._pressure()
        return torch.zeros((), device=self.gates.device) if pressure is None else pressure

    def step(self) -> None:
        """After each optimizer step: bring gates back into their range and move the budget's multipliers once.

        The first call looks at the optimizers in use, as `check` does.

        Raises:
            GateError: an optimizer gives gates weight decay, or trains weights but no gates.
        """
        gates = self.gates
        gates.pinned = None
        if not self._checked:
            self._checked = True
            if groups := groups_in_use(list(self.model.parameters())):
                check_groups(groups, self._trained())
        gates.constrain_()
        if self.controller is not None:
            with torch.no_grad():
                is_open = self._units.open(gates.fixed())
                scores = self._units.scores(gates.score(), is_open)
                self.controller.step(self._units.chances(gates.prob_open()), is_open, scores=scores)

    def draw(self) -> None:
        """Draw all gates anew, for loops that call parts of the model and never the model itself."""
        live = self._live()
        live.draw, live.replay = Draw.make(self.gates, live.generator), None

    def finalize(
        self, *, examples: Examples | None = None, in_place: bool = False, round_to: int = 1
    ) -> tuple[nn.Module, Report]:
        """End the pruning: fix the gates, meet the budget, cut, prove, report.

        The small model is a plain module with the gates folded into its weights, and in the same mode as the gated one.
        Evaluation mode of the gated model uses the very gates that were cut, those the projection flipped included,
        until the next `step`.

        Args:
            examples: inputs for the proof; by default those of `attach`, else the first training batch's first rows.
            in_place: cut the model itself, and detach.
            round_to: number of which the widths are to be multiples where they can, such as 8: closed units stay for
                that, as zeros (`secateur.rounded_keep`). They count, so a budget closes more units then.

        Raises:
            CompactionError: the proof failed; the model is as it was.
            BudgetError: the budget is out of reach.
        """
        model, gates, units = self.model, self.gates, self._units
        calls = self._proof_examples(examples)
        before = gates.pinned
        was_open = units.open(gates.fixed()).cpu()
        is_open = self._projected(was_open, round_to)
        fixed = (
            gates.fixed() if torch.equal(is_open, was_open) else gates.fixed_with(units.gates(is_open).to(gates.device))
        )
        pin(model, fixed.detach().clone())
        try:
            plain = baked(model)
            small = cut_to(plain, units, is_open, round_to=round_to)
            proof = proved(plain, small, units, is_open, calls, round_to=round_to)
            stays = units.stays(is_open, round_to)
            with_multipliers_(small, multipliers(model), units, is_open, round_to)
            apart = differences(model, small, units, is_open, calls, round_to=round_to)
        except BaseException:
            gates.pinned = before
            raise
        everything = {group.name: torch.arange(group.size) for group in self.structure.groups}
        kept = {name: left for name, left in units.keep(stays).items() if name in everything}
        params = units.n_params(small)
        report = Report(
            dense=self.costs.dense,
            gated=self.costs.exact(was_open),
            compact=replace(self.costs.exact(stays), params=params),
            flipped=units.flips(was_open, is_open),
            difference_float32=apart[0],
            difference_float64=apart[1],
            proof=proof,
            keep=everything | kept,
            widths=units.by_group(stays),
            as_zeros=units.closed_free(is_open),
            multiplied=tuple(plan.scales) if (plan := cut_of(small)) is not None else (),
        )
        if in_place:
            small = self._cut_in_place(is_open, round_to)
        return small, report

    def detach(self) -> nn.Module:
        """Take the gates off: the model is what it was before `attach`, its weights as trained, without gates."""
        model = self.model
        strip(model)
        refuse_dense_keys(model)
        self._model = None
        return model

    def state_dict(self) -> dict[str, Any]:
        """What, besides the model's and the optimizer's state dicts, a run needs to continue bit for bit."""
        return {
            "version": STATE_VERSION,
            "generator": self._live().generator.get_state(),
            "controller": None if self.controller is None else self.controller.state_dict(),
            "mean_loss": self._live().mean_loss,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            GateError: the state is of another version, or of a run with another kind of pressure.
        """
        if state.get("version") != STATE_VERSION:
            raise GateError(f"pruner state of version {state.get('version')!r}, expected {STATE_VERSION}")
        if (state["controller"] is None) != (self.controller is None):
            saved, here = ("without", "with") if state["controller"] is None else ("with", "without")
            raise GateError(
                f"the pruner state was saved {saved} a budget or penalty, and this pruner was attached {here} one;"
                " attach with the same arguments as the run that saved it"
            )
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])
        live = self._live()
        live.generator.set_state(state["generator"].cpu())
        live.draw = live.replay = None
        live.mean_loss = state.get("mean_loss")

    def __repr__(self) -> str:
        kind = "detached" if self._model is None else type(self._model).__name__
        return f"Pruner({kind}, groups={len(self.groups)}, units={sum(group.size for group in self.groups)})"

    def _live(self) -> Live:
        return live_of(self.gates)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.gates.parameters() if parameter.requires_grad]

    def _pressure(self, task_loss: Tensor | None = None) -> Tensor | None:
        if self.controller is None and self._l2 is None:
            return None
        chances = self.gates.prob_open()
        terms = []
        if self.controller is not None:
            terms.append(self.controller.loss(self._units.chances(chances), task_loss=task_loss))
        if self._l2 is not None:
            weighed = activity(self.model, chances if self._l2.into_gates else chances.detach())
            terms.append(self._l2.factor * weighed)
        return terms[0] if len(terms) == 1 else terms[0] + terms[1].to(terms[0])

    def _projected(self, was_open: Tensor, round_to: int) -> Tensor:
        """The pattern that is within the budget when its widths are rounded up, and flips few units."""
        if self._budget is None:
            return was_open
        is_open = self._within(self._budget, was_open)
        limits = self._budget.targets(self.costs.dense)
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

    def _fits(self, is_open: Tensor, limits: Mapping[str, int], round_to: int) -> bool:
        cost = self.costs.exact(self._units.stays(is_open, round_to))
        return all(cost.of(kind) <= limit for kind, limit in limits.items())

    def _within(self, budget: Budget | Mapping[str, int], is_open: Tensor) -> Tensor:
        """The pattern within a budget that flips few units, consistent: no input is open whose owner is closed."""
        scores = self.gates.score().cpu()
        is_open = self._loosest(budget, scores, is_open)
        for _ in range(PROJECTIONS):
            wanted = project(self.costs, self._units.scores(scores, is_open), is_open, budget)
            # What closes with its owner makes room that the next round fills.
            before, is_open = is_open, self._units.open(self._units.gates(wanted).float())
            if torch.equal(is_open, before):
                break
        return is_open

    def _loosest(self, budget: Budget | Mapping[str, int], scores: Tensor, is_open: Tensor) -> Tensor:
        """Where single weights have gates, a pattern within the budget that keeps more than closing down to it would.

        Weights that close take with them units that nothing reads then, and these further weights. So they close down
        to the highest cost, halving its interval, from which what goes with them leads into the budget.
        """
        limits = budget.targets(self.costs.dense) if isinstance(budget, Budget) else budget
        units, now, best = self._units, self.costs.exact(is_open), is_open
        if not units.has_weights or all(now.of(kind) <= limit for kind, limit in limits.items()):
            return is_open
        order = units.scores(scores, is_open)
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            share = (low + high) / 2
            looser = {k: limit + int(share * max(now.of(k) - limit, 0)) for k, limit in limits.items()}
            found = units.open(units.gates(project(self.costs, order, is_open, looser)).float())
            cost = self.costs.exact(found)
            if all(cost.of(kind) <= limit for kind, limit in limits.items()):
                low, best = share, found
            else:
                high = share
        return best

    def _proof_examples(self, examples: Examples | None) -> tuple[Example, ...]:
        if examples is not None:
            return as_examples(examples)
        noted = self._live().example
        return self._examples or (() if noted is None else (noted,))

    def _cut_in_place(self, is_open: Tensor, round_to: int) -> nn.Module:
        model = self.model
        weights, left = named_tensors(baked(model)), multipliers(model)
        self.detach()
        with torch.no_grad():
            for name, tensor in named_tensors(model).items():
                if not torch.equal(tensor, weights[name]):
                    tensor.copy_(weights[name])
        cut_to(model, self._units, is_open, in_place=True, round_to=round_to)
        return with_multipliers_(model, left, self._units, is_open, round_to)
