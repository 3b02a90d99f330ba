"""Groups of coupled units, what is frozen and why, and the model's cost in open units.

Index conventions: ``U`` units in a group, ``m`` positions that one unit has along one dimension
of one tensor (its multiplicity), ``G`` groups of a structure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.errors import TraceError
from secateur.structure.cut import CutPlan

__all__ = ["Attribute", "Axis", "Cost", "Frozen", "Group", "Keep", "Member", "NormWidth", "Structure", "Term"]

#: Kept units by group name: ascending positions in ``[0, U)``; a group that is absent is kept whole.
Keep = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Member:
    """The slices of one tensor dimension that belong to the units of a group.

    Args:
        tensor: qualified name of a parameter or buffer, as in ``named_parameters()``.
        dim: the dimension that is cut.
        index: int64 ``(U, m)``, the positions along ``dim`` that each unit owns.
        consumer: whether a contraction reads this dimension, so that zeroing a slice closes the unit.
        carrier: whether the slices also carry the unit's values onward (a producer's rows, a bias,
            a normalisation's affine parameters). A tied tensor can be both.
        rescaled: whether this is the weight of an RMSNorm over the units, which only rescales them.
    """

    tensor: str
    dim: int
    index: NDArray[np.int64]
    consumer: bool
    carrier: bool
    rescaled: bool = False


@dataclass(frozen=True)
class Group:
    """Units that can be removed one by one, each removal exact.

    Args:
        name: unique in its structure; the module that first carries the units.
        size: number of units ``U``.
        members: every slice that goes with a unit; at least one is a consumer.
        kind: ``"structured"`` for groups that the trace found, ``"inputs"`` for single inputs of one layer.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    kind: str = "structured"

    @property
    def consumers(self) -> tuple[Member, ...]:
        """The members that read the units."""
        return tuple(member for member in self.members if member.consumer)

    @property
    def at_producers(self) -> bool:
        """Whether the units must be zero where they arise, since an RMSNorm averages over them."""
        return any(member.rescaled for member in self.members)

    @property
    def gated(self) -> tuple[Member, ...]:
        """The members at which a gate acts: the consumers, or all that carries the units where ``at_producers``."""
        if not self.at_producers:
            return self.consumers
        return tuple(member for member in self.members if member.carrier and not member.rescaled)


@dataclass(frozen=True)
class Frozen:
    """Positions of one tensor dimension that cannot go, with the reason.

    Args:
        tensor: qualified name of a parameter or buffer.
        dim: its dimension.
        count: how many positions along ``dim`` are frozen.
        reason: why, in one sentence.
        operator: the ATen operator that froze them, or "".
        module: qualified name of the module that executed it, or "".
    """

    tensor: str
    dim: int
    count: int
    reason: str
    operator: str = ""
    module: str = ""


@dataclass(frozen=True)
class Axis:
    """A dimension's size as a linear function of open units: ``fixed + sum_g multiplicity_g * open_g``.

    Args:
        fixed: positions that always stay.
        per_group: pairs (position of the group in ``Structure.groups``, positions that each of its units owns).
    """

    fixed: int
    per_group: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Term:
    """One product of a cost polynomial: ``coefficient * prod(axes)``.

    Args:
        coefficient: constant factor, of all dimensions that no unit touches.
        axes: positions in ``Structure.axes``; only those with groups.
        label: the tensor (parameters) or module (MACs) that it counts.
    """

    coefficient: float
    axes: tuple[int, ...]
    label: str


@dataclass(frozen=True)
class Cost:
    """Exact counts: parameters, and multiply-accumulates of one forward pass of the first example."""

    params: int
    macs: int


