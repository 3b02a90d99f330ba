"""The pruner that accompanies the training of a gated model.

Index conventions: ``Z`` gates of the model in a row, rule by rule; ``U`` counted units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.budgets.budget import Budget
from secateur.budgets.controller import Controller
from secateur.budgets.costs import CostModel
from secateur.budgets.penalty import PenaltyTerm
from secateur.compaction.compact import cut_of
from secateur.errors import GateError
from secateur.pruning.activity import ActivityL2
from secateur.pruning.arguments import STATE_VERSION, check_optimizer, check_scale, check_shrink, check_state
from secateur.pruning.conditional import Conditional, When
from secateur.pruning.draw import Draw
from secateur.pruning.draws import Live, gates_of, live_of
from secateur.pruning.estimate import Closure, Credit, task_loss
from secateur.pruning.finalize import (
    Report,
    as_now,
    baked,
    cut_to,
    differences,
    pin,
    proved,
    runnable,
    with_multipliers_,
)
from secateur.pruning.gateset import GateSet
from secateur.pruning.landing import Landing
from secateur.pruning.loading import refuse_dense_keys
from secateur.pruning.loop import Loop
from secateur.pruning.optimizers import parameter_groups
from secateur.pruning.outputs import multipliers
from secateur.pruning.placement import strip
from secateur.pruning.pressure import Pressure
from secateur.pruning.resize import check_free, check_holds, check_resizable, check_unwrapped, resize_, resized
from secateur.pruning.shrink import CHANCE, CHECKS, Removal, Shrinkage, gated_root, why_not
from secateur.pruning.units import Units
from secateur.structure.example import Example, Examples, as_examples
from secateur.structure.groups import Cost, Group
from secateur.structure.tensors import named_tensors

__all__ = ["Pruner"]


class Pruner:
    """Accompanies the training of a gated model; made by `attach`.

    Attributes:
        model: the gated model, None after `detach` or an in-place `finalize`.
        structure: what can go from it.
        groups: what has gates, in the order of the gates.
        costs: cost as a function of open units.
        conditional: what `loss` leaves out of its passes.
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
        conditional: When = False,
    ) -> None:
        self.structure = units.structure
        self.groups: tuple[Group, ...] = units.groups
        self.costs = costs
        self._model: nn.Module | None = model
        self._units = units
        self._budget = budget
        self._examples = examples
        self._pressure = Pressure(units, controller, l2, self._scores)
        self._removal = Removal(units)
        self.conditional = Conditional(conditional, units, self._removal)
        self._landing = Landing(units, costs, self._scores)
        self._loop = Loop(controller is not None)

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
    def controller(self) -> Controller | PenaltyTerm | None:
        """The state of the budget or penalty, for displays (``controller.target``); None without either."""
        return self._pressure.controller

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

    @property
    def why_whole(self) -> str:
        """Why `shrink` refuses this model, whatever is closed; "" where it does not."""
        return why_not(self.gates, self.groups, l2_into_gates=(l2 := self._pressure.l2) is not None and l2.into_gates)

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
        check_optimizer(optimizer)
        self._loop.check(optimizer.param_groups, self.gates)

    def loss(self, closure: Closure, scale: float = 1.0, draws: int = 1, credit: Credit = "all") -> Tensor:
        """Run the model and return one scalar whose backward is right for every gate: task loss plus pressure.

        Args:
            closure: runs the model on one minibatch and returns its loss. It is called once, twice with ARM gates.
            scale: factor of task loss and pressure alike: 1/k where k minibatches make one optimizer step.
            draws: of ARM and AR gates, whose estimates are averaged; each takes passes of its own, without a graph but
                for the first. Other gates have one draw, whatever this says.
            credit: ``"all"``: one second pass, whose difference all ARM gates share. ``"group"``: one for each group of
                units with the others' draws kept, which takes the others' noise out of its estimate.

        Raises:
            GateError: the closure is none, or returns no finite scalar, or ``scale`` or ``draws`` is out of its range;
                gates, draws, buffers and random states are unchanged then.
        """
        check_scale(scale)
        model = self.model
        self._loop.lost(self.gates.training)
        task = self.conditional.run(model, closure, lambda: task_loss(model, closure, draws, credit))
        pressure = self._pressure.loss(model, self.gates, task.detach() if self.gates.training else None)
        total = task if pressure is None else task + pressure.to(task.device)
        return total if scale == 1.0 else scale * total

    def backward(self, closure: Closure, scale: float = 1.0, draws: int = 1, credit: Credit = "all") -> Tensor:
        """`loss`, its backward pass, and the detached value."""
        loss = self.loss(closure, scale, draws, credit)
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
        self._loop.lost(self.gates.training)
        pressure = self._pressure.loss(self.model, self.gates)
        return torch.zeros((), device=self.gates.device) if pressure is None else pressure

    def step(self) -> None:
        """After each optimizer step: bring gates back into their range and move the budget's multipliers.

        The first call looks at the optimizers in use, as `check` does; so does each one after a call that was refused.

        Raises:
            GateError: an optimizer gives gates weight decay, or trains weights but no gates.
        """
        gates = self.gates
        self._loop.stepped(self.model, gates)
        gates.pinned = None
        gates.constrain_()
        self._pressure.step(gates)

    def draw(self) -> None:
        """Draw all gates anew, for loops that call parts of the model and never the model itself."""
        live = self._live()
        live.draw, live.replay = Draw.make(self.gates, live.generator), None

    def shrink(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        ema: nn.Module | Sequence[nn.Module | list[Tensor]] = (),
        checks: int = CHECKS,
        chance: float = CHANCE,
    ) -> Shrinkage:
        """Remove units that have stayed closed, for good and in place, so that the steps that follow are cheaper.

        Each call is a check. A unit goes once its gate in evaluation was 0 at ``checks`` of them in a row and its open
        chance is at most ``chance``; one of each group stays, and as many as the budget asks for. Weights, buffers,
        their gradients and the optimizer's state lose the unit's slices and are new objects: lists of parameters that
        you keep must be made anew. All else goes on as it was, schedules, multipliers and counts of the dense model
        included; gates of units that are gone stay in the tensors of gates and act on nothing. What is left trains as
        it would have with the closed units' draws closed, but for what mixes all parameters (clipping by their norm).

        Args:
            optimizer: that trains the model, or all of them: SGD, Adam, AdamW, RMSprop, Adagrad and any other whose
                state has the shape of its parameter or is a scalar.
            ema: copies of the gated model that are to follow, such as ``torch.optim.swa_utils.AveragedModel``, or lists
                of tensors, one for each of ``model.parameters()`` in their order.
            checks: calls in a row at which a unit must be closed, at least 1.
            chance: largest open chance, in (0, 1).

        Raises:
            GateError: the model is wrapped (DistributedDataParallel, FSDP), a forward pass still waits for its
                backward, an optimizer does not hold the parameters or keeps state of unknown shape, a method looks at
                norms of weights, or gates act on outputs. Nothing was changed then.
        """
        check_shrink(optimizer, ema, checks, chance)
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        copies = [ema] if isinstance(ema, nn.Module) else list(ema)
        model, gates, removal = self.model, self.gates, self._removal
        check_holds(optimizers, model)
        check_free(model)
        if self.why_whole:
            raise GateError(f"shrink: {self.why_whole}")
        models = [model, *(gated_root(copy, model) for copy in copies if isinstance(copy, nn.Module))]
        beside = [copy for copy in copies if isinstance(copy, list)]
        gates.pinned = None
        limits = {} if self._budget is None else self._budget.targets(self.costs.dense)
        with torch.no_grad():
            now = gates.fixed() == 0, gates.prob_open(), gates.score()
        due = removal.due(*now, checks, chance, lambda left: self._landing.reaches(left, limits))
        before = removal.left
        if bool(due.any()):
            changes = removal.changes(model, due)
            check_unwrapped(model)
            check_resizable(optimizers, [(change.name, change.tensor) for change in changes])
            parameters = list(model.parameters())
            for tensors in beside:
                resized(tensors, parameters, parameters, [])  # refused before anything is changed
            removal.remove(models, due)
            made = removal.made(model, changes)
            resize_(optimizers, made)
            for tensors in beside:
                tensors[:] = resized(tensors, parameters, list(model.parameters()), made)
        left = removal.left
        return Shrinkage(self._units.lost(before, left), self.costs.exact(left), self.costs.dense, removal.whole)

    def finalize(
        self, *, examples: Examples | None = None, in_place: bool = False, round_to: int = 1
    ) -> tuple[nn.Module, Report]:
        """End the pruning: fix the gates, meet the budget, cut, prove, report.

        The small model is a plain module with the gates folded into its weights, and in the same mode as the gated one.
        Evaluation mode of the gated model uses the very gates that were cut, those the projection flipped included,
        until the next `step`.

        Args:
            examples: inputs for the proof; by default those of `attach`, else of the first training batch (its first
                rows, where the model runs on these).
            in_place: cut the model itself, and detach.
            round_to: number of which the widths are to be multiples where they can, such as 8: closed units stay for
                that, as zeros (`secateur.rounded_keep`). They count, so a budget closes more units then.

        Raises:
            CompactionError: the proof failed, or an output differs from the gated model's; the model is as it was.
            BudgetError: the budget is out of reach.
        """
        model, gates, units = self.model, self.gates, self._units
        self._loop.ended()
        calls = self._proof_examples(examples)
        before, gates.pinned = gates.pinned, None  # a second call starts where the first one did
        try:
            was_open = units.open(gates.fixed()).cpu()
            is_open = was_open if self._budget is None else self._landing.within(self._budget, was_open, round_to)
            same = torch.equal(is_open, was_open)
            fixed = gates.fixed() if same else gates.fixed_with(units.gates(is_open).to(gates.device))
            pin(model, fixed.detach().clone())
            plain = baked(model, self._removal)
            small = cut_to(plain, units, is_open, round_to=round_to)
            proof = proved(plain, small, units, is_open, calls, round_to=round_to)
            stays = units.stays(is_open, round_to)
            with_multipliers_(small, multipliers(model), units, is_open, round_to)
            apart = differences(model, small, units, is_open, calls, self._removal, round_to=round_to)
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
        """Take the gates off: the model is what it was before `attach`, its weights as trained, without gates.

        What `shrink` removed does not come back: the model is then as small as it was, and has a ``cut_plan``.
        """
        model = self._stripped()
        self._removal.settle(model)
        return model

    def state_dict(self) -> dict[str, Any]:
        """What, besides the model's and the optimizer's state dicts, a run needs to continue bit for bit."""
        return {
            "version": STATE_VERSION,
            "removal": self._removal.state_dict(),
            "generator": self._live().generator.get_state(),
            "pressure": self._pressure.state_dict(),
            "mean_loss": self._live().mean_loss,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, on a model that was attached with the same arguments.

        Where units were gone already, they are taken out of the model now. So resume in this order: this, the model's
        ``load_state_dict``, and then the optimizer and copies of the model, made anew with their own.

        Raises:
            GateError: the state is none, of another version, or of a run with another kind of pressure; units were gone
                then that an optimizer or a forward pass still needs, or are gone here that were not then. Nothing was
                changed.
            BudgetError: it is of a run with another budget; nothing was changed.
        """
        check_state(state)
        self._pressure.check_state(state["pressure"], self.gates)
        self._removal.load_state_dict(state["removal"], self.model)
        self._pressure.load_state_dict(state["pressure"], self.gates)
        live = self._live()
        live.generator.set_state(state["generator"].cpu())
        live.draw = live.replay = None
        live.mean_loss = state.get("mean_loss")

    def __repr__(self) -> str:
        kind = "detached" if self._model is None else type(self._model).__name__
        return f"Pruner({kind}, groups={len(self.groups)}, units={sum(group.size for group in self.groups)})"

    def _stripped(self) -> nn.Module:
        model = self.model
        strip(model)
        refuse_dense_keys(model)
        self._model = None
        return model

    def _scores(self, is_open: Tensor) -> Tensor:
        """Order in which units are closed, on the device of ``is_open``; nothing can open those that are gone."""
        scores = self._units.scores(self.gates.score().to(is_open.device), is_open)
        if self._removal.plan is None:
            return scores
        return scores.masked_fill(self._removal.gone_units.to(scores.device), -torch.inf)

    def _live(self) -> Live:
        return live_of(self.gates)

    def _proof_examples(self, examples: Examples | None) -> tuple[Example, ...]:
        if examples is not None:
            return as_examples(examples)
        if self._examples:
            return tuple(as_now(self.model, example) for example in self._examples)
        noted = self._live().example
        return () if noted is None else (runnable(self.model, noted),)

    def _cut_in_place(self, is_open: Tensor, round_to: int) -> nn.Module:
        model = self.model
        weights, left = named_tensors(baked(model, self._removal)), multipliers(model)
        self._removal.grow_(self._stripped())
        with torch.no_grad():
            for name, tensor in named_tensors(model).items():
                if not torch.equal(tensor, weights[name]):
                    tensor.copy_(weights[name])
        cut_to(model, self._units, is_open, in_place=True, round_to=round_to)
        return with_multipliers_(model, left, self._units, is_open, round_to)
