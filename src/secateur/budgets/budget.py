"""The size that a user asks for, and the exact landing on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from secateur.budgets.control import Control
from secateur.budgets.controller import Controller
from secateur.budgets.costs import KINDS, NO_LATENCY, CostModel
from secateur.budgets.parts import Part
from secateur.budgets.projection import project_onto
from secateur.errors import BudgetError
from secateur.structure.groups import Cost

__all__ = ["Budget", "feasible", "project"]

#: What can be said of a part's size, and what is counted then.
PART_SIZES: Mapping[str, Literal["params", "macs", "units"]] = {
    "keep_params": "params",
    "keep_macs": "macs",
    "keep_units": "units",
}
#: Optimizer steps that the schedule's fractions are of where the length of the training is not told: with the default
#: fractions the target stands after 300 steps.
UNTOLD_STEPS = 500
#: Nanoseconds, which a cost counts in, in a millisecond, which users read.
NANOSECONDS = 1e6


@dataclass(frozen=True)
class Budget:
    """The size to end at: shares of the dense model's whole cost, frozen parts included, or absolute numbers.

    The cost of the gates that evaluation uses is brought to the target during training by a `Controller`; what is left
    at the end, a few units at most, is closed or opened by `project`. With several targets the tightest one is met and
    the others hold as upper bounds.

    Args:
        keep_params: share of the parameters, in (0, 1], or their number, an int over 1.
        keep_macs: share of the multiply-accumulates of one forward pass, in (0, 1], or their number, an int over 1.
        latency: share of the dense model's latency as a latency model predicts it, in (0, 1]; needs
            ``sc.attach(structure=latency.structure, ...)`` with ``latency = sc.latency_model(...)``.
        latency_ms: that latency in milliseconds, over 0, instead of a share.
        per: sizes of single parts, by name: ``{"layer3": {"keep_macs": 0.3}}`` for what lies in a module,
            ``{"layer1.0.conv1": {"keep_units": 0.5}}`` for the units of a group; shares of the part's own dense cost,
            or absolute numbers. Parts are brought to their sizes first, then the whole model to its own by what is
            left; it stays below where only units of full parts could fill it up.
        equality: True (default): gates that close by themselves below every target are opened again, so that the size
            stated is the size had. False: a target is an upper bound only.
        steps: optimizer steps of the whole training. Without it the schedule is one for short trainings: tell it,
            or long trainings prune before they have learned what to keep.
        hold: when the target starts to fall from the size at the start: a fraction of ``steps`` in [0, 1], or an int,
            optimizer steps.
        ramp: how long it falls, alike. It falls by equal factors in equal times.
        slack: how far below every target the end may stay, as a share of the dense cost in [0, 1], before `project`
            opens units again that training had closed: what such a unit adds was never trained.
        control: how fast multipliers move; the defaults serve all methods.

    Raises:
        BudgetError: no target, one outside its range, or a schedule longer than the training.

    Gates need optimizer settings of their own. The log-odds of a gate travel about 3 from the start to where it closes
    and up to 7 from certainly open. Adam moves a parameter by at most about its rate in a step, so that the rate of
    1e-3 that suits weights takes 3000 to 7000 steps, and 2e-2 takes 150 to 350: give gates about 20 times the weights'
    rate, or at least 7 over the steps of the ramp. Plain SGD with rate 0.1 moves a gate whose penalty has slope 1e-4
    by 1e-5 a step and never closes it. Weight decay pulls every gate to one chance and fights both loss and budget.

    Example:
        >>> Budget(keep_params=0.1, keep_macs=0.25).targets(Cost(params=1000, macs=40_000))
        {'params': 100, 'macs': 10000}
        >>> Budget(keep_params=1.5)
        Traceback (most recent call last):
        ...
        secateur.errors.BudgetError: Budget: keep_params=1.5, expected a share in (0, 1] or an absolute number as an ...
    """

    keep_params: float | None = None
    keep_macs: float | None = None
    latency: float | None = None
    latency_ms: float | None = None
    per: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    equality: bool = True
    steps: int | None = None
    hold: float = 0.1
    ramp: float = 0.5
    slack: float = 0.01
    control: Control = field(default_factory=Control)

    def __post_init__(self) -> None:
        problems = self._size_problems()
        if self.steps is not None and not (_is_int(self.steps) and self.steps >= 1):
            problems.append(f"steps={self.steps!r}, expected the number of optimizer steps, an int of at least 1")
        for name in ("hold", "ramp"):
            value = getattr(self, name)
            if not (_is_int(value) and value >= 0) and not (isinstance(value, float) and 0.0 <= value <= 1.0):
                problems.append(f"{name}={value!r}, expected a fraction in [0, 1] or a number of steps as an int")
        if not _is_real(self.slack) or not 0.0 <= self.slack <= 1.0:
            problems.append(f"slack={self.slack!r}, expected a share of the dense cost in [0, 1]")
        if not _is_a(self.control, Control):
            problems.append(f"control={self.control!r}, expected a secateur.budgets.control.Control")
        if not problems:
            hold, ramp = self.schedule
            if self.steps is not None and hold + ramp > self.steps:
                problems.append(
                    f"the target stands after hold + ramp = {hold} + {ramp} steps, but the training has {self.steps};"
                    " shorten hold= or ramp="
                )
        if problems:
            raise BudgetError("Budget: " + "; ".join(problems))

    @property
    def schedule(self) -> tuple[int, int]:
        """Optimizer steps of hold and of ramp."""
        steps = UNTOLD_STEPS if self.steps is None else self.steps
        hold, ramp = (value if _is_int(value) else round(value * steps) for value in (self.hold, self.ramp))
        return int(hold), int(ramp)

    def targets(self, dense: Cost) -> dict[str, int]:
        """Cost to end at by kind, for a model of that dense cost; latency in nanoseconds.

        Raises:
            BudgetError: an absolute number is above the dense cost, or a latency is asked for and there is no model
                of it.
        """
        found: dict[str, int] = {}
        for kind, keep in self._wanted.items():
            if kind not in KINDS and kind not in dict(dense.parts):
                raise BudgetError(f"Budget: {kind} is not counted here; expected CostModel(structure, budget.parts)")
            whole = dense.of(kind)
            if kind == "latency" and not whole:
                raise BudgetError(f"Budget: {NO_LATENCY}")
            found[kind] = math.floor(keep * whole * (1 + 1e-12)) if _is_share(keep) else int(keep)
            if found[kind] > whole:
                asked, has = f"keep_{kind}={keep}", f"{whole}"
                if kind == "latency":
                    asked, has = f"latency_ms={self.latency_ms}", f"{whole / NANOSECONDS:.4g} ms as predicted"
                raise BudgetError(
                    f"Budget: {asked}, but the dense model has only {has}; ask for less, or for a share in (0, 1]"
                )
        return found

    @property
    def parts(self) -> tuple[Part, ...]:
        """What a `CostModel` has to count apart for this budget."""
        return tuple(Part(name, PART_SIZES[size]) for name, wanted in self.per.items() for size in wanted)

    def start(self, costs: CostModel, *, calibrated: bool = True) -> Controller:
        """The state of this budget in one training.

        Args:
            costs: what units cost.
            calibrated: whether the gates' chances are chances, and not what stands in for them.

        Raises:
            BudgetError: the budget is above the dense cost or below what a cut can reach; the message names what
                cannot go.
        """
        targets = feasible(costs, self.targets(costs.dense))
        hold, ramp = self.schedule
        return Controller(
            costs,
            targets,
            hold=hold,
            ramp=ramp,
            equality=self.equality,
            control=self.control,
            calibrated=calibrated,
        )

    def _size_problems(self) -> list[str]:
        """What is wrong with the targets."""
        sizes = {"keep_params": self.keep_params, "keep_macs": self.keep_macs}
        problems = [
            f"{name}={keep!r}, expected a share in (0, 1] or an absolute number as an int over 1"
            for name, keep in sizes.items()
            if keep is not None and not _is_share(keep) and not _is_number(keep)
        ]
        if self.latency is not None and not _is_share(self.latency):
            problems.append(f"latency={self.latency!r}, expected a share in (0, 1]; for milliseconds say latency_ms=")
        if self.latency_ms is not None and not (_is_real(self.latency_ms) and 0.0 < self.latency_ms < math.inf):
            problems.append(f"latency_ms={self.latency_ms!r}, expected milliseconds, over 0")
        if self.latency is not None and self.latency_ms is not None:
            problems.append("latency= and latency_ms= both say the latency; leave one out")
        if not _is_a(self.per, Mapping):
            return [
                *problems,
                f"per={self.per!r}, expected sizes by part, for example per={{'conv1': {{'keep_macs': 0.5}}}}",
            ]
        for name, wanted in self.per.items():
            if not _is_a(wanted, Mapping):
                problems.append(f"per[{name!r}]={wanted!r}, expected sizes, for example {{'keep_macs': 0.5}}")
                continue
            unknown = sorted(set(wanted) - set(PART_SIZES))
            if unknown or not wanted:
                problems.append(
                    f"per[{name!r}] has {', '.join(unknown) or 'no size'}, expected some of {', '.join(PART_SIZES)}"
                )
            problems += [
                f"per[{name!r}][{size!r}]={keep!r}, expected a share in (0, 1] or an absolute number as an int over 1"
                for size, keep in wanted.items()
                if not _is_share(keep) and not _is_number(keep)
            ]
        if not self.per and all(size is None for size in (*sizes.values(), self.latency, self.latency_ms)):
            problems.append("no target; say keep_params=, keep_macs=, latency= or several, for example keep_params=0.1")
        return problems

    @property
    def _wanted(self) -> dict[str, float]:
        nanoseconds = None if self.latency_ms is None else max(int(self.latency_ms * NANOSECONDS), 2)
        wanted: dict[str, float | None] = {
            "params": self.keep_params,
            "macs": self.keep_macs,
            "latency": self.latency if nanoseconds is None else nanoseconds,
        }
        of_parts = {part.label: self.per[part.name][f"keep_{part.kind}"] for part in self.parts}
        return {kind: keep for kind, keep in wanted.items() if keep is not None} | of_parts


def project(costs: CostModel, scores: Tensor, is_open: Tensor, budget: Budget | Mapping[str, int]) -> Tensor:
    """The pattern of open units within a budget that flips as few as possible, the least wanted ones.

    See `secateur.budgets.projection.project_onto` for the order.

    Args:
        costs: what units cost.
        scores: ``(U,)``, larger stays longer; infinite for units without a gate, which keep their state.
        is_open: bool ``(U,)``.
        budget: a budget, or the largest allowed cost by kind, to be filled while single units fit.

    Returns:
        bool ``(U,)`` on the CPU. Under a budget with ``equality=False`` a pattern that is within stays as it is.

    Raises:
        BudgetError: the budget is out of reach.
    """
    if isinstance(budget, Budget):
        limits = feasible(costs, budget.targets(costs.dense))
        now = costs.exact(is_open)
        if not budget.equality and now.within(limits):
            return is_open.detach().to("cpu", torch.bool).clone()
        return project_onto(costs, scores, is_open, limits, budget.slack)
    return project_onto(costs, scores, is_open, feasible(costs, budget))


def feasible(costs: CostModel, targets: Mapping[str, int], closed: Cost | None = None) -> dict[str, int]:
    """The targets, if a cut can reach them.

    Args:
        costs: what units cost.
        targets: cost to end at, by kind.
        closed: cost with every gate closed, where not every unit has one.

    Raises:
        BudgetError: with the least reachable number, and what keeps it large.
    """
    problems = []
    for kind, target in targets.items():
        least, dense = costs.least.of(kind), costs.dense.of(kind)
        if target < least:
            problems.append(
                f"{_amount(target, kind)} {kind} ({target / dense:.3%} of {_amount(dense, kind)}) cannot be reached:"
                f" with one unit left in every group {_amount(least, kind)} remain ({least / dense:.3%}), most of them"
                f" {_what_stays(costs, kind)}"
            )
        elif closed is not None and target < closed.of(kind):
            problems.append(
                f"{_amount(target, kind)} {kind} ({target / dense:.3%} of {_amount(dense, kind)}) cannot be reached by"
                f" the units that have gates: with all of these closed, but one of every group,"
                f" {_amount(closed.of(kind), kind)} remain ({closed.of(kind) / dense:.3%}); gate more groups"
            )
        whole = targets.get(kind.partition(" of ")[0], math.inf)
        if target > whole:
            problems.append(f"{kind} is to stay at {target}, but the whole model at {whole}: one contradicts the other")
    if problems:
        raise BudgetError(
            "Budget: " + "; ".join(problems) + ". Raise the budget, or see structure.frozen for what cannot be pruned"
        )
    return dict(targets)


def _amount(value: int, kind: str) -> str:
    return f"{value / NANOSECONDS:.4g} ms" if kind == "latency" else str(value)


def _what_stays(costs: CostModel, kind: str) -> str:
    """The term that is largest in the least model, and why its dimensions are frozen."""
    label = costs.largest_term[kind]
    entries = [entry for entry in getattr(costs.structure, "frozen", ()) if label in (entry.tensor, entry.module)]
    if not entries:
        entries = [e for e in getattr(costs.structure, "frozen", ()) if label and e.tensor.startswith(f"{label}.")]
    reason = max(entries, key=lambda entry: entry.count).reason if entries else ""
    return f"in {label or 'what no unit touches'}" + (f" ({reason})" if reason else "")


def _is_a(value: object, kind: type) -> bool:
    """Whether it is what its type says, which no one checks for those who do not check types."""
    return isinstance(value, kind)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_share(value: object) -> bool:
    """A number in (0, 1]; the integer 1 means all."""
    return _is_real(value) and 0.0 < value <= 1.0  # type: ignore[operator]


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1
