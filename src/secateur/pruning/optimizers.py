"""Whether an optimizer treats gates as gates: in a group of their own, and without weight decay."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import GateError

__all__ = ["GATE_RATE", "Groups", "check_groups", "groups_in_use", "living", "optimizers_of", "parameter_groups"]

#: The gates' rate as a multiple of the weights'. Gates must travel several units of log-odds in one training, weights
#: only fractions of their size; 20 is what carried the MNIST networks to their budgets under Adam.
GATE_RATE = 20.0

T = TypeVar("T")

Groups = Iterable[Mapping[str, Any]]


def parameter_groups(
    weights: Sequence[nn.Parameter],
    gates: Sequence[nn.Parameter],
    lr: float,
    gate_lr: float | None,
    options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Two groups for an optimizer: weights with all options, gates with their own rate and without weight decay."""
    groups: list[dict[str, Any]] = [{"params": list(weights), "lr": lr, **options}]
    if gates:
        own = {"lr": GATE_RATE * lr if gate_lr is None else gate_lr, "weight_decay": 0.0}
        groups.append({"params": list(gates), **options, **own})
    return groups


def check_groups(groups: Groups, gates: Sequence[nn.Parameter]) -> None:
    """Refuse groups that pull gates towards zero or leave some out; warn where gates share a group with weights.

    Raises:
        GateError: weight decay on gates, or gates that no group trains.
    """
    wanted = {id(parameter) for parameter in gates}
    found: set[int] = set()
    decay, shared = 0.0, False
    for group in groups:
        members = {id(parameter) for parameter in group["params"]}
        if inside := members & wanted:
            found |= inside
            decay = max(decay, abs(float(group.get("weight_decay") or 0.0)))
            shared = shared or bool(members - wanted)
    advice = "make the optimizer from pruner.param_groups(lr=..., gate_lr=...)"
    if missing := len(wanted - found):
        raise GateError(f"the optimizer leaves out {missing} of the {len(wanted)} parameters of the gates; {advice}")
    if decay:
        raise GateError(
            f"the optimizer gives gates weight decay {decay:g}, which pulls every open chance to one value; {advice},"
            " or give parameters with the attribute secateur_gate a group with weight_decay=0"
        )
    if shared:
        warnings.warn(
            "gates share an optimizer group with weights, and so their rate; gates need a larger one. For groups of"
            f" their own, {advice}",
            stacklevel=4,  # where the pruner was called
        )


def groups_in_use(parameters: Sequence[nn.Parameter]) -> list[Mapping[str, Any]]:
    """The parameter groups of every living torch optimizer that trains any of these parameters."""
    return [group for optimizer in optimizers_of(parameters) for group in optimizer.param_groups]


def optimizers_of(parameters: Sequence[Tensor]) -> list[Optimizer]:
    """Every living torch optimizer that trains any of these parameters."""
    wanted = {id(parameter) for parameter in parameters}
    # A look at all living objects: a Trainer makes the optimizer where nobody passes it on.
    return [
        optimizer
        for optimizer in living(Optimizer)
        if any(id(p) in wanted for group in optimizer.param_groups for p in group["params"])
    ]


def living(kind: type[T]) -> list[T]:
    """Every living object of a class or of one derived from it."""
    kinds: set[type] = set()
    new: list[type] = [kind]
    while new:
        kinds.update(new)
        new = [below for one in new for below in _below(one) if below not in kinds]
    return [item for item in gc.get_objects() if type(item) in kinds]


def _below(kind: type) -> list[type]:
    return kind.__subclasses__()
