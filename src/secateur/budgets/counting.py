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
        # The last axis, of size 1, fills up terms that have fewer factors than others.
        self._fixed = np.array([axis.fixed for axis in axes] + [1], dtype=np.int64)
        n_groups = 1 + max((group for axis in axes for group, _ in axis.per_group), default=-1)
        # Sizes are far under 2^53, up to where products in double precision are exact, and faster than in integers.
        self._multiplicity = np.zeros((n_groups, len(axes) + 1))
        for number, axis in enumerate(axes):
            for group, multiplicity in axis.per_group:
                self._multiplicity[group, number] += multiplicity
        terms = [term for kind in kinds for term in kind]
        width = max((len(term.axes) for term in terms), default=1) or 1
        padded = [[*term.axes, *[len(axes)] * (width - len(term.axes))] for term in terms]
        self._factors = np.array(padded, dtype=np.int64).reshape(len(terms), width).T
        real = np.array([term.coefficient for term in terms], dtype=np.float64)
        whole = np.rint(real).astype(np.int64)
        self._coefficients: NDArray[np.int64] | NDArray[np.float64] = whole if np.all(whole == real) else real
        owner = np.repeat(np.arange(len(kinds)), [len(kind) for kind in kinds])
        #: coefficients in the column of their kind, ``(T, kinds)``
        self._sums = np.eye(len(kinds), dtype=self._coefficients.dtype)[owner] * self._coefficients[:, None]

    def by_term(self, n_open: NDArray[np.int64]) -> NDArray[np.int64] | NDArray[np.float64]:
        """Cost of every term ``(..., T)`` with so many units of each group ``(..., G)``."""
        return self._products(n_open) * self._coefficients

    def __call__(self, n_open: NDArray[np.int64]) -> NDArray[np.int64]:
        """Costs ``(..., kinds)`` with so many units of each group ``(..., G)``."""
        sums = self._products(n_open) @ self._sums
        return sums if sums.dtype.kind == "i" else np.rint(sums).astype(np.int64)

    def _products(self, n_open: NDArray[np.int64]) -> NDArray[np.int64]:
        """Product of the axes of every term, ``(..., T)``."""
        variable = n_open[..., : len(self._multiplicity)] @ self._multiplicity
        sizes = self._fixed + variable.astype(np.int64)
        products: NDArray[np.int64] = sizes[..., self._factors].prod(-2)
        return products
