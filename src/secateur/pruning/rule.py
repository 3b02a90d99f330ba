"""What a user says about which units get gates, and of which method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from secateur.errors import GateError
from secateur.gates import METHODS, HardConcrete, Method, method_from_name
from secateur.structure.groups import Group

__all__ = ["ACTIVATIONS", "KINDS", "Rule", "Where"]

#: The kind of unit, and of group, that is a position of what a module returns.
ACTIVATIONS = "activations"
#: Kinds of units by name; ``choose.UNITS`` has what finds them.
KINDS = ("structured", "heads", "inputs", "weights", "blocks", ACTIVATIONS)

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
        if self.units not in KINDS if isinstance(self.units, str) else not _are_groups(self.units):
            raise GateError(f"Rule: units={self.units!r}; expected one of {', '.join(map(repr, KINDS))}, or groups")
        if self.per_example and not self.acts_on_outputs:
            raise GateError(
                f"Rule: per_example=True, but gates of units={self.units!r} act on weights, which all examples of a "
                'batch share; use units="activations" or groups of sc.output_group'
            )

    @property
    def acts_on_outputs(self) -> bool:
        """Whether all its gates act on what modules return."""
        if isinstance(self.units, str):
            return self.units == ACTIVATIONS
        return all(group.kind == ACTIVATIONS for group in self.units)

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


def _are_groups(units: object) -> bool:
    return isinstance(units, tuple) and bool(units) and all(isinstance(group, Group) for group in units)


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
