"""A forward pass on the open units of one draw: weights narrowed before it, in place, and put back after it.

Index conventions: ``U`` gates of the model in a row; ``S`` positions of one dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.errors import GateError, SecateurError
from secateur.pruning.axis import Axis, Flags
from secateur.pruning.draw import Draw
from secateur.pruning.narrowable import Held, Ways, held, narrowable
from secateur.pruning.narrowed import Place, narrowed
from secateur.pruning.placement import ConsumerGate, Map, gated_sites
from secateur.structure.cut import CutPlan
from secateur.structure.describe import described
from secateur.structure.groups import Group
from secateur.structure.structure import Structure

__all__ = ["DrawsRandomlyError", "Narrowing"]


class DrawsRandomlyError(SecateurError):
    """A pass that left units out whole drew random numbers, which are others in a full pass; users never see it."""


@dataclass(eq=False)
class _Cut:
    """A tensor that may be narrowed.

    Args:
        places: where it is held.
        dims: what decides about its dimensions.
        macs: multiply-accumulates of a pass that its numbers take part in.
    """

    places: list[Held]
    dims: dict[int, Axis]
    macs: float = 0.0


@dataclass(eq=False)
class _Gated:
    """A gate on a weight, and by dimension its maps ``(L, S)``.

    Args:
        gate: as it acts in a full pass.
        maps: by dimension.
        dims: what decides about the dimensions of its weight.
        ones: whether all that it multiplies by is exactly 1 in what a narrowed pass leaves of the weight.
    """

    gate: ConsumerGate
    maps: dict[int, Map]
    dims: dict[int, Axis]
    ones: bool


@dataclass(eq=False)
class Narrowing:
    """Leaves the closed units of a draw out of forward passes.

    Args:
        model: gated.
        groups: gated, in the order of their gates.
        how: each of them is left out.
        structure: of the model.
        gone: gates whose units the model has lost for good, bool ``(U,)``.
        cut: what was cut from the dense model so far.
        limit: a pass is narrowed where at most this share of the multiply-accumulates is left.

    Attributes:
        share: of multiply-accumulates that the last pass looked at had left, products of two activations not counted.
        macs: of a full pass of the model as it is.
        passes: how many were narrowed.
        random: whether a pass drew random numbers.
        coarseness: relative distance of neighbouring numbers that the last pass computed with where its tensors do not
            say it: under autocast, and on CUDA devices.
    """

    model: nn.Module
    groups: tuple[Group, ...]
    how: Ways
    structure: Structure
    gone: Tensor
    cut: CutPlan | None
    limit: float = 1.0
    share: float = field(default=1.0, init=False)
    macs: float = field(default=0.0, init=False)
    passes: int = field(default=0, init=False)
    random: bool = field(default=False, init=False)
    coarseness: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        maps = narrowable(self.groups, self.how, self.structure, self.cut)
        places = held(self.model)
        self._undo: list[Callable[[], object]] = []
        self._put_in: list[tuple[Tensor, int]] = []
        self._before: list[Tensor] | None = None
        self._left = ~self.gone.numpy()
        self._sizes = np.array([group.size for group in self.groups])
        bounds = np.concatenate([[0], np.cumsum(self._sizes)])
        self._starts = bounds[:-1]
        self._whole = np.array([number in self.how.whole for number in range(len(self.groups))], dtype=bool)
        axes: dict[tuple[bytes, bytes, int], Axis] = {}
        self._cuts: list[_Cut] = []
        by_tensor: dict[int, _Cut] = {}
        for name in dict.fromkeys([*maps.whole, *maps.read]):
            first = places[name][0]
            tensor = first.store[first.key]
            dims: dict[int, Axis] = {}
            for dim in sorted({*maps.whole.get(name, {}), *maps.read.get(name, {})}):
                layers = [part.get(name, {}).get(dim) for part in (maps.whole, maps.read)]
                whole, read = (b"" if one is None else one.tobytes() for one in layers)
                key = whole, read, tensor.shape[dim]
                if key not in axes:
                    axes[key] = Axis(layers[0], layers[1], tensor.shape[dim])
                dims[dim] = axes[key]
            if id(tensor) not in by_tensor:
                by_tensor[id(tensor)] = _Cut(places[name], dims)
                self._cuts.append(by_tensor[id(tensor)])
        self._axes = list(axes.values())
        self._gated = [
            _gated(site.gate, by_tensor.get(id(site.chain.original)), self.how.binary, bounds)
            for site in gated_sites(self.model)
        ]
        self._count(places)
        self._owners = self._described()
        self._attributes = self._sized()

    @property
    def possible(self) -> bool:
        """Whether there is anything to leave out."""
        return bool(self._cuts)

    def pattern(self, share: float, generator: np.random.Generator) -> Tensor:
        """Gates ``(U,)``, 0 and 1, of a draw that leaves this share of the units of every group open."""
        values = np.ones(int(self._sizes.sum()), dtype=np.float64)
        for start, size in zip(self._starts.tolist(), self._sizes.tolist(), strict=True):
            closed = generator.permutation(size)[: size - max(1, round(share * size))]
            values[start + closed] = 0.0
        for number, group in enumerate(self.groups):
            if group.name in self.how.why:
                values[self._starts[number] : self._starts[number] + group.size] = 1.0
        return torch.from_numpy(values)

    def begin(self, draw: Draw) -> None:
        """Before a forward pass of the whole model: narrow it, where that is to be."""
        self.end(watched=False)
        self._before = self._states()
        self.coarseness = _coarseness(draw.values.device)
        is_open = np.append(draw.values[:-1].detach().cpu().numpy() != 0, True)
        is_open[:-1] &= self._left
        counts = np.add.reduceat(is_open[:-1].astype(np.int64), self._starts)
        forced = self._force(is_open, counts)
        for axis in self._axes:
            forced |= axis.look(is_open)
        left = sum(cut.macs * math.prod(axis.share for axis in cut.dims.values()) for cut in self._cuts)
        self.share = 1.0 - (sum(cut.macs for cut in self._cuts) - left) / self.macs if self.macs else 1.0
        if self.share > self.limit or all(axis.index is None for axis in self._axes):
            return
        if not all(gated.gate.training for gated in self._gated):
            return  # a part of the model in evaluation mode has gates of its own there, which open other units
        draw.narrowed = True
        self.passes += 1
        try:
            self._narrow(forced, counts)
        except BaseException:
            self.end(watched=False)
            raise

    def end(self, *, watched: bool = True) -> None:
        """After it: everything is as it was.

        Raises:
            DrawsRandomlyError: units were left out whole, and random numbers drawn.
            GateError: the pass wrote to a weight of which it had only a part.
        """
        undone = bool(self._undo)
        while self._undo:
            self._undo.pop()()
        written = any(part._version != version for part, version in self._put_in)
        self._put_in.clear()
        if watched and written:
            raise GateError("the model writes to its weights in its forward pass; attach with conditional=False")
        before, self._before = self._before, None
        if watched and before is not None and not self.random:
            self.random = any(not torch.equal(*two) for two in zip(before, self._states(), strict=True))
            if self.random and undone and self.how.whole:
                raise DrawsRandomlyError("a narrowed pass drew random numbers")

    def _narrow(self, forced: bool, counts: NDArray[np.int64]) -> None:
        new: dict[int, Tensor] = {}
        for cut in self._cuts:
            first = cut.places[0]
            old = first.store[first.key]
            parts = [
                Place(dim, axis.index.to(old.device), axis.run)
                for dim, axis in cut.dims.items()
                if axis.index is not None
            ]
            if not parts:
                continue
            part = new[id(cut)] = narrowed(old, parts)
            self._put_in.append((part, part._version))
            for place in cut.places:
                self._put(place.store, place.key, part)
        for gated in self._gated:
            gated.gate.acting = {} if gated.ones and not forced else _maps_now(gated)
            self._undo.append(gated.gate.forget)
        for owner, cuts in self._owners:
            if any(id(cut) in new for _, cut in cuts):
                self._describe(owner, cuts)
            for key, cut in cuts:
                axis = cut.dims.get(1)
                if key == "weight" and axis is not None and axis.selected is not None:
                    hook = _Selected(axis.selected, axis.run, getattr(owner, "kernel_size", ()))
                    self._undo.append(owner.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for owner, key, fixed, terms in self._attributes:
            _set(self._undo, owner, key, fixed + sum(times * int(counts[group]) for group, times in terms))

    def _put(self, store: dict[str, Any], key: str, value: Any) -> None:
        old = store[key]
        store[key] = value
        self._undo.append(lambda: store.__setitem__(key, old))

    def _describe(self, owner: nn.Module, cuts: Sequence[tuple[str, _Cut]]) -> None:
        """The integers by which a layer describes its tensors, as after a cut."""
        shapes, kept = {}, {}
        for key, cut in cuts:
            place = cut.places[0]
            shapes[key] = place.store[place.key].shape
            # Only layers that fall into groups, and embeddings, look at the positions themselves.
            if isinstance(owner, (nn.GroupNorm, nn.Embedding)) or getattr(owner, "groups", 1) > 1:
                positions = {dim: axis.positions() for dim, axis in cut.dims.items()}
                kept[key] = {dim: tuple(some.tolist()) for dim, some in positions.items() if some is not None}
        for key, value in described(owner, shapes, kept).items():
            _set(self._undo, owner, key, value)

    def _force(self, is_open: Flags, counts: NDArray[np.int64]) -> bool:
        """Leave one unit of each group that goes whole, for a tensor without positions is none; its gate is at 0."""
        empty = np.flatnonzero((counts == 0) & self._whole)
        for number in empty.tolist():
            start, size = self._starts[number], self._sizes[number]
            is_open[start + int(self._left[start : start + size].argmax())] = True
            counts[number] = 1
        return len(empty) > 0

    def _states(self) -> list[Tensor]:
        """States of the generators that a pass may draw from; none once it is known that it does."""
        if self.random:
            return []
        states = [torch.get_rng_state()]
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            states.append(torch.cuda.get_rng_state())
        return states

    def _count(self, places: dict[str, list[Held]]) -> None:
        """Multiply-accumulates by tensor: a module's go with the largest of its own tensors."""
        sizes = [
            axis.fixed + sum(times * self.structure.groups[group].size for group, times in axis.per_group)
            for axis in self.structure.axes
        ]
        by_module: dict[str, float] = {}
        for term in self.structure.mac_terms:
            macs = term.coefficient * math.prod(sizes[axis] for axis in term.axes)
            by_module[term.label] = by_module.get(term.label, 0.0) + macs
        by_place = {(id(place.store), place.key): cut for cut in self._cuts for place in cut.places}
        for module, macs in by_module.items():
            own = [name for name in self.structure.shapes if name.rpartition(".")[0] == module and name in places]
            if not own:
                self.macs += macs
                continue
            name = max(own, key=lambda name: math.prod(self.structure.shapes[name]))
            place = places[name][0]
            left = macs * place.store[place.key].numel() / max(1, math.prod(self.structure.shapes[name]))
            self.macs += left
            cut = by_place.get((id(place.store), place.key))
            if cut is not None:
                cut.macs += left

    def _described(self) -> list[tuple[nn.Module, list[tuple[str, _Cut]]]]:
        owners: dict[int, tuple[nn.Module, list[tuple[str, _Cut]]]] = {}
        for cut in self._cuts:
            for place in cut.places:
                owners.setdefault(id(place.owner), (place.owner, []))[1].append((place.name, cut))
        return list(owners.values())

    def _sized(self) -> list[tuple[nn.Module, str, int, list[tuple[int, int]]]]:
        """Attributes that follow a cut: module, name, what of them is fixed, and units of gated groups in them."""
        number = {group.name: place for place, group in enumerate(self.groups)}
        found = []
        for rule in self.structure.attributes:
            terms = [
                (number[name], times)
                for group, times in rule.axis.per_group
                if (name := self.structure.groups[group].name) in number and number[name] in self.how.whole
            ]
            if terms:
                path, _, key = rule.name.rpartition(".")
                owner = self.model.get_submodule(path)
                left = np.add.reduceat(self._left.astype(np.int64), self._starts)
                fixed = getattr(owner, key) - sum(times * int(left[group]) for group, times in terms)
                found.append((owner, key, fixed, terms))
        return found


