"""Parameters, multiply-accumulates and latency as polynomials of open units: expected, exact, differentiable.

Index conventions: ``U`` units of all groups in a row, ``G`` groups, ``A`` axes, ``K`` the most axes of one term that
share a group (1 for most networks, 2 with square recurrent weights), ``N`` blocks, ``M`` monomials.

For independent units the number of open units of a group is a sum of independent Bernoulli variables, so its cumulants
are sums over units. The mean of a product of axes is the sum, over the ways to part these axes into blocks, of products
of joint cumulants; a block of several axes has one only through the groups that all of them share, which is where
``z^2 = z`` enters. A term whose axes share no group has one way only: the product of the means.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.budgets.counting import Counting
from secateur.budgets.expectation import Point, expectation, sharing, tabulate
from secateur.budgets.parts import Part, with_parts
from secateur.budgets.runs import on_host
from secateur.errors import BudgetError
from secateur.structure.groups import Cost

if TYPE_CHECKING:
    from secateur.structure.structure import Structure

__all__ = ["KINDS", "NO_LATENCY", "CostModel", "Kind"]

Kind: TypeAlias = Literal["params", "macs", "latency"]

#: What is counted, in the order of every vector of costs, which is that of the fields of `Cost`.
KINDS: tuple[Kind, ...] = ("params", "macs", "latency")

#: What to say to whom a latency matters where nothing predicts one.
NO_LATENCY = (
    "a latency is asked for, and the structure has none; measure it by latency = sc.latency_model(model, structure,"
    " examples=...) and attach with structure=latency.structure"
)

#: Patterns of which a cost model remembers the cost.
KNOWN = 4096


class CostModel:
    r"""Cost of a model as a function of which units are open.

    .. math:: C(n) = \sum_t c_t \prod_{a \in t} \Big(f_a + \sum_g m_{ag} n_g\Big), \qquad n_g = \sum_{i \in g} z_i

    Units of all groups of the structure stand in a row, in the order of ``structure.groups``: vectors of shape
    ``(U,)``. A group without a gate has chance 1. All evaluations are a handful of array operators on the host,
    whatever the number of layers.

    Args:
        structure: the model's description; its ``groups``, ``axes`` and ``terms`` are read.
        parts: parts of the model that are counted apart.

    Attributes:
        rows: position in every vector of costs, by `KINDS` and by the parts' labels; ``R`` in all.
        dense: cost with every unit open.
        least: cost with one unit left in every group, the smallest that a cut can reach.
        floor: units of each group that a cut leaves at least, int64 ``(G,)``.
        sizes: units of each group, ``(G,)`` numbers.
        total: ``U``.
        segment: int64 ``(U,)``, the group of each unit.

    Raises:
        BudgetError: if a term or axis names what is not there, a count is negative, or a part is not in the model.

    Example:
        >>> from types import SimpleNamespace
        >>> from secateur.structure.groups import Axis, Group, Term
        >>> hidden = Group("hidden", size=4, members=())  # a linear layer 3 -> 4, then one 4 -> 2, without biases
        >>> weights = (Term(3.0, (0,), "fc1.weight"), Term(2.0, (0,), "fc2.weight"))
        >>> structure = SimpleNamespace(
        ...     groups=(hidden,), axes=(Axis(0, ((0, 1),)),), terms=(weights, weights, ())
        ... )
        >>> costs = CostModel(structure)
        >>> costs.dense, costs.least
        (Cost(params=20, macs=20), Cost(params=5, macs=5))
        >>> costs.expected(torch.tensor([1.0, 1.0, 0.5, 0.0]), "params")
        tensor(12.5000)
        >>> costs.exact(torch.tensor([True, True, False, False]))
        Cost(params=10, macs=10)
    """

    def __init__(self, structure: Structure, parts: Sequence[Part] = ()) -> None:
        self.structure = structure
        self.sizes: tuple[int, ...] = tuple(group.size for group in structure.groups)
        self.total: int = sum(self.sizes)
        _check(structure)
        #: position of each number in vectors of costs
        self.rows: dict[str, int] = {name: row for row, name in enumerate([*KINDS, *(part.label for part in parts)])}
        axes, of_parts = with_parts(structure, parts)
        #: terms by row
        self._terms = [*structure.terms, *of_parts]
        terms = [term for row in self._terms for term in row]
        owner = np.repeat(np.arange(len(self._terms)), [len(row) for row in self._terms])
        self._highest = max((sharing(term, axes) for term in terms), default=1)
        self._tables = tables = tabulate(axes, terms, owner, self.sizes, (len(self._terms), self._highest))
        # Apart: measured coefficients are no whole numbers, and would take the counts' exactness.
        self._counting = Counting(axes, [*structure.terms[:2], (), *of_parts])
        self._timing = Counting(axes, structure.terms[2:])
        self.segment: Tensor = torch.from_numpy(tables.runs.segment)
        self._known: dict[bytes, Cost] = {}
        self.dense: Cost = self.count(self.sizes)
        #: units of each group that a cut leaves at least, ``(G,)``
        self.floor: NDArray[np.int64] = np.array([min(g.size, g.least) for g in structure.groups], dtype=np.int64)
        self.least: Cost = self.count(self.floor)

    def expected(self, prob_open: Tensor, kind: str = "params") -> Tensor:
        """Expected cost for independent units, differentiable.

        Args:
            prob_open: ``(U,)``, chance of each unit to be open; 1 where there is no gate.
            kind: ``"params"``, ``"macs"``, ``"latency"`` (nanoseconds) or the label of a part.

        Returns:
            A scalar in the precision of ``prob_open`` (at least float32; summed in float64).

        Raises:
            BudgetError: if the shape is not ``(U,)`` or the kind is unknown.
        """
        if kind not in self.rows:
            raise BudgetError(f"CostModel.expected: unknown kind {kind!r}; expected one of {', '.join(self.rows)}")
        return self.expected_vector(prob_open)[self.rows[kind]]

    def expected_vector(self, prob_open: Tensor) -> Tensor:
        """All expected costs in one go, as :meth:`expected`.

        Args:
            prob_open: ``(U,)``.

        Returns:
            ``(R,)``, in the order of `rows`.
        """
        self._check_units(prob_open)
        dtype = torch.promote_types(prob_open.dtype, torch.float32)
        return expectation(prob_open.to(dtype), self._tables)

    def at(self, prob_open: Tensor | NDArray[Any]) -> Point:
        """All expected costs at chances ``(U,)`` with their slopes, group by group, without a graph."""
        self._check_units(prob_open)
        return self._tables.at(on_host(prob_open))

    def slopes(self, prob_open: Tensor) -> tuple[Tensor, Tensor]:
        """All expected costs, and how they grow with each unit's chance.

        Args:
            prob_open: ``(U,)``.

        Returns:
            ``(R,)`` and ``(R, U)``, without a graph, in double precision on the CPU.
        """
        point = self.at(prob_open)
        slopes = np.stack([point.pull(row) for row in np.eye(len(self.rows))])
        return torch.from_numpy(point.values), torch.from_numpy(slopes)

    def exact(self, is_open: Tensor) -> Cost:
        """Cost of the model that is left when the closed units are cut out.

        A group without an open unit counts as one unit, as a cut leaves it (but for a single custom unit, of which a
        part is left that the polynomials count as fixed).

        Args:
            is_open: bool ``(U,)``.
        """
        self._check_units(is_open)
        return self.cut(self.n_open(is_open))

    def cut(self, n_open: NDArray[np.int64]) -> Cost:
        """Cost of what a cut leaves of so many open units of each group, ``(G,)``."""
        # A training asks about the same numbers again and again.
        key = n_open.tobytes()
        cost = self._known.get(key)
        if cost is None:
            if len(self._known) >= KNOWN:
                self._known.clear()
            cost = self._known[key] = self.count(np.maximum(n_open, self.floor))
        return cost

    def cuts(self, n_open: NDArray[np.int64]) -> NDArray[np.int64]:
        """`cut` of many patterns at once: ``(..., G)`` to costs in the order of `rows`, ``(..., R)``."""
        return self._counts(np.maximum(n_open, self.floor))

    def n_open(self, is_open: Tensor | NDArray[np.bool_]) -> NDArray[np.int64]:
        """Open units of each group, int64 ``(G,)``; ``is_open`` is bool ``(U,)``."""
        return self._tables.runs.count(on_host(is_open))

    def spread(self, values: NDArray[Any]) -> NDArray[Any]:
        """Each group's value at each of its units, ``(G,)`` to ``(U,)``."""
        return self._tables.runs.spread(values)

    def count(self, n_open: Sequence[int] | NDArray[np.int64]) -> Cost:
        """Cost with so many units of each group, ``(G,)`` integers, counted in integers."""
        return self.cost(self._counts(np.asarray(n_open, dtype=np.int64)).tolist())

    def cost(self, numbers: Sequence[float]) -> Cost:
        """A vector of costs ``(R,)`` with names, rounded."""
        params, macs, latency, *rest = (round(number) for number in numbers)
        return Cost(params, macs, latency, parts=tuple(zip([*self.rows][len(KINDS) :], rest, strict=True)))

    @cached_property
    def priced(self) -> dict[str, NDArray[np.bool_]]:
        """For each row the groups whose units cost something, bool ``(G,)``."""
        slopes = self.slopes(torch.ones(self.total))[1]
        starts = np.cumsum([0, *self.sizes])[:-1].clip(max=max(self.total - 1, 0))
        filled = np.asarray(self.sizes) > 0
        return {kind: (row.numpy()[starts] > 0) & filled for kind, row in zip(self.rows, slopes, strict=True)}

    @cached_property
    def largest_term(self) -> dict[str, str]:
        """For each row the label of the term that costs most in the least model: what keeps it large."""
        whole, timed = self._counting.by_term(self.floor), self._timing.by_term(self.floor)
        ends = np.cumsum([len(self._terms[row]) for row in self._whole_rows])
        least = dict(zip(self._whole_rows, np.split(whole, ends[:-1]), strict=True)) | {KINDS.index("latency"): timed}
        return {
            name: self._terms[row][int(np.argmax(least[row]))].label if self._terms[row] else ""
            for name, row in self.rows.items()
        }

    @property
    def _whole_rows(self) -> list[int]:
        """Rows that are counted in integers: all but latency."""
        return [row for name, row in self.rows.items() if name != "latency"]

    def _counts(self, n_open: NDArray[np.int64]) -> NDArray[np.int64]:
        """Costs ``(..., R)`` of so many units of each group ``(..., G)``."""
        counts = self._counting(n_open)
        if self.structure.terms[2]:
            counts[..., KINDS.index("latency")] = self._timing(n_open)[..., 0]
        return counts

    def _check_units(self, vector: Tensor | NDArray[Any]) -> None:
        if vector.shape != (self.total,):
            raise BudgetError(
                f"CostModel: got a vector of shape {tuple(vector.shape)}, expected ({self.total},), one entry for each "
                f"unit of all {len(self.sizes)} groups in the order of structure.groups"
            )


def _check(structure: Structure) -> None:
    """Collect what does not fit together in the polynomials, then say it all."""
    problems = []
    for position, axis in enumerate(structure.axes):
        if axis.fixed < 0 or any(multiplicity < 0 for _, multiplicity in axis.per_group):
            problems.append(f"axis {position} has a negative count: {axis}")
        if any(not 0 <= group < len(structure.groups) for group, _ in axis.per_group):
            problems.append(f"axis {position} names a group outside 0..{len(structure.groups) - 1}: {axis}")
    for term in (term for kind in structure.terms for term in kind):
        if not term.coefficient >= 0:
            problems.append(f"term {term.label!r} has coefficient {term.coefficient}, expected at least 0")
        if any(not 0 <= axis < len(structure.axes) for axis in term.axes):
            problems.append(f"term {term.label!r} names an axis outside 0..{len(structure.axes) - 1}: {term.axes}")
    if problems:
        raise BudgetError("CostModel: the structure's cost terms do not fit together: " + "; ".join(problems))
