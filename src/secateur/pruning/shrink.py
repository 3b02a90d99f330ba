"""Removing units for good while a model trains: what has stayed closed, and the smaller model that is left in place.

Index conventions: ``Z`` gates of the model in a row, rule by rule; ``U`` counted units. Gates, units and costs keep
their dense numbering: a unit that is gone is one that no weight reads any more and that nothing can open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.compaction.compact import PLAN
from secateur.compaction.mask import plan_of
from secateur.errors import GateError
from secateur.pruning.draws import GATES, gates_of
from secateur.pruning.gateset import GateSet
from secateur.pruning.placement import cut_maps, maps_of, regated
from secateur.pruning.reading import read_all, read_only, settle
from secateur.pruning.resize import check_free, check_resizable, check_unwrapped
from secateur.pruning.rule import ACTIVATIONS
from secateur.pruning.units import Units
from secateur.structure.cut import CutPlan, cut_
from secateur.structure.groups import Cost, Group
from secateur.structure.tensors import dimension_order, in_order, in_place_of, listed, named_tensors, slots_of

__all__ = ["CHANCE", "CHECKS", "Change", "Removal", "Shrinkage", "gated_root", "why_not"]

#: Checks at which a unit must be closed, and its largest open chance, before `Pruner.shrink` removes it: under 0.1 is
#: where every method's unit is closed in evaluation, and hard concrete's clamp, which ends at 0.047, still reaches.
CHECKS, CHANCE = 3, 0.1
#: What modules keep about their own sizes, alone or in tuples.
_NUMBER = (int, float, type(None))


@dataclass(frozen=True)
class Shrinkage:
    """What `Pruner.shrink` did.

    Args:
        removed: units that went now, by group; empty where none was due.
        cost: of the model as it is now, with every unit open that is left; gates not counted.
        dense: of the model before the first unit went.
        whole: groups that shrinking leaves alone, with the reason.
    """

    removed: Mapping[str, int]
    cost: Cost
    dense: Cost
    whole: Mapping[str, str]


@dataclass(frozen=True)
class Change:
    """One tensor that a shrink cuts.

    Args:
        name: qualified, as in the model without gates.
        tensor: as it is before.
        kept: positions that stay of each dimension that is cut.
    """

    name: str
    tensor: Tensor
    kept: Mapping[int, tuple[int, ...]]


class Removal:
    """Which units are gone, and how to take further ones out of a gated model and its copies.

    Args:
        units: of the model.

    Attributes:
        gone: bool ``(Z,)``, gates whose units are gone.
        closed_for: int64 ``(Z,)``, at how many checks in a row each gate was closed.
        whole: groups that are left alone, with the reason.
        plan: what was cut from the dense model so far; None before the first cut.
    """

    def __init__(self, units: Units) -> None:
        self._units = units
        self.gone = torch.zeros(sum(units.sizes), dtype=torch.bool)
        self.closed_for = torch.zeros(len(self.gone), dtype=torch.int64)
        self.whole = {group.name: why for group in units.groups if (why := _why_whole(group))}
        self.plan: CutPlan | None = None
        #: numbers that modules kept about their sizes before the first cut, by path and attribute
        self._dense: dict[tuple[str, str], object] = {}

    @property
    def gone_units(self) -> Tensor:
        """Units that are gone, bool ``(U,)``."""
        return self._units.spread(self.gone)

    @property
    def left(self) -> Tensor:
        """Units that the model still has, bool ``(U,)``."""
        return self._units.open((~self.gone).float())

    def due(
        self,
        closed: Tensor,
        chances: Tensor,
        scores: Tensor,
        checks: int,
        chance: float,
        fits: Callable[[Tensor], bool],
    ) -> Tensor:
        """One check: gates whose units are due to go, bool ``(Z,)``, on the CPU.

        With them go inputs that they own, and units that nothing would read any more.

        Args:
            closed: bool ``(Z,)``, gates that evaluation closes.
            chances: ``(Z,)``, open chance of each gate.
            scores: ``(Z,)``, the order in which a projection closes gates.
            checks: how many checks in a row a gate must have been closed at.
            chance: what its open chance may be at most.
            fits: whether a model with just these units, bool ``(U,)``, is as large as its budget asks for.
        """
        self.closed_for = torch.where(closed.cpu(), self.closed_for + 1, 0)
        scores = scores.detach().cpu()
        ripe = (self.closed_for >= checks) & (chances.detach().cpu() <= chance) & ~self.gone
        order = torch.nonzero(self._without_last(ripe, scores)).flatten()
        order = order[scores[order].argsort(stable=True)]

        def first(length: int) -> Tensor:
            some = torch.zeros_like(self.gone)
            some[order[:length]] = True
            return self._with_unread(some, scores)

        # The more go the less is left, so the largest number that leaves enough is found by halving.
        low, high = 0, len(order)
        while low < high:
            middle = (low + high + 1) // 2
            enough = fits(self._units.open((~(self.gone | first(middle))).float()))
            low, high = (middle, high) if enough else (low, middle - 1)
        return first(low)

    def changes(self, model: nn.Module, due: Tensor) -> list[Change]:
        """The tensors of a gated model that would be cut if these gates' units, bool ``(Z,)``, went too."""
        tensors = _plain_names(model)
        step = self._step(self._plan(self.gone | due))
        return [Change(name, tensors[name], kept) for name, kept in step.tensors.items()]

    def remove(self, models: Sequence[nn.Module], due: Tensor) -> None:
        """Take the units of these gates, bool ``(Z,)``, out of gated models of the same structure, in place."""
        gone = self.gone | due
        plan = self._plan(gone)
        step = self._step(plan)
        for model in models:
            self._cut(model, plan, step, gone)
        self.gone, self.plan = gone, plan

    def grow_(self, plain: nn.Module) -> None:
        """Give a plain model its dense shapes again, in place; what had gone is zero."""
        if self.plan is None:
            return
        read_all(plain)
        slots = slots_of(plain)
        grown: dict[int, Tensor] = {}
        for name, kept in self.plan.tensors.items():
            small = slots[name].tensor
            if id(small) not in grown:
                grown[id(small)] = in_place_of(small, _grown(small.detach(), kept, self.plan.dense[name]))
        for slot in slots.values():
            if id(slot.tensor) in grown:
                setattr(slot.owner, slot.key, grown[id(slot.tensor)])
        for (path, key), value in self._dense.items():
            setattr(plain.get_submodule(path), key, value)

    def made(self, model: nn.Module, changes: Sequence[Change]) -> list[tuple[Tensor, Tensor, Mapping[int, Any]]]:
        """Of every tensor that was changed: what it was, what it is, and the positions that stayed."""
        tensors = _plain_names(model)
        return [(change.tensor, tensors[change.name], change.kept) for change in changes]

    def settle(self, plain: nn.Module) -> None:
        """Make a model that gates were taken off what `secateur.compact` would have made of it."""
        if self.plan is not None:
            settle(plain)
            setattr(plain, PLAN, self.plan)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to cut a dense model alike."""
        return {"gone": self.gone.clone(), "closed_for": self.closed_for.clone()}

    def check_state(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Refuse what `load_state_dict` cannot take; nothing is changed.

        Raises:
            GateError: what is gone here was not gone there, or the model is in use.
        """
        gone, closed_for = state["gone"].cpu(), state["closed_for"].cpu()
        if gone.shape != self.gone.shape or closed_for.shape != self.gone.shape:
            raise GateError(
                f"the pruner state is of {len(gone)} gates, this pruner has {len(self.gone)}; attach with the same"
                " arguments as the run that saved it"
            )
        if bool((self.gone & ~gone).any()):
            raise GateError(
                f"{int((self.gone & ~gone).sum())} units are gone from this model that the saved run still had; attach"
                " to a dense model and load the state there"
            )
        due = gone & ~self.gone
        if bool(due.any()):
            check_free(model)
            check_unwrapped(model)
            check_resizable([], [(change.name, change.tensor) for change in self.changes(model, due)])

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Take out of the model what was gone in that run; what `check_state` refuses is refused before."""
        self.check_state(state, model)
        due = state["gone"].cpu() & ~self.gone
        if bool(due.any()):
            self.remove([model], due)
        self.closed_for = state["closed_for"].cpu().clone()

    def _cut(self, model: nn.Module, plan: CutPlan, step: CutPlan, gone: Tensor) -> None:
        units = self._units
        gates = gates_of(model)
        maps = cut_maps(maps_of(units.groups, units.structure.shapes), units.structure.shapes, plan.tensors)
        with regated(model, gates, maps):
            before = _numbers(model)
            cut_(model, step)
            for place, value in _numbers(model).items():
                if place in before and before[place] != value:
                    self._dense.setdefault(place, before[place])
        read_all(model)
        for path, positions in plan.selects.items():
            read_only(model.get_submodule(path), positions)
        gates.close_for_good(gone)

    def _plan(self, gone: Tensor) -> CutPlan:
        keep, start = {}, 0
        for group in self._units.groups:
            part = gone[start : start + group.size]
            start += group.size
            if bool(part.any()):
                keep[group.name] = torch.nonzero(~part).flatten()
        return plan_of(self._units.cuttable, keep)

    def _step(self, plan: CutPlan) -> CutPlan:
        """From what was cut so far to ``plan``, both in dense positions: what is to be cut from the model as it is."""
        before = {} if self.plan is None else self.plan.tensors
        tensors: dict[str, dict[int, tuple[int, ...]]] = {}
        for name, cuts in plan.tensors.items():
            for dim, kept in cuts.items():
                old = before.get(name, {}).get(dim)
                if old is None:
                    tensors.setdefault(name, {})[dim] = kept
                elif old != kept:
                    tensors.setdefault(name, {})[dim] = tuple(np.searchsorted(old, kept).tolist())
        return CutPlan(tensors=tensors, attributes=plan.attributes)

    def _with_unread(self, due: Tensor, scores: Tensor) -> Tensor:
        """With inputs whose owner goes, and units that nothing reads then."""
        if not bool(due.any()):
            return due
        units = self._units
        due = due | units.gates(units.owner_in(units.spread(self.gone | due)))
        unread = ~units.gates(units.open((~(self.gone | due)).float()))
        return self._without_last((due | unread) & ~self.gone, scores)

    def _without_last(self, due: Tensor, scores: Tensor) -> Tensor:
        """Without groups that are left alone; of each other group the best unit stays."""
        due, start = due.clone(), 0
        for group in self._units.groups:
            part = slice(start, start + group.size)
            start += group.size
            if group.name in self.whole:
                due[part] = False
            elif bool((due | self.gone)[part].all()):
                due[part.start + int(scores[part].masked_fill(self.gone[part], -torch.inf).argmax())] = False
        return due


def why_not(gates: GateSet, groups: Sequence[Group], *, l2_into_gates: bool) -> str:
    """Why what is left would not train as it would have, whatever went; "" if it would."""
    if any(norms is not None for _, norms in gates):
        return (
            "a method looks at norms of weights, to which closed units of other layers add, so what is left would not"
            " train alike; use a method without norms, or cut at the end by finalize"
        )
    if outputs := [group.name for group in groups if group.kind == ACTIVATIONS]:
        return f"gates act on outputs ({listed(outputs)}), which a shrink does not follow; cut at the end by finalize"
    if l2_into_gates:
        return "ActivityL2(into_gates=True) reaches gates through rows of closed units too; switch that off"
    return ""


def gated_root(copy: nn.Module, model: nn.Module) -> nn.Module:
    """The gated module in a copy of a gated model: of `torch.optim.swa_utils.AveragedModel`, or any module that holds
    one.

    Raises:
        GateError: there is none, several, or one with other gates.
    """  # noqa: D205
    roots = [module for module in copy.modules() if GATES in module._modules]
    if len(roots) != 1 or roots[0] is model:
        found = "the gated model itself" if roots and roots[0] is model else f"{len(roots)} gated models"
        raise GateError(
            f"ema: a {type(copy).__name__} that holds {found}, expected one copy of the gated model, such as"
            " torch.optim.swa_utils.AveragedModel(model) made after sc.attach"
        )
    mine, theirs = ({name: tuple(t.shape) for name, t in named_tensors(root).items()} for root in (model, roots[0]))
    if apart := sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)):
        raise GateError(
            f"ema: the copy in {type(copy).__name__} has not the shapes of the model: {listed(apart)}. Pass every copy"
            " to every pruner.shrink(..., ema=[...]), or make it anew from the model"
        )
    return roots[0]


def _why_whole(group: Group) -> str:
    if group.kind == "weights":
        return "single weights go with the units of their rows and columns"
    if group.kind == "blocks":
        return "a block goes at the end, by finalize"
    if group.at_producers:
        return "an RMSNorm averages over its units, whose weight a cut would rescale, and so its steps"
    if any(member.stays for member in group.members):
        return "part of its unit stays, and must stay closed"
    return ""


def _plain_names(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a gated model by the names that they have without gates."""
    found = {}
    for name, tensor in named_tensors(model).items():
        path, _, key = name.rpartition(".")
        if key == "original" and ".parametrizations." in f".{path}":
            above, _, key = path.rpartition("parametrizations.")
            found[f"{above}{key}"] = tensor
        else:
            found[name] = tensor
    return found


def _numbers(model: nn.Module) -> dict[tuple[str, str], object]:
    """Numbers and tuples of numbers that modules keep as attributes."""
    return {
        (path, key): value
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, _NUMBER)
        or (isinstance(value, (tuple, list)) and all(isinstance(item, _NUMBER) for item in value))
    }


def _grown(small: Tensor, kept: Mapping[int, Sequence[int]], shape: Sequence[int]) -> Tensor:
    """A tensor of the dense shape, zero where a position had gone."""
    for dim, positions in kept.items():
        wide = list(small.shape)
        wide[dim] = shape[dim]
        index = torch.tensor(positions, device=small.device)
        small = in_order(small.new_zeros(wide).index_copy(dim, index, small), dimension_order(small))
    return small