@dataclass(frozen=True)
class Structure:
    """What can go from one model, what cannot and why, and what it costs. Holds no tensors.

    Args:
        groups: units that can go, in the order in which the model's parameters carry them.
        frozen: what cannot go, one entry for each tensor dimension and reason.
        shapes: dense shapes of all parameters and buffers, tied ones under their first name.
        aliases: other names of tied tensors, with the first name.
        axes: sizes that depend on open units.
        param_terms: parameters, as a polynomial of the axes.
        mac_terms: multiply-accumulates of one forward of the first example, alike.
        attributes: rules for attributes that modules keep besides their tensors.
        norms: RMSNorm layers whose width can be cut.
        widths: sizes of the dimensions that matrix products and convolutions run over, where units change them.
        notes: what could not be looked at while tracing.

    Example:
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> structure = sc.trace(net, examples=(torch.zeros(1, 4),))
        >>> [(group.name, group.size) for group in structure.groups]
        [('0', 8)]
        >>> structure.cost({"0": torch.arange(2)})
        Cost(params=16, macs=12)
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    axes: tuple[Axis, ...]
    param_terms: tuple[Term, ...]
    mac_terms: tuple[Term, ...]
    attributes: tuple[Attribute, ...] = ()
    norms: tuple[NormWidth, ...] = ()
    widths: tuple[Axis, ...] = ()
    notes: tuple[str, ...] = ()

    def group(self, name: str) -> Group:
        """The group of that name.

        Raises:
            TraceError: there is none; the message lists those that exist.
        """
        for group in self.groups:
            if group.name == name:
                return group
        listed = ", ".join(group.name for group in self.groups[:20]) or "none at all"
        raise TraceError(f"no group is named {name!r}; the groups are {listed}{', ...' * (len(self.groups) > 20)}.")

    def cost(self, keep: Keep | None = None) -> Cost:
        """Exact cost of the model with the kept units only; dense where ``keep`` is None."""
        keep = keep or {}
        for name in keep:
            self.group(name)
        n_open = [len(keep[group.name]) if group.name in keep else group.size for group in self.groups]
        n_open = [max(count, 1) for count in n_open]
        sizes = [axis.fixed + sum(times * n_open[g] for g, times in axis.per_group) for axis in self.axes]

        def total(terms: tuple[Term, ...]) -> int:
            return round(sum(term.coefficient * math.prod(sizes[axis] for axis in term.axes) for term in terms))

        return Cost(total(self.param_terms), total(self.mac_terms))

    def plan(self, keep: Keep) -> CutPlan:
        """What to cut so that only the kept units stay; a group without kept units keeps its first."""
        for name in keep:
            self.group(name)
        gone: dict[str, dict[int, NDArray[np.bool_]]] = {}
        for group in self.groups:
            if group.name not in keep:
                continue
            closed = np.ones(group.size, dtype=bool)
            kept = keep[group.name].detach().cpu().numpy()
            closed[kept if len(kept) else np.zeros(1, dtype=np.int64)] = False
            if not closed.any():
                continue
            for member in group.members:
                mask = gone.setdefault(member.tensor, {}).setdefault(
                    member.dim, np.zeros(self.shapes[member.tensor][member.dim], dtype=bool)
                )
                mask[member.index[closed].ravel()] = True
        return CutPlan(
            tensors={
                name: {dim: tuple(np.flatnonzero(~mask).tolist()) for dim, mask in dims.items()}
                for name, dims in gone.items()
            },
            attributes={
                **{rule.name: rule.value(self.groups, keep) for rule in self.attributes},
                **{norm.eps: norm.eps_value * norm.ratio(self.groups, keep) for norm in self.norms},
            },
            dense=dict(self.shapes),
            rescales={
                self.aliases.get(norm.weight, norm.weight): (math.sqrt(norm.ratio(self.groups, keep)), norm.offset)
                for norm in self.norms
            },
        )

    def why_frozen(self, name: str) -> str:
        """Why the module or tensor of that name, or what lies below it, cannot lose units.

        Raises:
            TraceError: nothing of the model has that name.
        """
        name = self.aliases.get(name, name)
        below = [known for known in self.shapes if known == name or known.startswith(f"{name}.") or not name]
        if not below:
            raise TraceError(f"{name!r} is not a parameter, a buffer or a module that holds any.")
        lines = [
            f"{f.tensor}, dimension {f.dim}: {_count(f)} {f.reason}{_place(f)}"
            for f in self.frozen
            if f.tensor in below
        ]
        return "\n".join(lines) or f"Nothing of {name} is frozen."

    def __str__(self) -> str:
        return describe(self)


@dataclass(frozen=True)
class Attribute:
    """An attribute of a module that follows a cut: an integer, or one entry of a tuple of integers.

    Args:
        name: ``"path.to.module.attribute"``.
        axis: its value as a function of open units.
    """

    name: str
    axis: Axis

    def value(self, groups: tuple[Group, ...], keep: Keep) -> int:
        """Its value when only the kept units stay."""
        return _length(self.axis, groups, keep)


@dataclass(frozen=True)
class NormWidth:
    """An RMSNorm over units: with ``d'`` of ``d`` inputs left, weights times ``sqrt(d / d')``, eps times ``d / d'``.

    Args:
        weight: qualified name of its weight.
        eps: qualified name of the attribute that holds its eps.
        eps_value: that eps.
        offset: what it adds to its weight.
        axis: its width as a function of open units.
    """

    weight: str
    eps: str
    eps_value: float
    offset: float
    axis: Axis

    def ratio(self, groups: tuple[Group, ...], keep: Keep) -> float:
        """``d / d'`` when only the kept units stay."""
        return _length(self.axis, groups, {}) / _length(self.axis, groups, keep)


