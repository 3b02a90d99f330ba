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
from secateur.inputs import inputs
from secateur.structure.groups import Group, Structure
from secateur.structure.tensors import listed, slots_of

__all__ = ["UNITS", "Chosen", "Rule", "Where", "choose"]

#: Which groups a rule is for: a pattern of names (``"layers.*.mlp"``), a module class, a predicate of the group, or
#: several of these, of which one must hold.
Where: TypeAlias = "str | type[nn.Module] | Callable[[Group], bool] | tuple[Where, ...]"


@dataclass(frozen=True)
class Rule:
    """Which units get gates, and of which method.

    Args:
        units: ``"structured"``, every group that the trace found; or ``"inputs"``, every single input of linear and
            convolutional layers, the model's own inputs included: finer than a group, or where there is none. Where a
            structured and an inputs gate meet, they multiply.
        where: narrows the choice: a pattern for names (of groups, for ``"inputs"`` of layers; ``*`` and ``?`` as in
            file names), the class of the module that carries the units (for ``"inputs"`` of the layer), a predicate of
            the group, or a tuple of these, of which one must hold. All by default.
        exclude: the same, for what is left out.
        method: a gate method or its name; by default the one that ``attach`` is given.
        init_open: open chance at the start, in (0, 1), instead of the method's own.

    Raises:
        GateError: ``units`` is no kind that there is.

    Example:
        >>> import torch, secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> rules = [sc.Rule(), sc.Rule(units="inputs", where="0", method=sc.ARM(), init_open=0.8)]
        >>> pruner = sc.attach(net, examples=(torch.zeros(2, 4),), gates=rules)
        >>> [(group.name, group.kind, group.size) for group in pruner.groups]
        [('0', 'structured', 8), ('0.inputs', 'inputs', 4)]
    """

    units: str = "structured"
    where: Where | None = None
    exclude: Where | None = None
    method: Method | str | None = None
    init_open: float | None = None

    def __post_init__(self) -> None:
        if self.units not in UNITS:
            raise GateError(f"Rule: units={self.units!r}; expected one of {', '.join(map(repr, UNITS))}")

    def takes(self, group: Group, module: nn.Module, name: str | None = None) -> bool:
        """Whether the rule is for a group, carried by ``module``, under its own name or another one."""
        named = group.name if name is None else name
        wanted = self.where is None or _holds(self.where, group, module, named)
        return wanted and not (self.exclude is not None and _holds(self.exclude, group, module, named))

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
    """

    method: Method
    groups: tuple[Group, ...]


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
        groups = UNITS[rule.units](model, structure, rule)
        problems += [
            f"{group.name!r} by gates[{taken[group.name]}] and gates[{number}]"
            for group in groups
            if group.name in taken
        ]
        taken.update({group.name: number for group in groups})
        chosen.append(Chosen(rule.made(default), groups))
    if problems:
        raise GateError(f"gated twice: {listed(problems)}. Narrow one rule with where= or exclude=")
    return tuple(chosen)


def structured(model: nn.Module, structure: Structure, rule: Rule) -> tuple[Group, ...]:
    """The groups that the trace found."""
    slots = slots_of(model)

    def carrier(group: Group) -> nn.Module:
        member = next((member for member in group.members if member.carrier), group.members[0])
        return slots[member.tensor].owner

    groups = tuple(group for group in structure.groups if rule.takes(group, carrier(group)))
    if not groups:
        raise GateError(_nothing(structure, rule))
    return groups


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
    "inputs": inputs,
}
