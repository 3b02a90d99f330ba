"""What a trace found out about a model: the groups, what is frozen and why, what it costs, and what a cut does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.errors import TraceError
from secateur.structure.custom import Parts, custom_group, regrouped
from secateur.structure.cut import CutPlan
from secateur.structure.groups import Attribute, Axis, Cost, Frozen, Group, Keep, NormWidth, Term
from secateur.structure.outputs import Output
from secateur.structure.table import table

__all__ = ["Structure"]


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
        >>> import torch, secateur as sc
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
        n_open = [group.left(keep) for group in self.groups]
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
        narrower = [norm for norm in self.norms if norm.ratio(self.groups, keep) != 1]
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
                **{norm.eps: norm.eps_value * norm.ratio(self.groups, keep) for norm in narrower},
            },
            dense=dict(self.shapes),
            zeros=tuple(
                group.name.removesuffix(".block")
                for group in self.groups
                if group.kind == "blocks" and group.name in keep and not len(keep[group.name])
            ),
            rescales={
                self.aliases.get(norm.weight, norm.weight): (math.sqrt(norm.ratio(self.groups, keep)), norm.offset)
                for norm in narrower
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
            >>> import torch, secateur as sc
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
