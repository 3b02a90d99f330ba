"""From rules to groups.

A kind of unit is a function from the model, its structure and a rule to groups, and one row of `UNITS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from secateur.errors import GateError
from secateur.gates import Method
from secateur.pruning.activations import activations, fitted, module_of
from secateur.pruning.blocks import blocks
from secateur.pruning.inputs import inputs
from secateur.pruning.rule import ACTIVATIONS, Rule
from secateur.pruning.weights import weights
from secateur.structure.groups import Group
from secateur.structure.heads import HEADS
from secateur.structure.structure import Structure
from secateur.structure.tensors import Slot, listed, slots_of

__all__ = ["UNITS", "Chosen", "choose", "with_custom"]


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
    custom = [
        _custom(structure, group) for group in asked.values() if group.name not in known and group.kind != ACTIVATIONS
    ]
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
        if asked.kind == ACTIVATIONS:
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


def _nothing(structure: Structure, rule: Rule) -> str:
    if not structure.groups:
        reasons = dict.fromkeys(f"{frozen.tensor}: {frozen.reason}" for frozen in structure.frozen)
        return (
            "there is nothing to prune: the trace found no unit that can go. "
            f"Frozen are {listed(list(reasons)) or 'no dimensions'}. See structure.why_frozen(name)"
        )
    groups = listed([group.name for group in structure.groups])
    return f"{rule} finds nothing; the groups are {groups}"


#: Kinds of units, by name. A new one is a function and a row.
UNITS: Mapping[str, Callable[[nn.Module, Structure, Rule], tuple[Group, ...]]] = {
    "structured": structured,
    "heads": heads,
    "inputs": inputs,
    "weights": weights,
    "blocks": blocks,
    ACTIVATIONS: activations,
}