class _Selected:
    """Forward pre-hook: the layer gets only the positions of its input that its weight now reads."""

    def __init__(self, index: Tensor, run: int, kernel: Sequence[int]) -> None:
        self._index = index
        self._run = run
        self._after = len(kernel)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else kwargs["input"]
        dim = given.dim() - 1 - self._after
        chosen = narrowed(given, [Place(dim, self._index.to(given.device), self._run)])
        return ((chosen, *args[1:]), kwargs) if args else ((), {**kwargs, "input": chosen})


def _gated(gate: ConsumerGate, cut: _Cut | None, binary: frozenset[int], starts: NDArray[np.int64]) -> _Gated:
    """What a gate does in a narrowed pass."""
    maps = {dim: gate.maps[dim].numpy() for dim in gate.dims}
    dims = {} if cut is None else cut.dims
    ones = not gate.has_flat
    for dim, layers in maps.items():
        known = dims[dim].layers if dim in dims else layers[:0]
        for layer in layers:
            gated = layer < starts[-1]
            groups = np.unique(np.searchsorted(starts, layer[gated], side="right") - 1)
            ones = ones and binary.issuperset(groups.tolist()) and bool((known == layer).any(0)[gated].all())
    return _Gated(gate, maps, dims, ones)


def _maps_now(gated: _Gated) -> dict[int, Tensor]:
    """A gate's maps at the positions that stay."""
    found = {}
    for dim, layers in gated.maps.items():
        axis = gated.dims.get(dim)
        positions = None if axis is None else axis.positions()
        found[dim] = torch.from_numpy(layers if positions is None else layers.take(positions, axis=1))
    return found


def _coarseness(device: torch.device) -> float:
    kinds = [torch.float64]
    if torch.is_autocast_enabled(device.type):
        kinds.append(torch.get_autocast_dtype(device.type))
    # Tensor cores may take float32 with a mantissa as short as that of float16.
    return max(torch.finfo(kind).eps for kind in [*kinds, *([torch.float16] if device.type == "cuda" else [])])


def _set(undo: list[Callable[[], object]], owner: nn.Module, key: str, value: object) -> None:
    old = getattr(owner, key)
    if old != value:
        setattr(owner, key, value)
        undo.append(lambda: setattr(owner, key, old))
