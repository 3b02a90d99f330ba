"""What users hand to `attach` and to the pruner: refused as a whole, in one error, before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.budgets.budget import Budget
from secateur.budgets.penalty import Penalty
from secateur.errors import GateError
from secateur.gates.settings import Checks, is_a_number
from secateur.pruning.activity import ActivityL2
from secateur.structure.structure import Structure

__all__ = ["STATE_VERSION", "check_attach", "check_optimizer", "check_scale", "check_shrink", "check_state"]

#: Version of what `Pruner.state_dict` returns.
STATE_VERSION = 3
#: What that holds, and what its parts hold.
_PARTS: Mapping[str, tuple[str, ...]] = {
    "removal": ("gone", "closed_for"),
    "pressure": ("controller", "waited", "held"),
    "generator": (),
}
#: Integers that torch takes as a seed.
_SEEDS = range(-(2**63), 2**64)
#: Longest description of a value that an error shows whole.
_SHOWN = 80


def check_attach(
    *,
    examples: object,
    structure: object,
    gates: object,
    budget: object,
    penalty: object,
    l2: object,
    seed: object,
    conditional: object,
) -> None:
    """Refuse arguments of `attach` that are of another kind than it takes, or contradict each other.

    Raises:
        GateError: names all of them.
    """
    checks = Checks("attach")
    checks.holds(
        examples is not None or structure is not None,
        "it needs examples=(x,), inputs to trace the model with, or structure=, what sc.trace found",
    )
    _is_a(checks, "structure", structure, Structure, "what sc.trace(model, examples) returned")
    listed_ = isinstance(gates, Iterable) and not isinstance(gates, (str, Mapping))
    checks.holds(gates is None or listed_, f"gates is {_shown(gates)}, expected a list of rules: gates=[sc.Rule()]")
    also = "; give it as penalty=" if isinstance(budget, Penalty) else ""
    _is_a(checks, "budget", budget, Budget, f"an sc.Budget such as sc.Budget(keep_params=0.5){also}")
    also = "; give it as budget=" if isinstance(penalty, Budget) else ""
    _is_a(checks, "penalty", penalty, Penalty, f"an sc.Penalty such as sc.Penalty(0.1, unit='density'){also}")
    checks.holds(
        budget is None or penalty is None,
        "it takes budget= or penalty=, not both: a budget sets its own weight",
    )
    _is_a(checks, "l2", l2, ActivityL2, "an sc.ActivityL2 such as sc.ActivityL2(0.1)")
    good = is_a_number(seed, Integral) and int(seed) in _SEEDS  # type: ignore[call-overload]
    checks.holds(good, f"seed is {_shown(seed)}, expected a whole number such as 0")
    checks.one_of("conditional", conditional, ("auto", True, False))
    checks.done()


def check_scale(scale: object) -> None:
    """Refuse what no loss can be weighed with.

    Raises:
        GateError: it is no finite number of at least 0.
    """
    good = is_a_number(scale, Real) and 0.0 <= scale < math.inf  # type: ignore[operator]
    checks = Checks("loss")
    checks.holds(
        good,
        f"scale is {_shown(scale)}, expected a finite number of at least 0: 1/k where k minibatches make one optimizer"
        " step",
    )
    checks.done()


def check_optimizer(optimizer: object) -> None:
    """Refuse what has no groups of parameters to look at.

    Raises:
        GateError: with what to do.
    """
    checks = Checks("check")
    checks.holds(
        hasattr(optimizer, "param_groups"),
        f"got a {type(optimizer).__name__}, expected an optimizer, made from pruner.param_groups(lr=..., gate_lr=...)",
    )
    checks.done()


def check_shrink(optimizer: object, ema: object, checks_in_a_row: object, chance: object) -> None:
    """Refuse arguments of `Pruner.shrink` of another kind than it takes.

    Raises:
        GateError: names all of them.
    """
    checks = Checks("shrink")
    several = isinstance(optimizer, Sequence) and all(isinstance(one, Optimizer) for one in optimizer)
    checks.holds(
        isinstance(optimizer, Optimizer) or several,
        f"optimizer is {_shown(optimizer)}, expected the torch.optim.Optimizer that trains the model, or a list of all"
        " of them",
    )
    copies = [ema] if isinstance(ema, nn.Module) else ema
    known = isinstance(copies, Sequence) and not isinstance(copies, str)
    known = known and all(isinstance(copy, nn.Module) or _are_tensors(copy) for copy in copies)  # type: ignore[attr-defined]
    checks.holds(
        known,
        f"ema is {_shown(ema)}, expected a copy of the gated model, or a list of copies and of lists of tensors, such"
        " as ema=[averaged, [p.clone() for p in model.parameters()]]",
    )
    checks.count("checks", checks_in_a_row, 1)
    checks.between("chance", chance, 0.0, 1.0)
    checks.done()


def check_state(state: object) -> None:
    """Refuse what is nothing that `Pruner.state_dict` returned.

    Raises:
        GateError: it is of another version, or lacks something.
    """
    advice = "expected what pruner.state_dict() returned"
    if not isinstance(state, Mapping):
        raise GateError(f"load_state_dict: got {_shown(state)}, {advice}")
    if state.get("version") != STATE_VERSION:
        raise GateError(f"pruner state of version {state.get('version')!r}, expected {STATE_VERSION}")
    checks = Checks("load_state_dict")
    for part, keys in _PARTS.items():
        held = state.get(part)
        checks.holds(part in state, f"the state has no {part!r}")
        for key in keys if part in state else ():
            checks.holds(isinstance(held, Mapping) and key in held, f"the state's {part!r} has no {key!r}")
    if "generator" in state:
        checks.holds(_is_of_generator(state["generator"]), "the state's 'generator' is no state of a torch.Generator")
    checks.holds(not checks.problems, advice)
    checks.done()


def _is_of_generator(state: object) -> bool:
    try:
        torch.Generator().set_state(state.cpu())  # type: ignore[attr-defined]
    except (AttributeError, TypeError, RuntimeError):
        return False
    return True


def _are_tensors(item: object) -> bool:
    return isinstance(item, list) and all(isinstance(tensor, Tensor) for tensor in item)


def _is_a(checks: Checks, name: str, value: object, kind: type, wanted: str) -> None:
    checks.holds(value is None or isinstance(value, kind), f"{name} is {_shown(value)}, expected {wanted}")


def _shown(value: object) -> str:
    """A value as an error shows it: whole where that is short."""
    text = repr(value)
    return text if len(text) <= _SHOWN and "\n" not in text else f"a {type(value).__name__}"
