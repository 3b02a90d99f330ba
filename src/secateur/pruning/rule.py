"""What gets gates: rules, and the groups that they choose from a structure.

A kind of unit is a function from the model, its structure and a rule to groups, and one row of `UNITS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from secateur.errors import GateError
from secateur.gates import METHODS, HardConcrete, Method, method_from_name
from secateur.pruning.activations import KIND, activations, fitted, module_of
from secateur.pruning.blocks import blocks
from secateur.pruning.inputs import inputs
from secateur.pruning.weights import weights
from secateur.structure.groups import Group, Structure
from secateur.structure.heads import HEADS
from secateur.structure.tensors import Slot, listed, slots_of

__all__ = ["UNITS", "Chosen", "Rule", "Where", "choose"]

#: Which groups a rule is for: a pattern of names (``"layers.*.mlp"``), a module class, a predicate of the group, or
#: several of these, of which one must hold.
Where: TypeAlias = "str | type[nn.Module] | Callable[[Group], bool] | tuple[Where, ...]"


@dataclass(frozen=True)
class Rule:
    """Which units get gates, and of which method.

    Args:
        units: ``"structured"``, every group that the trace found, without what custom groups of other rules take of it;
            ``"heads"``, those of them whose units are attention heads (``exclude=lambda group: group.kind == "heads"``
            leaves these out of ``"structured"``);
            ``"inputs"``, every single input of linear and convolutional layers, the model's own inputs included: finer
            than a group, or where there is none; ``"weights"``, every scalar of the weights that multiply (budgets on
            parameters then count what is not zero); ``"blocks"``, whole residual branches, those that the trace found
            (``structure.branches``) or the modules that ``where`` names: closed ones become modules that return zeros;
            ``"activations"``, the positions along ``dim`` of what the modules that ``where`` names return; or groups:
            those of ``structure.custom``, of ``structure.groups`` and of `output_group`. Where coarse and fine gates
            meet, they multiply.
        where: narrows the choice: a pattern for names (of groups, for ``"inputs"`` of layers, for ``"weights"`` of
            tensors or layers, for ``"blocks"`` of modules; ``*`` and ``?`` as in file names), the class of the module
            that carries the units (of the layer for ``"inputs"`` and ``"weights"``, of the block), a predicate of the
            group, or a tuple of these, of which one must hold. All by default; ``"activations"`` need it.
        exclude: the same, for what is left out.
        method: a gate method or its name; by default the one that ``attach`` is given.
        init_open: open chance at the start, in (0, 1), instead of the method's own.
        dim: for ``"activations"``, the dimension of the output; 0 is the batch.
        per_example: for activations, whether each example of a batch (dimension 0) has a draw of its own while
            training; in evaluation the gates are fixed, and the same for all.

    Raises:
        GateError: ``units`` is no kind that there is, and no groups; or ``per_example`` where gates act on weights,
            which all examples share.

    Example:
        >>> import torch, secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> rules = [sc.Rule(), sc.Rule(units="inputs", where="0", method=sc.ARM(), init_open=0.8)]
        >>> pruner = sc.attach(net, examples=(torch.zeros(2, 4),), gates=rules)
        >>> [(group.name, group.kind, group.size) for group in pruner.groups]
        [('0', 'structured', 8), ('0.inputs', 'inputs', 4)]
    """

    units: str | Sequence[Group] = "structured"
    where: Where | None = None
    exclude: Where | None = None
    method: Method | str | None = None
    init_open: float | None = None
    dim: int = 1
    per_example: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.units, (list, tuple)):
            object.__setattr__(self, "units", tuple(self.units))
        if self.units not in UNITS if isinstance(self.units, str) else not _are_groups(self.units):
            raise GateError(f"Rule: units={self.units!r}; expected one of {', '.join(map(repr, UNITS))}, or groups")
        if self.per_example and not self.acts_on_outputs:
            raise GateError(
                f"Rule: per_example=True, but gates of units={self.units!r} act on weights, which all examples of a "
                'batch share; use units="activations" or groups of sc.output_group'
            )

    @property
    def acts_on_outputs(self) -> bool:
        """Whether all its gates act on what modules return."""
        if isinstance(self.units, str):
            return self.units == KIND
        return all(group.kind == KIND for group in self.units)

    def takes(self, group: Group, module: nn.Module, *names: str) -> bool:
        """Whether the rule is for a group, carried by ``module``, under its own name or any of others."""
        names = names or (group.name,)

        def holds(where: Where) -> bool:
            return any(_holds(where, group, module, name) for name in names)

        return (self.where is None or holds(self.where)) and not (self.exclude is not None and holds(self.exclude))

    def made(self, default: Method | str | None) -> Method:
        """The rule's method with its settings."""
        method = self.method if self.method is not None else default
        if method is None:
            method = HardConcrete()
        if isinstance(method, str):
            method = method_from_name(method)
        if not isinstance(method, Method):
            raise GateError(
                f"method={method!r}; expected a gate method such as sc.HardConcrete(), or one of the names"
                f" {', '.join(map(repr, METHODS))}"
            )
        return method if self.init_open is None else method.with_init_open(self.init_open)


@dataclass(frozen=True)
class Chosen:
    """What one rule gates.

    Args:
        method: of the gates.
        groups: in the order of their gates.
        per_example: whether each example has a draw of its own.
    """

    method: Method
    groups: tuple[Group, ...]
    per_example: bool = False


