"""Groups of coupled units, what is frozen and why, and the terms of a cost: what a structure is made of.

Index conventions: ``U`` units in a group, ``m`` positions that one unit has along one dimension
of one tensor (its multiplicity), ``G`` groups of a structure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["FLAT", "Attribute", "Axis", "Cost", "Frozen", "Group", "Keep", "Member", "NormWidth", "Term"]

#: The "dimension" of members whose positions are those of the flattened tensor: single weights.
FLAT = -1

#: Kept units by group name: ascending positions in ``[0, U)``; a group that is absent is kept whole.
Keep = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Member:
    """The slices of one tensor dimension that belong to the units of a group.

    Args:
        tensor: qualified name of a parameter or buffer, as in ``named_parameters()``.
        dim: the dimension that is cut; `FLAT` for single weights, which are never cut.
        index: int64 ``(U, m)``, the positions along ``dim`` that each unit owns.
        consumer: whether a contraction reads this dimension, so that zeroing a slice closes the unit.
        carrier: whether the slices also carry the unit's values onward (a producer's rows, a bias,
            a normalisation's affine parameters). A tied tensor can be both.
        rescaled: whether this is the weight of an RMSNorm over the units, which only rescales them.
        stays: how many of a single custom unit's positions, the first ones, a cut leaves even if it is closed.
    """

    tensor: str
    dim: int
    index: NDArray[np.int64]
    consumer: bool
    carrier: bool
    rescaled: bool = False
    stays: int = 0


@dataclass(frozen=True)
class Group:
    """Units that can be removed one by one, each removal exact.

    Args:
        name: unique in its structure; the module that first carries the units.
        size: number of units ``U``.
        members: every slice that goes with a unit; at least one is a consumer.
        kind: ``"structured"`` for groups that the trace found, ``"heads"`` where these are attention heads;
            ``"inputs"`` for single inputs of one layer, ``"weights"`` for the scalars of one tensor, ``"blocks"`` for a
            whole branch, ``"activations"`` for positions of what a module returns, ``"custom"`` for those that
            `Structure.custom` makes.
        parts: of a custom group, the names of traced groups, and int64 ``(U, k)``, their units in each of its units.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    kind: str = "structured"
    parts: tuple[tuple[str, NDArray[np.int64]], ...] = ()

    @property
    def least(self) -> int:
        """Units that always stay: one, but no single weight; none of a single custom unit, of which a part stays."""
        return (
            0 if self.kind in ("weights", "blocks", "activations") or (self.kind == "custom" and self.size == 1) else 1
        )

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
        if self.kind == "blocks":
            return self.members
        if not self.at_producers:
            return self.consumers
        return tuple(member for member in self.members if member.carrier and not member.rescaled)

    def left(self, keep: Keep) -> int:
        """Units that a cut leaves."""
        return max(len(keep[self.name]), self.least) if self.name in keep else self.size


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

    @property
    def place(self) -> str:
        """Operator and module in brackets, to follow the reason; "" where there are none."""
        at = f" in {self.module}" if self.module else ""
        return f" ({self.operator}{at})" if self.operator else at


@dataclass(frozen=True)
class Axis:
    """A dimension's size as a linear function of open units: ``fixed + sum_g multiplicity_g * open_g``.

    Args:
        fixed: positions that always stay.
        per_group: pairs (position of the group in ``Structure.groups``, positions that each of its units owns).
    """

    fixed: int
    per_group: tuple[tuple[int, int], ...] = ()

    def left(self, groups: tuple[Group, ...], keep: Keep) -> int:
        """Its value when only the kept units stay."""
        return self.fixed + sum(times * groups[g].left(keep) for g, times in self.per_group)


@dataclass(frozen=True)
class Term:
    """One product of a cost polynomial: ``coefficient * prod(axes)``.

    Args:
        coefficient: constant factor, of all dimensions that no unit touches.
        axes: positions in ``Structure.axes``; only those with groups.
        label: the tensor (parameters) or module (MACs, latency) that it counts.
    """

    coefficient: float
    axes: tuple[int, ...]
    label: str


@dataclass(frozen=True, repr=False)
class Cost:
    """What a model costs.

    Args:
        params: parameters, an exact count.
        macs: multiply-accumulates of one forward pass of the first example, an exact count.
        latency: time of that pass in nanoseconds as a latency model predicts it; 0 without one.
        parts: what single parts of the model cost, where a budget asks about some: pairs such as
            ``("macs of layer3", 1200)``.
    """

    params: int
    macs: int
    latency: int = 0
    parts: tuple[tuple[str, int], ...] = field(default=(), kw_only=True)

    def of(self, what: str) -> int:
        """One of the numbers: ``"params"``, ``"macs"``, ``"latency"``, or the name of a part's."""
        for name, cost in self.parts:
            if name == what:
                return cost
        number: int = getattr(self, what)
        return number

    def within(self, limits: Mapping[str, int]) -> bool:
        """Whether every number that has a limit is at most it."""
        return all(self.of(what) <= limit for what, limit in limits.items())

    def __repr__(self) -> str:
        latency = f", latency={self.latency}" if self.latency else ""
        return f"Cost(params={self.params}, macs={self.macs}{latency})"


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
        return self.axis.left(groups, keep)


@dataclass(frozen=True)
class NormWidth:
    """An RMSNorm over units: with ``d'`` of ``d`` inputs left, weights times ``sqrt(d / d')``, eps times ``d / d'``.

    Args:
        weight: qualified name of its weight.
        eps: qualified name of the attribute that holds its eps.
        eps_value: that eps; where the attribute is None, the one that torch takes for the type of its weight.
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
        return self.axis.left(groups, {}) / self.axis.left(groups, keep)
