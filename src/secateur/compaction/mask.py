"""Closing units by explicit index sets: the zeros that a gate would put where it acts."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor

from secateur.errors import CompactionError
from secateur.structure.copies import deep_copy
from secateur.structure.cut import CutPlan
from secateur.structure.eps import settle_eps_
from secateur.structure.groups import Keep
from secateur.structure.plain import unfit, with_graph
from secateur.structure.structure import Structure
from secateur.structure.tensors import listed, misfits, named_tensors

__all__ = ["checked_keep", "checked_model", "copied", "mask", "mask_tensors_", "plan_of"]

M = TypeVar("M", bound=nn.Module)


def mask(model: M, structure: Structure, keep: Keep) -> M:
    """A copy of the model whose closed units are zero wherever the model reads them.

    The copy has all the dense shapes, and computes what `secateur.compact` computes.

    Args:
        model: the model that was traced.
        structure: its structure.
        keep: kept units by group name, each an integer tensor of positions in ``[0, U)``; a group that is absent is
            kept whole, one with no positions is closed whole.

    Raises:
        CompactionError: `keep` names groups or units that do not exist, or the structure is of another model.

    Example:
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> structure = sc.trace(net, examples=(torch.zeros(2, 4),))
        >>> sc.mask(net, structure, {"0": torch.tensor([1, 5])})[2].weight.count_nonzero(dim=0).tolist()
        [0, 2, 0, 0, 0, 2, 0, 0]
    """
    kept = checked_keep(structure, keep)
    checked_model(model, structure)
    masked = copied(model)
    # The cut gives an eps of their own to norms that have none; so the copy too, in whatever type it is run.
    settle_eps_(masked, structure.norms)
    mask_tensors_(named_tensors(masked), structure, kept)
    return masked


def mask_tensors_(tensors: Mapping[str, Tensor], structure: Structure, keep: Keep) -> None:
    """Write zeros, in place, into the consumers' slices of all units that are not kept.

    Args:
        tensors: dense parameters and buffers by name.
        structure: what is coupled to what.
        keep: as `checked_keep` returns it.
    """
    with torch.no_grad():
        for name, kept in keep.items():
            group = structure.group(name)
            closed = torch.ones(group.size, dtype=torch.bool)
            closed[kept] = False
            for member in group.gated:
                tensor = tensors[member.tensor]
                positions = torch.from_numpy(member.index[closed.numpy()].reshape(-1))
                tensor.index_fill_(member.dim, positions.to(tensor.device), 0)


def plan_of(structure: Structure, keep: Keep) -> CutPlan:
    """What to cut so that only the kept units stay.

    Groups of kind ``"inputs"`` are finer than what feeds their layer: the layer's weight is cut, and the layer must
    select among the inputs that the other groups leave. A dimension that would lose all keeps one position.

    Args:
        structure: what is coupled to what.
        keep: as `checked_keep` returns it.
    """
    fine = {name for name in keep if structure.group(name).kind == "inputs"}
    plan = structure.plan(keep)
    if not fine:
        return plan
    coarse = structure.plan({name: kept for name, kept in keep.items() if name not in fine})
    tensors = {name: dict(cuts) for name, cuts in plan.tensors.items()}
    selects = dict(plan.selects)
    for name in sorted(fine):
        (member,) = structure.group(name).members
        offered = coarse.tensors.get(member.tensor, {}).get(member.dim)
        if offered is None:
            offered = tuple(range(structure.shapes[member.tensor][member.dim]))
        read = tensors.get(member.tensor, {}).get(member.dim, offered) or offered[:1]
        if read != offered:
            tensors[member.tensor][member.dim] = read
            place = {position: number for number, position in enumerate(offered)}
            selects[member.tensor.rpartition(".")[0]] = tuple(place[position] for position in read)
    return replace(plan, tensors=tensors, selects=selects)


def checked_keep(structure: Structure, keep: Keep) -> dict[str, Tensor]:
    """`keep` in ascending order on the CPU, after all that can be wrong with it has been looked for.

    Raises:
        CompactionError: a group that does not exist, positions that are no integers, out of range, or named twice.
    """
    groups = {group.name: group for group in structure.groups}
    problems: list[str] = []
    unknown = False
    checked: dict[str, Tensor] = {}
    for name, kept in keep.items():
        if name not in groups:
            problems.append(f"{name!r}: no such group")
            unknown = True
            continue
        problem = _problem(kept, groups[name].size)
        if problem:
            problems.append(f"{name!r}: {problem}")
        else:
            checked[name] = kept.detach().to("cpu", torch.int64).sort().values
    if problems:
        existing = f" The groups are {listed(sorted(groups)) or 'none: nothing can go'}." if unknown else ""
        raise CompactionError(f"keep: {listed(problems)}.{existing}")
    return checked


def checked_model(model: nn.Module, structure: Structure) -> None:
    """Refuse a model that is not the one that was traced.

    Raises:
        CompactionError: it is wrapped or gated, or names or shapes of its parameters and buffers differ.
    """
    if problem := unfit(model):
        raise CompactionError(f"{problem}.")
    if problems := misfits(model, structure.shapes):
        raise CompactionError(
            f"the structure is not of this {type(model).__name__}: {listed(problems)}. Trace the model as it is now."
        )


def copied(model: M) -> M:
    """A deep copy, also of a model on fake tensors.

    Raises:
        CompactionError: the model cannot be copied.
    """
    mode = next((t.fake_mode for t in named_tensors(model).values() if isinstance(t, FakeTensor)), None)
    # Outside of this mode, deepcopy takes fake tensors for real ones and corrupts memory.
    with FakeCopyMode(mode) if mode is not None else contextlib.nullcontext():  # type: ignore[no-untyped-call, unused-ignore]
        try:
            return deep_copy(model)
        except Exception as error:
            named = listed(with_graph(model))
            raise CompactionError(
                f"{type(model).__name__} cannot be copied ({error}). Cut it with in_place=True and no examples, or "
                "make it pass copy.deepcopy: no open files, locks, or tensors with a graph as attributes"
                f"{named and f' (it has {named})'}."
            ) from error


def _problem(kept: object, size: int) -> str:
    if not isinstance(kept, Tensor):
        return f"got {type(kept).__name__}, expected a tensor of positions: torch.tensor([0, 2])"
    if kept.dtype is torch.bool:
        return "got a bool tensor, expected positions: open.nonzero().flatten()"
    if kept.is_floating_point() or kept.is_complex():
        return f"got {kept.dtype}, expected integer positions (torch.int64)"
    if kept.dim() != 1:
        return f"got shape {tuple(kept.shape)}, expected one dimension"
    if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= size):
        return f"positions from {int(kept.min())} to {int(kept.max())}, expected them in [0, {size})"
    if len(set(kept.tolist())) != kept.numel():
        return "a position is named twice"
    return ""
