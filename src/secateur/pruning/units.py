"""From gates to the units that a cost counts, and back.

Index conventions: ``Z`` gates of the model in a row, rule by rule; the *extended* gates ``(Z + 1,)`` end in a constant
1; ``U`` counted units: ``C`` coarse ones, of all structured groups, gated or not, and of the input groups that have
gates or lie under gated weights; then the weights that have gates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.gates import Layout, Method
from secateur.pruning.activations import Link
from secateur.pruning.blocks import with_blocks
from secateur.pruning.choose import Chosen
from secateur.pruning.gateset import extended
from secateur.pruning.inputs import owners, with_inputs
from secateur.pruning.rule import ACTIVATIONS
from secateur.pruning.weights import Scalars, with_weights
from secateur.structure.groups import Group, Keep
from secateur.structure.rounding import rounded_keep
from secateur.structure.structure import Structure
from secateur.structure.tensors import named_tensors

__all__ = ["Units"]


class Units:
    """Which gate acts on which counted unit.

    An input that a structured unit owns is open if both its own gate and the owner's are, a weight if its own gate and
    the units and inputs of its row and column are. A structured unit is open if its gate is, and if, where every weight
    that reads it has gates on single inputs or weights, one of these is; an input, if one of its gated weights is.

    Args:
        structure: what the trace found.
        chosen: what each rule gates.
        columns: input groups without gates, of layers whose single weights have gates: their unread inputs go.
        links: by activation group, the structured one whose units it closes; others cost nothing and stay as zeros.

    Attributes:
        groups: the gated groups, in the order of their gates, ``Z`` gates together.
        inputs: the groups of single inputs of a layer, gated ones first.
        cuttable: the structure that is cut: with input groups, without those of single weights.
        counted: the structure that costs are counted on, ``U`` units together.
    """

    def __init__(
        self,
        structure: Structure,
        chosen: Sequence[Chosen],
        columns: Sequence[Group] = (),
        links: Mapping[str, Link] | None = None,
    ) -> None:
        links = links or {}
        self.structure = structure
        self.groups: tuple[Group, ...] = tuple(group for one in chosen for group in one.groups)
        self.inputs = fine = (*(group for group in self.groups if group.kind == "inputs"), *columns)
        single = tuple(group for group in self.groups if group.kind == "weights")
        whole = tuple(group for group in self.groups if group.kind == "blocks")
        self.cuttable = with_blocks(with_inputs(structure, fine), whole)
        free = tuple(group for group in self.groups if group.kind == ACTIVATIONS and group.name not in links)
        self.counted = with_weights(self.cuttable, single)
        self.counted = replace(self.counted, groups=(*self.counted.groups, *free))
        gates = Layout(tuple(group.size for group in self.groups))
        units = Layout(tuple(group.size for group in self.counted.groups))
        coarse = self.cuttable.groups
        self._n_coarse = n_coarse = sum(group.size for group in coarse)
        self._n_units = units.total
        self.sizes = gates.sizes
        rules = Layout(tuple(sum(group.size for group in one.groups) for one in chosen))
        self._rules: tuple[slice, ...] = rules.slices
        self._one_scale = all(_scale(one.method) == _scale(chosen[0].method) for one in chosen)
        #: for each coarse unit the gates that multiply, positions in the extended gates, (2, C)
        sources = np.full((2, n_coarse), gates.total, dtype=np.int64)
        #: for each gate its unit, (Z,)
        targets = np.empty(gates.total, dtype=np.int64)
        starts = {group.name: start for group, start in zip(self.counted.groups, units.offsets, strict=True)}
        for group, start in zip(self.groups, gates.offsets, strict=True):
            own = np.arange(group.size)
            if group.name in links:
                link = links[group.name]
                sources[0, starts[link.group] + link.units] = start + own
                targets[start + own] = starts[link.group] + link.units
                continue
            if group.kind not in ("weights", ACTIVATIONS):
                sources[0, starts[group.name] + own] = start + own
            targets[start + own] = starts[group.name] + own
        #: for each coarse unit the one that owns it, itself where none does, (C,)
        owner_of = np.arange(n_coarse)
        for group in fine:
            owner = owners(structure, group, units.offsets)
            has = np.flatnonzero(owner >= 0)
            sources[1, starts[group.name] + has] = sources[0, owner[has]]
            owner_of[starts[group.name] + has] = owner[has]
        self._owner_of = torch.from_numpy(owner_of)
        self._owned = self._owner_of != torch.arange(n_coarse)
        self._sources = torch.from_numpy(sources)
        self._targets = torch.from_numpy(targets)
        gate_starts = {group.name: start for group, start in zip(self.groups, gates.offsets, strict=True)}
        #: the weights of each tensor, with where their gates and their units start
        self._scalars = tuple(
            (Scalars(group, coarse, units.offsets[: len(coarse)], structure.shapes[group.members[0].tensor]), *where)
            for group in single
            for where in [(gate_starts[group.name], starts[group.name])]
        )
        #: gates on activations that no unit goes with
        self._free = torch.from_numpy(
            np.concatenate(
                [
                    np.zeros(0, dtype=np.int64),
                    *(np.arange(gate_starts[group.name], gate_starts[group.name] + group.size) for group in free),
                ]
            )
        )
        self._read, self._readers, self._used = self._only_fine(fine, starts, units.offsets)
        self._read_once = torch.unique(self._read)
        # Two frequent cases in which what acts on each unit is one gate, in the order of the gates.
        bare = bool((self._sources == gates.total).all()) and not len(self._free)
        row = np.array_equal(targets, np.arange(n_coarse if bare else 0, units.total))
        self._only_coarse = row and not bare and not self._scalars and bool((self._sources[1] == gates.total).all())
        self._only_weights = row and bare and bool(self._scalars)

    def chances(self, prob_open: Tensor) -> Tensor:
        """Open chance of every unit ``(U,)`` from that of every gate ``(Z,)``; differentiable.

        A structured unit whose inputs all have gates counts with its own gate's chance, which is an upper bound.
        """
        if self._only_coarse:
            return prob_open
        if self._only_weights:
            return torch.cat([prob_open.new_ones(self._n_coarse), prob_open])
        sources = self._sources.to(prob_open.device)
        gates = extended(prob_open)
        coarse = gates.index_select(0, sources[0]) * gates.index_select(0, sources[1])
        if not self._scalars and not len(self._free):
            return coarse
        over = extended(coarse)
        fine = [scalars.chances(prob_open[at : at + scalars.size], over) for scalars, at, _ in self._scalars]
        return torch.cat([coarse, *fine, prob_open.index_select(0, self._free.to(prob_open.device))])

    def open(self, gates: Tensor) -> Tensor:
        """Which units are open, bool ``(U,)``, from the gates ``(Z,)`` in evaluation or which of them are open."""
        own = gates.bool()
        simple = self._only_coarse or self._only_weights
        is_open = self.chances(own) if simple else self.chances(own.to(torch.float32)) != 0
        while len(self._read) or self._scalars:  # what goes may leave others unread
            before = is_open[: self._n_coarse].clone()
            self._close_unread_(is_open)
            if not self._scalars or torch.equal(before, is_open[: self._n_coarse]):
                break
            over = extended(is_open[: self._n_coarse])
            for scalars, at, start in self._scalars:
                is_open[start : start + scalars.size] = scalars.chances(own[at : at + scalars.size], over)
        return is_open

    def _close_unread_(self, is_open: Tensor) -> None:
        """Close, in place, inputs that no open weight reads, and structured units that no open input or weight does."""
        coarse = is_open[: self._n_coarse]
        touched: list[Tensor] = []
        for number, dim in self._used:
            scalars, _, start = self._scalars[number]
            used = scalars.used(is_open[start : start + scalars.size], dim)
            touched.append(used)
            inputs = self._column_starts.get((scalars.tensor, dim))
            if inputs is not None:
                coarse[inputs : inputs + len(used)] &= used
        if len(self._read):
            read, readers, once = (part.to(is_open.device) for part in (self._read, self._readers, self._read_once))
            seen = torch.cat([coarse, *touched])[readers].float()
            count = seen.new_zeros(len(coarse)).index_add(0, read, seen)
            coarse[once] &= count[once] > 0
        owner, owned = self._owner_of.to(is_open.device), self._owned.to(is_open.device)
        coarse &= coarse[owner] | ~owned

    def spread(self, gates: Tensor) -> Tensor:
        """Units of these gates, bool ``(Z,)`` to bool ``(U,)``; False for units without a gate."""
        units = torch.zeros(self._n_units, dtype=torch.bool, device=gates.device)
        return units.index_copy(0, self._targets.to(gates.device), gates)

    def owner_in(self, units: Tensor) -> Tensor:
        """Inputs whose owner is among these units, bool ``(U,)``."""
        found = torch.zeros_like(units)
        found[: self._n_coarse] = units[self._owner_of.to(units.device)] & self._owned.to(units.device)
        return found

    @property
    def has_weights(self) -> bool:
        """Whether single weights have gates."""
        return bool(self._scalars)

    def gates(self, is_open: Tensor) -> Tensor:
        """Which gates are open, bool ``(Z,)``, if exactly these units ``(U,)`` are."""
        return is_open.index_select(0, self._targets.to(is_open.device))

    def scores(self, scores: Tensor, is_open: Tensor) -> Tensor:
        """Order in which units are closed, ``(U,)``, from that of the gates ``(Z,)``.

        Infinite where flipping one unit alone has no effect: units without a gate, inputs and weights whose owner is
        closed, closed owners that only gated inputs or weights read, and activations that no unit goes with. Scores of
        different methods have no common scale, so their ranks within the rule are compared.

        Args:
            scores: ``(Z,)``, larger stays longer.
            is_open: bool ``(U,)``, on the same device.
        """
        if not self._one_scale:
            scores = torch.cat([_ranks(scores[part]) for part in self._rules])
        if self._only_coarse:
            return scores
        if self._only_weights and bool(is_open[: self._n_coarse].all()):
            return torch.cat([scores.new_full((self._n_coarse,), torch.inf), scores])
        spread = scores.new_full((len(is_open),), torch.inf)
        spread = spread.index_copy(0, self._targets.to(scores.device), scores)
        owner, owned, once = (part.to(is_open.device) for part in (self._owner_of, self._owned, self._read_once))
        coarse = is_open[: self._n_coarse]
        idle = ~coarse[owner] & owned
        idle[once] |= ~coarse[once]
        over = extended(coarse)
        parts = [idle, *(~scalars.owned(over).reshape(-1) for scalars, *_ in self._scalars)]
        parts.append(idle.new_ones(len(self._free)))
        return spread.masked_fill(torch.cat(parts), torch.inf)

    def keep(self, is_open: Tensor) -> Keep:
        """Open units of every cuttable group that loses some, from bool ``(U,)``."""
        return {
            group.name: torch.nonzero(part).flatten()
            for group, part in self._parts(is_open.cpu())
            if group.kind not in ("weights", ACTIVATIONS) and not bool(part.all())
        }

    def zero_closed_(self, plain: nn.Module, is_open: Tensor) -> None:
        """Write 0.0 over the weights that do not count, in place, so that what is left is what was counted."""
        tensors = named_tensors(plain)
        for scalars, _, start in self._scalars:
            scalars.zero_closed_(tensors[scalars.tensor], is_open[start : start + scalars.size])

    def n_params(self, small: nn.Module) -> int:
        """Parameters of a cut model; of tensors whose single weights had gates, those that are not zero."""
        tensors = named_tensors(small)
        gated = {id(tensors[scalars.tensor]) for scalars, *_ in self._scalars if scalars.tensor in tensors}
        return sum(int(p.count_nonzero()) if id(p) in gated else p.numel() for p in small.parameters())

    def stays(self, is_open: Tensor, round_to: int = 1) -> Tensor:
        """Units that a cut to the open ones leaves, bool ``(U,)``: one of a group that lost all, and what rounds up."""
        stays = is_open.cpu().clone()
        rounded = rounded_keep(self.cuttable, self.keep(stays), round_to)
        for group, part in self._parts(stays):
            if group.name in rounded:
                part.zero_()
                part[rounded[group.name]] = True
        return stays

    def flips(self, before: Tensor, after: Tensor) -> int:
        """How many units, bool ``(U,)``, were opened or closed, without those that went with an owner of theirs."""
        flipped = before != after
        coarse = flipped[: self._n_coarse]
        alone = coarse & ~(self._owned & coarse[self._owner_of])
        if not self._scalars:
            return int(alone.sum())  # what is free is never flipped
        gated = torch.zeros_like(flipped).index_fill(0, self._targets, value=True)
        kept = extended(~coarse)
        parts = [
            flipped[start : start + scalars.size] & scalars.owned(kept).reshape(-1)
            for scalars, _, start in self._scalars
        ]
        return int((torch.cat([alone, *parts, flipped[len(flipped) - len(self._free) :]]) & gated).sum())

    def lost(self, before: Tensor, after: Tensor) -> dict[str, int]:
        """By group, how many of the units ``before`` are not ``after``, bool ``(U,)``; single weights not counted."""
        parts = ((group, int(part.sum())) for group, part in self._parts(before & ~after) if group.kind != "weights")
        return {group.name: number for group, number in parts if number}

    def by_group(self, is_open: Tensor) -> dict[str, tuple[int, int]]:
        """Open and all units of each counted group, from bool ``(U,)``."""
        return {group.name: (int(part.sum()), group.size) for group, part in self._parts(is_open)}

    def closed_free(self, is_open: Tensor) -> dict[str, int]:
        """Closed units of each group on activations that no unit goes with, where there are any, from bool ``(U,)``."""
        return {
            group.name: int((~part).sum())
            for group, part in self._parts(is_open)
            if group.kind == ACTIVATIONS and not bool(part.all())
        }

    def _parts(self, flat: Tensor) -> Iterator[tuple[Group, Tensor]]:
        """Each counted group with its part of a vector ``(U,)``, a view."""
        parts = torch.split(flat, [group.size for group in self.counted.groups])
        return zip(self.counted.groups, parts, strict=True)

    def _only_fine(
        self, fine: Sequence[Group], starts: dict[str, int], offsets: Sequence[int]
    ) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        """Pairs of a structured unit and what reads it, for units that only gated inputs or gated weights read.

        Readers are positions among the coarse units, and behind them those of the dimensions of gated weights that are
        returned with the pairs: by the number of the tensor, and dimension.
        """
        self._column_starts = {(group.members[0].tensor, group.members[0].dim): starts[group.name] for group in fine}
        places = dict(self._column_starts)
        used: list[tuple[int, int]] = []
        behind = self._n_coarse
        for number, (scalars, *_) in enumerate(self._scalars):
            consumed = {
                member.dim
                for group in self.cuttable.groups
                for member in group.consumers
                if member.tensor == scalars.tensor
            }
            for dim in sorted(consumed):
                used.append((number, dim))
                places.setdefault((scalars.tensor, dim), behind)
                behind += self.structure.shapes[scalars.tensor][dim]
        read, readers = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for group, start in zip(self.structure.groups, offsets, strict=False):
            if not group.at_producers and all((m.tensor, m.dim) in places for m in group.consumers):
                for member in group.consumers:
                    read.append(np.repeat(np.arange(start, start + group.size), member.index.shape[1]))
                    readers.append(places[member.tensor, member.dim] + member.index.reshape(-1))
        return torch.from_numpy(np.concatenate(read)), torch.from_numpy(np.concatenate(readers)), used


def _scale(method: Method) -> dict[str, Any]:
    """What decides the scale of a method's scores: its settings but the start."""
    return {name: value for name, value in method.settings().items() if name != "init_open"} | {"name": method.name}


def _ranks(scores: Tensor) -> Tensor:
    """Ranks in [0, 1), ties by position."""
    order = scores.argsort(stable=True).argsort(stable=True)
    return order.to(scores.dtype) / max(len(order), 1)
