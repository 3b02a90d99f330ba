"""From measured times to a polynomial of widths for each layer, which never falls when a unit opens.

Index conventions: ``P`` patterns of widths, ``G`` groups, ``A`` axes, ``L`` layers, ``F`` terms that a layer may have.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from secateur.latency.measure import Measured, Sizes
from secateur.structure.groups import Axis, Term
from secateur.structure.structure import Structure

__all__ = ["fitted", "predicted"]

#: Weight of the first pattern, the dense network, in a fit: budgets are shares of what is predicted for it.
DENSE_WEIGHT = 3.0

#: Axes that a term multiplies, in ascending order; none for a constant.
Monomial = tuple[int, ...]


def fitted(structure: Structure, measured: Measured) -> tuple[Term, ...]:
    r"""Nanoseconds as a sum over layers of non-negative multiples of products of widths.

    .. math:: t_l(n) = \sum_{k \in F_l} c_{lk} \prod_{a \in k} \mathrm{size}_a(n), \qquad c_{lk} \ge 0

    The terms :math:`F_l` of a layer are a constant (what a call costs whatever the widths are), the products that its
    multiply-accumulates count, their single axes, and the sizes of the tensors that it or a module right below it takes
    and returns. Squared errors are weighed by the whole pass's time, so that relative errors of that are minimised,
    those of the first pattern, the dense network, more than others. What watching the layers took is estimated from
    whole passes, taken off every call, and what is left over is spread by one factor.

    Args:
        structure: of the model.
        measured: times at a grid of widths.
    """
    sizes = _sizes(structure.axes, measured.n_open)
    whole = measured.whole
    weight = 1.0 / whole
    weight[0] *= DENSE_WEIGHT
    per_call = float(np.median(measured.own.sum(1) - whole)) / max(int(measured.calls.sum()), 1)
    own = np.maximum(measured.own - max(per_call, 0.0) * measured.calls, 0.0)
    terms: list[Term] = []
    for place, path in enumerate(measured.layers):
        monomials = _monomials(structure, measured, path, sizes)
        columns = np.stack([sizes[:, list(one)].prod(1) for one in monomials], axis=1) * weight[:, None]
        scale = np.max(columns, axis=0)
        found, _ = nnls(columns / scale, own[:, place] * weight)
        terms += [
            Term(float(c / s), monomial, path) for monomial, c, s in zip(monomials, found, scale, strict=True) if c > 0
        ]
    sums = predicted(structure.axes, terms, measured.n_open) * weight
    factor = float(sums @ (whole * weight)) / max(float(sums @ sums), 1e-12)
    return tuple(Term(factor * term.coefficient, term.axes, term.label) for term in terms)


def predicted(axes: Sequence[Axis], terms: Sequence[Term], n_open: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum of the terms with so many units of each group, ``(P, G)`` to ``(P,)``.

    Example:
        >>> predicted([Axis(1, ((0, 2),))], [Term(3.0, (0,), ""), Term(0.5, (), "")], np.array([[4], [0]])).tolist()
        [27.5, 3.5]
    """
    sizes = _sizes(axes, n_open)
    total = np.zeros(len(n_open))
    for term in terms:
        total += term.coefficient * sizes[:, list(term.axes)].prod(1)
    return total


def _sizes(axes: Sequence[Axis], n_open: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sizes of all axes, ``(P, A)``."""
    sizes = np.array([axis.fixed for axis in axes], dtype=np.float64) * np.ones((len(n_open), 1))
    for place, axis in enumerate(axes):
        for group, times in axis.per_group:
            sizes[:, place] += times * n_open[:, group]
    return sizes


def _monomials(structure: Structure, measured: Measured, path: str, sizes: NDArray[np.float64]) -> tuple[Monomial, ...]:
    """The terms that a layer may have."""
    products = [tuple(sorted(term.axes)) for term in structure.mac_terms if term.label == path]
    carried = [term.axes for term in structure.param_terms if term.label.rpartition(".")[0] == path]
    found: dict[Monomial, None] = {(): None}
    for product in products:
        found[product] = None
    for axes in (*products, *carried):
        found.update(dict.fromkeys((axis,) for axis in axes))
    for other in measured.layers:
        parent, _, leaf = other.rpartition(".")
        if other == path or (leaf and parent == path):
            for tensor in measured.shapes[other]:
                monomial = _read_off(tensor, sizes)
                if monomial is not None:
                    found[monomial] = None
    return tuple(found)


def _read_off(tensor: Sizes, sizes: NDArray[np.float64]) -> Monomial | None:
    """Which axes the dimensions of a tensor follow, from its sizes ``(P, n)``; None where one follows none."""
    monomial: list[int] = []
    for dim in tensor.T:
        if (dim == dim[0]).all():
            continue
        ratios = dim[:, None] / np.maximum(sizes, 1e-9)
        alike = np.flatnonzero(np.abs(ratios - ratios[0]).max(0) <= 1e-9 * ratios[0])
        if not len(alike):
            return None
        # The one of just this size where there is one: others are multiples of it.
        monomial.append(int(alike[np.abs(ratios[0, alike] - 1.0).argmin()]))
    return tuple(sorted(monomial))
