"""Groups of coupled units, what is frozen and why, and the model's cost in open units.

Index conventions: ``U`` units in a group, ``m`` positions that one unit has along one dimension
of one tensor (its multiplicity), ``G`` groups of a structure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.errors import TraceError
from secateur.structure.custom import Parts, custom_group, regrouped
from secateur.structure.cut import CutPlan
from secateur.structure.outputs import Output
from secateur.structure.table import table

__all__ = ["FLAT", "Attribute", "Axis", "Cost", "Frozen", "Group", "Keep", "Member", "NormWidth", "Structure", "Term"]

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
        parts = dict(self.parts)
        number: int = parts[what] if what in parts else getattr(self, what)
        return number

    def __repr__(self) -> str:
        latency = f", latency={self.latency}" if self.latency else ""
        return f"Cost(params={self.params}, macs={self.macs}{latency})"


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
        latency_terms: nanoseconds of one forward of the first example, where a latency model was fitted.
        outputs: what modules return, and which units lie along it.
        branches: paths of modules whose output is added to the stream that they read.

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
    latency_terms: tuple[Term, ...] = ()
    outputs: tuple[Output, ...] = ()
    branches: tuple[str, ...] = ()

    @property
    def terms(self) -> tuple[tuple[Term, ...], tuple[Term, ...], tuple[Term, ...]]:
        """The polynomials in the order of the fields of `Cost`."""
        return self.param_terms, self.mac_terms, self.latency_terms

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
        n_open = [_count(group, keep) for group in self.groups]
        sizes = [axis.fixed + sum(times * n_open[g] for g, times in axis.per_group) for axis in self.axes]

        def total(terms: tuple[Term, ...]) -> int:
            return round(sum(term.coefficient * math.prod(sizes[axis] for axis in term.axes) for term in terms))

        return Cost(*(total(terms) for terms in self.terms))

    def plan(self, keep: Keep) -> CutPlan:
        """What to cut so that only the kept units stay; a group without kept units keeps its first."""
        for name in keep:
            self.group(name)
        gone: dict[str, dict[int, NDArray[np.bool_]]] = {}
        for group in self.groups:
            if group.name not in keep or group.kind == "blocks":
                continue
            closed = np.ones(group.size, dtype=bool)
            kept = keep[group.name].detach().cpu().numpy()
            closed[kept if len(kept) else np.arange(group.least)] = False
            if not closed.any():
                continue
            for member in group.members:
                mask = gone.setdefault(member.tensor, {}).setdefault(
                    member.dim, np.zeros(self.shapes[member.tensor][member.dim], dtype=bool)
                )
                mask[member.index[closed, member.stays :].ravel()] = True
        # Tensors that lose the same share one tuple: there are few different ones, and they are long.
        positions: dict[bytes, tuple[int, ...]] = {}
        for dims in gone.values():
            for mask in dims.values():
                if mask.tobytes() not in positions:
                    positions[mask.tobytes()] = tuple(np.flatnonzero(~mask).tolist())
        return CutPlan(
            tensors={
                name: {dim: positions[mask.tobytes()] for dim, mask in dims.items()} for name, dims in gone.items()
            },
            attributes={
                **{rule.name: rule.value(self.groups, keep) for rule in self.attributes},
                **{norm.eps: norm.eps_value * norm.ratio(self.groups, keep) for norm in self.norms},
            },
            dense=dict(self.shapes),
            zeros=tuple(
                group.name.removesuffix(".block")
                for group in self.groups
                if group.kind == "blocks" and group.name in keep and not len(keep[group.name])
            ),
            rescales={
                self.aliases.get(norm.weight, norm.weight): (math.sqrt(norm.ratio(self.groups, keep)), norm.offset)
                for norm in self.norms
            },
        )

    def custom(self, name: str, parts: Parts) -> Group:
        """A group of units of your own making: blocks of channels, a layer's heads as one, units of several layers.

        It gates, masks, cuts and counts like any other group, in the structure that `regrouped` gives or by
        ``sc.Rule(units=[group])``. A group with a single unit may lose it: then one of each kind of its traced units is
        left, with zeros where it is read.

        Args:
            name: of the group.
            parts: what the units are made of: unit i is the union of what row i of every entry names. An entry's key is
                a group's name, and its rows name units of that; or a tensor's name and a dimension, and its rows name
                positions there. What is coupled to them comes along.

        Raises:
            TraceError: a row names what is frozen, or only part of a traced unit: the message says which and why; or
                the units are not alike, or one traced unit is in two of them.

        Example:
            >>> import secateur as sc
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
            >>> structure = sc.trace(net, examples=(torch.zeros(1, 4),))
            >>> blocks = structure.custom("blocks", {("0.weight", 0): [[0, 1, 2, 3], [4, 5, 6, 7]]})
            >>> [(member.tensor, member.dim) for member in blocks.members]
            [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)]
            >>> sc.compact(net, structure.regrouped([blocks]), {"blocks": torch.tensor([1])})[0].out_features
            4
        """
        return custom_group(self, name, parts)

    def regrouped(self, groups: Sequence[Group]) -> Structure:
        """This structure with custom groups in place of the units that they are made of; the others stay as they are.

        Raises:
            TraceError: two of them share a unit or a name, or one was made from another structure.
        """
        return regrouped(self, groups)

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
            f"{f.tensor}, dimension {f.dim}: {'the one position' if f.count == 1 else f'{f.count} positions: each'}"
            f" {f.reason}{f.place}"
            for f in self.frozen
            if f.tensor in below
        ]
        return "\n".join(lines) or f"Nothing of {name} is frozen."

    def __str__(self) -> str:
        return table(self)


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
    return axis.fixed + sum(times * _count(groups[g], keep) for g, times in axis.per_group)


def _count(group: Group, keep: Keep) -> int:
    """Units of a group that a cut leaves."""
    return max(len(keep[group.name]), group.least) if group.name in keep else group.size
