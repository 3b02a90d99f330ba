"""Two units' dimensions that merge into one: ids for the pairs, so that the solution decides which of the two is cut.

A dimension of experts and one of their hidden units become one when ``einsum`` multiplies by both at once. Each
position of it then belongs to two units, and a label says one: a new id for each pair, which are a rectangle. Along
its rows lie the units of the one dimension, along its columns those of the other; the rectangle loses whole slices
along one of them, and the other's units stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from secateur.structure.ids import Ids

__all__ = ["Crossing", "Crossings"]


@dataclass(frozen=True, eq=False)
class Crossing:
    """The pairs of two sets of units.

    Args:
        first: ids of the one, ascending, ``(A,)``.
        second: ids of the other, ascending, ``(B,)``.
        start: id of the first pair; that of row a and column b is ``start + a * B + b``.
    """

    first: Ids
    second: Ids
    start: int

    @property
    def end(self) -> int:
        """The id after those of all pairs."""
        return self.start + len(self.first) * len(self.second)

    def pairs(self, first: Ids, second: Ids) -> Ids:
        """Ids of the pairs of some of the units, ``(len(first), len(second))``."""
        rows, columns = np.searchsorted(self.first, first), np.searchsorted(self.second, second)
        return np.asarray(self.start + rows[:, None] * len(self.second) + columns, dtype=np.int64)

    def parents(self, ids: Ids) -> tuple[Ids, Ids]:
        """The units of both kinds in whose pairs some ids are; ids of no pair here count for nothing."""
        mine = ids[(ids >= self.start) & (ids < self.end)] - self.start
        rows, columns = np.unique(mine // len(self.second)), np.unique(mine % len(self.second))
        return self.first[rows], self.second[columns]


@dataclass
class Crossings:
    """All of one labelling."""

    known: list[Crossing] = field(default_factory=list)

    def find(self, first: Ids, second: Ids) -> Crossing | None:
        """The crossing that has all of these units, in this order."""
        for one in self.known:
            # The ends tell nearly all apart; only then look at each.
            if _within(first, one.first) and _within(second, one.second):
                return one
        return None

    def have(self, ids: Ids) -> bool:
        """Whether these are ids of pairs, of which no tensor holds some along with other ids."""
        if not self.known or not ids.size or int(ids.flat[0]) < self.known[0].start:
            return False
        first = int(ids.flat[0])
        return any(one.start <= first < one.end for one in self.known)

    def table(self, ids: Ids) -> bool:
        """Whether an array is all pairs of one crossing, in its order."""
        return self.have(ids) and any(
            ids.shape == (len(one.first), len(one.second)) and bool((ids == one.pairs(one.first, one.second)).all())
            for one in self.known
        )

    def parents(self, ids: Ids) -> list[Ids]:
        """The units of which these ids are pairs; none where they are of no pairs."""
        if not self.have(ids):
            return []
        return [part for one in self.known for part in one.parents(ids) if len(part)]


def _within(some: Ids, all_: Ids) -> bool:
    """Whether ascending ids have all of some others."""
    return bool(all_[0] <= some.min() and some.max() <= all_[-1]) and bool(np.isin(some, all_).all())