def choose(
    model: nn.Module, structure: Structure, rules: Sequence[Rule], default: Method | str | None
) -> tuple[Chosen, ...]:
    """Resolve rules into groups and methods.

    Raises:
        GateError: a rule finds nothing, or two rules of one kind find the same group.
    """
    if not rules:
        raise GateError("gates=[]: no rule, so no gate; leave gates= out to gate every group")
    chosen = []
    taken: dict[str, int] = {}
    problems = []
    for number, rule in enumerate(rules):
        if not isinstance(rule, Rule):
            raise GateError(f"gates[{number}] is a {type(rule).__name__}, expected an sc.Rule")
        groups = (UNITS[rule.units] if isinstance(rule.units, str) else named)(model, structure, rule)
        problems += [
            f"{group.name!r} by gates[{taken[group.name]}] and gates[{number}]"
            for group in groups
            if group.name in taken
        ]
        taken.update({group.name: number for group in groups})
        chosen.append(Chosen(rule.made(default), groups, rule.per_example))
    if problems:
        raise GateError(f"gated twice: {listed(problems)}. Narrow one rule with where= or exclude=")
    return tuple(chosen)


def with_custom(structure: Structure, rules: Sequence[object]) -> Structure:
    """The structure, with the custom groups that rules name in place of what they are made of.

    Raises:
        TraceError: these groups do not fit the structure, or each other.
    """
    asked = {
        id(group): group
        for rule in rules
        if isinstance(rule, Rule) and not isinstance(rule.units, str)
        for group in rule.units
    }
    known = {group.name for group in structure.groups}
    custom = [_custom(structure, group) for group in asked.values() if group.name not in known and group.kind != KIND]
    return structure.regrouped(custom) if custom else structure


def _custom(structure: Structure, group: Group) -> Group:
    """A custom group as it is; one that was put together by hand, completed by all that is coupled to it."""
    if group.kind == "custom":
        return group
    return structure.custom(group.name, {(member.tensor, member.dim): member.index for member in group.members})


def named(model: nn.Module, structure: Structure, rule: Rule) -> tuple[Group, ...]:
    """The groups that a rule names."""
    found, slots = [], slots_of(model)
    for asked in rule.units:
        assert isinstance(asked, Group)
        if asked.kind == KIND:
            group = fitted(structure, asked)
            if rule.takes(group, model.get_submodule(module_of(group)), module_of(group)):
                found.append(group)
            continue
        group = structure.group(asked.name)
        if group.kind != "custom" and [m.index.shape for m in group.members] != [m.index.shape for m in asked.members]:
            raise GateError(
                f"units: the group {asked.name!r} is not that of this structure: it has {asked.size} units, expected "
                f"{group.size}. Name groups of the structure that is attached, or give custom ones names of their own"
            )
        if rule.takes(group, _carrier(slots, group)):
            found.append(group)
    if not found:
        asked_for = listed([one.name for one in rule.units if isinstance(one, Group)])
        raise GateError(f"where={rule.where!r} leaves none of the groups {asked_for}")
    return tuple(found)


def structured(model: nn.Module, structure: Structure, rule: Rule) -> tuple[Group, ...]:
    """The groups that the trace found."""
    slots = slots_of(model)
    groups = tuple(
        group for group in structure.groups if group.kind != "custom" and rule.takes(group, _carrier(slots, group))
    )
    if not groups:
        raise GateError(_nothing(structure, rule))
    return groups


def heads(model: nn.Module, structure: Structure, rule: Rule) -> tuple[Group, ...]:
    """The groups whose units are attention heads, as `secateur.structure.heads` tells them."""
    slots = slots_of(model)
    found = tuple(group for group in structure.groups if group.kind == HEADS)
    groups = tuple(group for group in found if rule.takes(group, _carrier(slots, group)))
    if not groups:
        raise GateError(
            f"{rule} finds nothing; the groups of attention heads are {listed([g.name for g in found]) or 'none'},"
            f" and all groups {listed([g.name for g in structure.groups]) or 'none'}. See structure.why_frozen(name)"
        )
    return groups


def _carrier(slots: Mapping[str, Slot], group: Group) -> nn.Module:
    """The module that first carries the units of a group."""
    member = next((member for member in group.members if member.carrier), group.members[0])
    return slots[member.tensor].owner


def _are_groups(units: object) -> bool:
    return isinstance(units, tuple) and bool(units) and all(isinstance(group, Group) for group in units)


def _nothing(structure: Structure, rule: Rule) -> str:
    if not structure.groups:
        reasons = dict.fromkeys(f"{frozen.tensor}: {frozen.reason}" for frozen in structure.frozen)
        return (
            "there is nothing to prune: the trace found no unit that can go. "
            f"Frozen are {listed(list(reasons)) or 'no dimensions'}. See structure.why_frozen(name)"
        )
    groups = listed([group.name for group in structure.groups])
    return f"{rule} finds nothing; the groups are {groups}"


def _holds(where: Where, group: Group, module: nn.Module, name: str) -> bool:
    if isinstance(where, tuple):
        return any(_holds(one, group, module, name) for one in where)
    if isinstance(where, str):
        return fnmatchcase(name, where)
    if isinstance(where, type):
        return isinstance(module, where)
    if callable(where):
        return bool(where(group))
    raise GateError(
        f"where={where!r}; expected a pattern, a module class, a predicate of the group, or a tuple of these"
    )


#: Kinds of units, by name. A new one is a function and a row.
UNITS: Mapping[str, Callable[[nn.Module, Structure, Rule], tuple[Group, ...]]] = {
    "structured": structured,
    "heads": heads,
    "inputs": inputs,
    "weights": weights,
    "blocks": blocks,
    KIND: activations,
}
