"""From a model and the units to keep to a smaller plain model that computes the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from secateur.compaction.mask import checked_keep, checked_model, copied, mask, plan_of
from secateur.compaction.proof import Proof, prove
from secateur.structure.cut import CutPlan, cut_
from secateur.structure.eps import with_eps_of
from secateur.structure.example import Examples
from secateur.structure.groups import Keep
from secateur.structure.rounding import rounded_keep
from secateur.structure.structure import Structure
from secateur.structure.tensors import named_tensors

__all__ = ["Proof", "compact", "cut_of", "mask", "prove"]

M = TypeVar("M", bound=nn.Module)

#: The attribute in which a compact module carries what was cut from what.
PLAN = "cut_plan"


def compact(
    model: M,
    structure: Structure,
    keep: Keep,
    *,
    in_place: bool = False,
    examples: Examples | None = None,
    round_to: int = 1,
) -> M:
    """Cut the closed units out of a model: a plain module with fewer parameters that computes what `mask` computes.

    A group of which no unit is kept keeps one, whose consumers are zero. The module carries its `CutPlan` in the
    attribute ``cut_plan``, so that `secateur.save` can say what was cut from what.

    Args:
        model: the model that was traced.
        structure: its structure.
        keep: kept units by group name, each an integer tensor of positions in ``[0, U)``; a group that is absent is
            kept whole.
        in_place: cut the model itself instead of a copy; its parameters become new objects, so make optimizers after.
        examples: inputs on which to prove the cut before it is handed over (`prove`); without them, only whether it
            fits is checked.
        round_to: number of which the widths are to be multiples where they can, such as 8: closed units stay for that,
            zero wherever they are read, as `secateur.rounded_keep` says; ``structure.cost`` of that is the cost.

    Raises:
        CompactionError: `keep` names groups or units that do not exist, the structure is of another model, or the proof
            fails. Nothing was changed then.

    Example:
        >>> import torch, secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> structure = sc.trace(net, examples=(torch.zeros(2, 4),))
        >>> keep = {"0": torch.tensor([1, 5])}
        >>> small = sc.compact(net, structure, keep)
        >>> small
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=2, bias=True)
        )
        >>> x = torch.randn(3, 4)
        >>> torch.allclose(small(x), sc.mask(net, structure, keep)(x), atol=1e-6)
        True
    """
    kept = checked_keep(structure, keep)
    checked_model(model, structure)
    structure = replace(structure, norms=with_eps_of(model, structure.norms))
    plan = plan_of(structure, rounded_keep(structure, kept, round_to))
    if in_place and examples is None:
        return _cut_(model, structure, kept, plan)
    small = _cut_(copied(model), structure, kept, plan)
    if examples is not None:
        prove(model, small, structure, kept, examples, round_to=round_to)
    return _cut_(model, structure, kept, plan) if in_place else small


def cut_of(module: nn.Module) -> CutPlan | None:
    """What was cut from the dense model to make this one; None for a module that was not cut."""
    plan = getattr(module, PLAN, None)
    return plan if isinstance(plan, CutPlan) else None


def _cut_(model: M, structure: Structure, keep: Keep, plan: CutPlan) -> M:
    before = cut_of(model)
    whole = before.then(plan) if before is not None else plan
    cut_(model, plan)
    _zero_closed_(named_tensors(model), structure, keep, plan)
    setattr(model, PLAN, whole)
    return model


def _zero_closed_(tensors: Mapping[str, Tensor], structure: Structure, keep: Keep, plan: CutPlan) -> None:
    """Zeros where a closed unit stays, since one must or for the width's sake: its consumers read nothing from it."""
    for name, kept in keep.items():
        group = structure.group(name)
        if group.kind == "blocks":  # it is gone as a whole
            continue
        closed = np.ones(group.size, dtype=bool)
        closed[kept.numpy()] = False
        for member in group.gated:
            if member.tensor not in tensors:  # it went with a block
                continue
            gone = member.index[closed].reshape(-1)
            cut = plan.tensors.get(member.tensor, {}).get(member.dim)
            left = gone if cut is None else np.flatnonzero(np.isin(cut, gone))
            if len(left):
                tensor = tensors[member.tensor]
                with torch.no_grad():
                    tensor.index_fill_(member.dim, torch.from_numpy(left).to(tensor.device), 0)
