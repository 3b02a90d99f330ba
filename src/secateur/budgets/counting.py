"""The cost polynomials in integers: exact counts of given widths, many at once.

Index conventions: ``G`` groups, ``A`` axes, ``T`` terms, ``E`` pairs of an axis and a group in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from secateur.structure.groups import Axis, Term

__all__ = ["Counting"]


class Counting:
    """Sums of products of axes, each sum one kind of cost; in int64 wherever all coefficients are whole.

    Args:
        axes: sizes as linear functions of open units.
        kinds: the terms of each kind.

    Example:
        >>> counting = Counting([Axis(1, ((0, 2),))], [[Term(3.0, (0,), "weight")], [Term(1.0, (0, 0), "square")]])
        >>> counting(np.array([[0], [4]])).tolist()
        [[3, 1], [27, 81]]
    """

    def __init__(self, axes: Sequence[Axis], kinds: Sequence[Sequence[Term]]) -> None:
        entries = sorted((a, g, m) for a, axis in enumerate(axes) for g, m in axis.per_group)
        axis, self._group, self._multiplicity = np.array(entries, dtype=np.int64).reshape(-1, 3).T
        # The last axis, of size 1, fills up terms that have fewer factors than others.
        self._fixed = np.array([axis.fixed for axis in axes] + [1], dtype=np.int64)
        self._variable, self._starts = np.unique(axis, return_index=True)
        terms = [term for kind in kinds for term in kind]
        width = max((len(term.axes) for term in terms), default=1) or 1
        padded = [[*term.axes, *[len(axes)] * (width - len(term.axes))] for term in terms]
        self._factors = np.array(padded, dtype=np.int64).reshape(len(terms), width).T
        real = np.array([term.coefficient for term in terms], dtype=np.float64)
        whole = np.rint(real).astype(np.int64)
        self._coefficients: NDArray[np.int64] | NDArray[np.float64] = whole if np.all(whole == real) else real
        self._ends = np.cumsum([0, *(len(kind) for kind in kinds)])

    def by_term(self, n_open: NDArray[np.int64]) -> NDArray[np.int64] | NDArray[np.float64]:
        """Cost of every term ``(..., T)`` with so many units of each group ``(..., G)``."""
        sizes = np.broadcast_to(self._fixed, (*n_open.shape[:-1], len(self._fixed))).copy()
        if len(self._variable):
            parts = n_open[..., self._group] * self._multiplicity
            sizes[..., self._variable] += np.add.reduceat(parts, self._starts, axis=-1)
        product: NDArray[np.int64] | NDArray[np.float64] = self._coefficients
        for row in self._factors:
            product = product * sizes[..., row]
        return product

    def __call__(self, n_open: NDArray[np.int64]) -> NDArray[np.int64]:
        """Costs ``(..., kinds)`` with so many units of each group ``(..., G)``."""
        terms = self.by_term(n_open)
        sums = [terms[..., a:b].sum(-1) for a, b in zip(self._ends, self._ends[1:], strict=False)]
        return np.rint(np.stack(sums, -1)).astype(np.int64) if terms.dtype.kind == "f" else np.stack(sums, -1)