def _length(axis: Axis, groups: tuple[Group, ...], keep: Keep) -> int:
    return axis.fixed + sum(
        times * max(len(keep[groups[g].name]) if groups[g].name in keep else groups[g].size, 1)
        for g, times in axis.per_group
    )


def _times(multiplicity: int) -> str:
    return f"x{multiplicity}" if multiplicity > 1 else ""


def _count(frozen: Frozen) -> str:
    return "the one position" if frozen.count == 1 else f"{frozen.count} positions: each"


def _place(frozen: Frozen) -> str:
    at = f" in {frozen.module}" if frozen.module else ""
    return f" ({frozen.operator}{at})" if frozen.operator else at


def describe(structure: Structure) -> str:
    """The table that ``print(structure)`` shows: groups, what is at stake in each, and what is frozen."""
    dense = structure.cost()
    lines = [
        (
            f"{len(structure.groups)} groups, {sum(group.size for group in structure.groups)} units; "
            f"{dense.params:,} parameters, {dense.macs:,} MACs"
        ),
        f"{'group':<40} {'units':>6} {'params/unit':>12} {'MACs/unit':>14}  members",
    ]
    for group in structure.groups:
        fewer = structure.cost({group.name: torch.arange(group.size - 1)})
        members = ", ".join(
            f"{m.tensor}[{m.dim}]{_times(m.index.shape[1])}{'*' if m in group.gated else ''}" for m in group.members[:6]
        )
        more = f", and {len(group.members) - 6} more" if len(group.members) > 6 else ""
        lines.append(
            f"{group.name:<40} {group.size:>6} {dense.params - fewer.params:>12,} {dense.macs - fewer.macs:>14,}  "
            f"{members}{more}"
        )
    lines.append("(* = where a gate acts; xN = positions that one unit has there)")
    lines.extend(f"note: {note}" for note in structure.notes)
    reasons: dict[str, list[str]] = {}
    for frozen in structure.frozen:
        reasons.setdefault(f"{frozen.reason}{_place(frozen)}", []).append(f"{frozen.tensor}[{frozen.dim}]")
    lines.append(f"frozen: {len(structure.frozen)} tensor dimensions")
    for reason, where in sorted(reasons.items(), key=lambda item: -len(item[1]))[:20]:
        shown = ", ".join(where[:4]) + (f", and {len(where) - 4} more" if len(where) > 4 else "")
        lines.append(f"  {reason}: {shown}")
    if len(reasons) > 20:
        lines.append(f"  and {len(reasons) - 20} more reasons: structure.frozen, structure.why_frozen(name)")
    return "\n".join(lines)
