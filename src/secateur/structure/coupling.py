"""Coupling: what a trace says about units - tied, frozen, rectangular, consumed - and the solution.

The rules write here while operators run; ``solve`` turns it all into components at the end, by
vectorised connected components over ids. Nothing here knows about models or operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from secateur.structure.crossing import Crossing, Crossings
from secateur.structure.ids import Ids

__all__ = ["Coupling", "Freeze", "Product", "Solution"]


@dataclass(frozen=True)
class Freeze:
    """Why units cannot go.

    Args:
        reason: one sentence.
        operator: the ATen operator that was executing.
        module: qualified name of the module that executed it.
    """

    reason: str
    operator: str = ""
    module: str = ""


@dataclass(frozen=True)
class Product:
    """A product of dimension sizes, as a cost counts it: ``coefficient * prod(open ids of each axis)``."""

    coefficient: float
    axes: tuple[Ids, ...]
    label: str


@dataclass(frozen=True)
class Solution:
    """Units, solved.

    Args:
        component: int64 ``(n_ids,)``, the component of each id; id 0 has component 0.
        frozen: per component, position in ``freezes`` of the first reason, or -1 where the units may go.
        freezes: the reasons.
    """

    component: NDArray[np.int64]
    frozen: NDArray[np.int64]
    freezes: list[Freeze]


_Key = tuple[tuple[int, ...], bytes]


@dataclass
class Coupling:
    """The ledger that rules write to.

    ``recording = False`` makes it deaf: the trial propagates labels only and compares them.
    """

    n_ids: int = 1
    operator: str = ""
    module: str = ""
    recording: bool = True
    consumed: list[Ids] = field(default_factory=list)
    carried: list[Ids] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    normalised: list[tuple[Ids, str]] = field(default_factory=list)
    unclosed: list[Ids] = field(default_factory=list)
    widths: list[Ids] = field(default_factory=list)
    batches: list[Ids] = field(default_factory=list)
    joined: list[tuple[Ids, Ids]] = field(default_factory=list)
    count_products: bool = True
    first_made: int = np.iinfo(np.int64).max
    crossings: Crossings = field(default_factory=Crossings)
    _ties: list[tuple[Ids, Ids]] = field(default_factory=list)
    _frozen: list[tuple[Ids, int]] = field(default_factory=list)
    _freezes: list[Freeze] = field(default_factory=list)
    _reason_at: dict[Freeze, int] = field(default_factory=dict)
    _rectangles: dict[_Key, tuple[Ids, frozenset[int]]] = field(default_factory=dict)
    _followers: dict[_Key, list[tuple[frozenset[int], Ids]]] = field(default_factory=dict)

    def new_ids(self, count: int) -> Ids:
        """``count`` fresh ids."""
        ids = np.arange(self.n_ids, self.n_ids + count, dtype=np.int64)
        self.n_ids += count
        return ids

    def made(self, ids: Ids) -> bool:
        """Whether ids are of a tensor that the model made while it ran, not of parameters and buffers."""
        return bool((ids >= self.first_made).all()) and not self.crossings.have(ids)

    def cross(self, first: Ids, second: Ids) -> Ids | None:
        """Ids ``(len(first), len(second))`` of positions that belong to two units: either kind can be cut, not both.

        Returns:
            None where the trial, which has no ids of its own, does not know them.
        """
        one = self.crossings.find(first, second)
        if one is None and self.recording:
            rows, columns = np.unique(first), np.unique(second)
            one = Crossing(rows, columns, self.n_ids)
            self.crossings.known.append(one)
            table = self.new_ids(len(rows) * len(columns)).reshape(len(rows), len(columns))
            self.follows(table, [0], rows)
            self.follows(table, [1], columns)
        return None if one is None else one.pairs(first, second)

    def tie(self, a: Ids, b: Ids, reason: str = "meets a dimension that cannot be cut") -> None:
        """Say that ids at equal positions (after broadcasting) go together; an id tied to 0 is frozen."""
        if not self.recording or a is b:
            return
        if a.shape != b.shape:
            a, b = np.broadcast_arrays(a, b)
        a, b = a.ravel(), b.ravel()
        both = (a != 0) & (b != 0)
        if not both.all():
            lonely = np.where(both, 0, a + b)
            self.freeze(lonely[lonely != 0], reason)
            a, b = a[both], b[both]
        differ = a != b
        if differ.any():
            self._ties.append((a[differ], b[differ]))

    def freeze(self, ids: Ids, reason: str) -> None:
        """Say that these ids never go, with the operator and module at work as the place."""
        if not self.recording:
            return
        self._frozen.append((ids.ravel(), self._number(Freeze(reason, self.operator, self.module))))

    def freeze_at(self, ids: Ids, freeze: Freeze) -> None:
        """Say that these ids never go, with a reason that was found elsewhere (the trial)."""
        self._frozen.append((ids.ravel(), self._number(freeze)))

    def rectangle(self, ids: Ids, blocked: Sequence[int] = ()) -> None:
        """Say that an array of ids can only lose whole slices along one axis, and along none of ``blocked``."""
        if not self.recording or not ids.any():
            return
        key = (ids.shape, ids.tobytes())
        _, before = self._rectangles.get(key, (ids, frozenset()))
        self._rectangles[key] = (ids, before | frozenset(blocked))

    def follows(self, ids: Ids, axes: Sequence[int], narrow: Ids) -> None:
        """Say that ``narrow`` runs along ``axes`` of a rectangle: cut there, it goes along; cut elsewhere, it stays."""
        if not self.recording:
            return
        if not ids.any():
            self.freeze(narrow, _MET_FIXED)
            return
        self.rectangle(ids)
        self._followers.setdefault((ids.shape, ids.tobytes()), []).append((frozenset(axes), narrow))

    def collapse(self, ids: Ids, axes: Sequence[int], reason: str) -> Ids | None:
        """Give up cutting along ``axes``: tie along them, or freeze where no other axis is left.

        Returns:
            The ids over the other axes, or None where nothing is left.
        """
        axes = tuple(axes)
        if not axes:
            return ids
        if len(axes) == ids.ndim:
            self.freeze(ids, reason)
            return None
        first = ids[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(ids.ndim))]
        self.tie(ids, first, reason)
        return first.reshape([size for axis, size in enumerate(ids.shape) if axis not in axes])

    def consume(self, ids: Ids, *, vanishes: bool = False) -> None:
        """Say that a contraction reads these slices of a weight: zeroing one closes its unit here.

        ``vanishes``: zeroing what carries the unit would close it here as well.
        """
        if self.recording:
            self.consumed += [ids, *self.crossings.parents(ids)]
            if not vanishes:
                self.unclosed.append(ids)

    def join(self, a: Ids, b: Ids) -> None:
        """Say that slices of two weights make one: where either is consumed, both are."""
        if self.recording and a is not b:
            self.joined.append((a, b))
            for ids in (a, b):
                if self.crossings.have(ids):
                    self.freeze(ids, _MERGED)

    def normalise(self, ids: Ids, path: str) -> None:
        """Say that the RMSNorm of that path averages over these units: they can go if they are zero at its input."""
        if self.recording:
            self.normalised.append((ids, path))

    def carry(self, ids: Ids) -> None:
        """Say that these slices of a parameter carry their unit's values onward."""
        if self.recording:
            self.carried += [ids, *self.crossings.parents(ids)]

    def width(self, ids: Ids) -> None:
        """Say that these run along a dimension that a contraction with a weight reads or makes."""
        if self.recording and ids.ndim == 1:
            self.widths.append(ids)

    def batch(self, ids: Ids) -> None:
        """Say that these number the products of two activations, as heads do."""
        if self.recording:
            self.batches.append(ids)

    def product(self, coefficient: float, axes: Sequence[Ids]) -> None:
        """Count multiply-accumulates: ``coefficient`` times the open positions of each axis."""
        if self.recording and self.count_products:
            self.products.append(Product(coefficient, tuple(axes), self.module))

    def solve(self) -> Solution:
        """Connected components of ties, after every rectangle has picked the axis it is cut along."""
        frozen_by_rules = len(self._frozen)
        chosen: list[tuple[Ids, Ids]] = []
        pending = list(self._rectangles.values())
        component = self._components(chosen)
        while pending:
            frozen = self._frozen_components(component) >= 0
            undecided: list[tuple[Ids, frozenset[int]]] = []
            for ids, always in pending:
                blocked = always | self._shut_axes(ids, component, frozen)
                axis = _decide(component[ids], frozen, blocked)
                if axis is None:
                    undecided.append((ids, blocked))
                else:
                    chosen.extend(self._cut_along(ids, axis))
            if len(undecided) == len(pending):
                # No rectangle is forced: the largest picks its finest axis, then look again. But of two dimensions that
                # merged, it is the earlier parameter's: heads go rather than their features, with all that reads them.
                ids, blocked = max(undecided, key=lambda pair: (self.crossings.table(pair[0]), pair[0].size))
                undecided = [pair for pair in undecided if pair[0] is not ids]
                finest = 0 if self.crossings.table(ids) else _finest(component[ids], frozen, blocked)
                chosen.extend(self._cut_along(ids, finest))
            component = self._components(chosen)
            pending = undecided
        shut = self._frozen_components(component)
        shut[self._not_zero(component) & (shut < 0)] = self._number(_NOT_ZERO)
        solution = Solution(component, shut, list(self._freezes))
        # What the solution froze by itself may be decided otherwise when more is known.
        del self._frozen[frozen_by_rules:]
        return solution

    def _not_zero(self, component: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Components under an RMSNorm that something reads where they are not zero even if closed."""
        n = int(component.max()) + 1
        normed, unclosed = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
        for ids, _ in self.normalised:
            normed[component[ids]] = True
        for ids in self.unclosed:
            unclosed[component[ids]] = True
        return normed & unclosed

    def _cut_along(self, ids: Ids, axis: int) -> list[tuple[Ids, Ids]]:
        """Ties that follow when a rectangle is cut along ``axis``; along none where it is -1."""
        ties: list[tuple[Ids, Ids]] = []
        if axis < 0:
            self._frozen.append((np.unique(ids), self._number(_UNEVEN)))
        else:
            ties.append(_ties_across(ids, axis))
            slices = np.moveaxis(ids, axis, 0).reshape(ids.shape[axis], -1)
            partly_fixed = slices[(slices == 0).any(axis=1) & (slices != 0).any(axis=1)]
            if partly_fixed.size:
                self._frozen.append((np.unique(partly_fixed), self._number(_UNEVEN)))
        for axes, narrow in self._followers.get((ids.shape, ids.tobytes()), []):
            if axes == {axis}:
                slices = np.moveaxis(ids, axis, 0).reshape(ids.shape[axis], -1)[:, 0]
                both = (slices != 0) & (narrow != 0)
                ties.append((slices[both], narrow[both]))
                lonely = np.where(both, 0, slices + narrow)
                self._frozen.append((np.unique(lonely), self._number(Freeze(_MET_FIXED))))
            else:
                reason = Freeze(_MERGED if self.crossings.table(ids) else _FOLLOWS_NOT)
                self._frozen.append((np.unique(narrow), self._number(reason)))
        return ties

    def _shut_axes(self, ids: Ids, component: NDArray[np.int64], frozen: NDArray[np.bool_]) -> frozenset[int]:
        """Axes of two dimensions that merged along which nothing can go, since the units there cannot."""
        if not self.crossings.table(ids):
            return frozenset()
        followers = self._followers.get((ids.shape, ids.tobytes()), [])
        return frozenset().union(*(axes for axes, narrow in followers if frozen[component[narrow]].all()))

    def _number(self, freeze: Freeze) -> int:
        if freeze not in self._reason_at:
            self._reason_at[freeze] = len(self._freezes)
            self._freezes.append(freeze)
        return self._reason_at[freeze]

    def _components(self, extra: list[tuple[Ids, Ids]]) -> NDArray[np.int64]:
        ties = self._ties + extra
        a = np.concatenate([pair[0].ravel() for pair in ties]) if ties else np.zeros(0, np.int64)
        b = np.concatenate([pair[1].ravel() for pair in ties]) if ties else np.zeros(0, np.int64)
        graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(self.n_ids, self.n_ids))
        _, component = connected_components(graph, directed=False)
        return component.astype(np.int64)

    def _frozen_components(self, component: NDArray[np.int64]) -> NDArray[np.int64]:
        first = np.full(int(component.max()) + 1, -1, dtype=np.int64)
        for ids, number in reversed(self._frozen):
            first[component[ids]] = number
        first[component[0]] = max(first[component[0]], 0) if self._freezes else 0
        return first


_MET_FIXED = "meets another tensor's dimension that cannot be cut"
_MERGED = "is merged with another unit's dimension, which is cut instead"
_FOLLOWS_NOT = "runs along a dimension of a tensor that is cut along another one"
_NOT_ZERO = Freeze("is averaged over by an RMSNorm, and read where closing it would not make it zero")
_UNEVEN = Freeze("its dimensions are merged so that no single one of them can lose slices")


def _ties_across(ids: Ids, axis: int) -> tuple[Ids, Ids]:
    """Ties that make every slice along ``axis`` one unit."""
    slices = np.moveaxis(ids, axis, 0).reshape(ids.shape[axis], -1)
    first = np.broadcast_to(slices[:, :1], slices.shape)
    keep = (slices != 0) & (first != 0)
    return slices[keep], first[keep]


def _slices_free(component: NDArray[np.int64], frozen: NDArray[np.bool_], axis: int) -> NDArray[np.bool_]:
    slices = np.moveaxis(component, axis, 0).reshape(component.shape[axis], -1)
    return np.asarray(~frozen[slices].any(axis=1), dtype=np.bool_)


def _uniform(component: NDArray[np.int64], axis: int) -> bool:
    slices = np.moveaxis(component, axis, 0).reshape(component.shape[axis], -1)
    return bool((slices == slices[:, :1]).all())


def _decide(component: NDArray[np.int64], frozen: NDArray[np.bool_], blocked: frozenset[int]) -> int | None:
    """The axis that a rectangle is cut along where there is no choice; -1 to freeze it; None for later."""
    if frozen[component].all():
        return _first_open(component, blocked)
    admissible = [axis for axis in range(component.ndim) if axis not in blocked]
    if not admissible:
        return -1
    already = [axis for axis in admissible if _uniform(component, axis)]
    if already:
        return already[0]
    if len(admissible) == 1:
        return admissible[0]
    free = [axis for axis in admissible if _slices_free(component, frozen, axis).any()]
    if len(free) <= 1:
        return free[0] if free else -1
    return None


def _first_open(component: NDArray[np.int64], blocked: frozenset[int]) -> int:
    return next((axis for axis in range(component.ndim) if axis not in blocked), -1)


def _finest(component: NDArray[np.int64], frozen: NDArray[np.bool_], blocked: frozenset[int]) -> int:
    """The axis that leaves the most separate units; the earlier one where two leave as many."""

    def count(axis: int) -> int:
        slices = np.moveaxis(component, axis, 0).reshape(component.shape[axis], -1)
        used, inverse = np.unique(slices, return_inverse=True)
        at = inverse.reshape(slices.shape)
        ties = coo_array(
            (np.ones(at.size, np.int8), (at.ravel(), np.broadcast_to(at[:, :1], slices.shape).ravel())),
            shape=(len(used), len(used)),
        )
        number, merged = connected_components(ties, directed=False)
        shut = np.zeros(number, dtype=bool)
        np.logical_or.at(shut, merged, frozen[used])
        return int(number - shut.sum())

    admissible = [axis for axis in range(component.ndim) if axis not in blocked]
    return max(admissible, key=lambda axis: (count(axis), -axis))
