"""Parameters, multiply-accumulates and latency as polynomials of open units: expected, exact, differentiable.

Index conventions: ``U`` units of all groups in a row, ``G`` groups, ``A`` axes, ``K`` the most axes of one term that
share a group (1 for most networks, 2 with square recurrent weights), ``N`` blocks, ``M`` monomials.

For independent units the number of open units of a group is a sum of independent Bernoulli variables, so its cumulants
are sums over units. The mean of a product of axes is the sum, over the ways to part these axes into blocks, of products
of joint cumulants; a block of several axes has one only through the groups that all of them share, which is where
``z^2 = z`` enters. A term whose axes share no group has one way only: the product of the means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.budgets.counting import Counting
from secateur.errors import BudgetError
from secateur.structure.groups import Axis, Cost, Term

if TYPE_CHECKING:
    from secateur.structure.groups import Structure

__all__ = ["KINDS", "CostModel", "Kind"]

Kind: TypeAlias = Literal["params", "macs", "latency"]

#: What is counted, in the order of every vector of costs, which is that of the fields of `Cost`.
KINDS: tuple[Kind, ...] = ("params", "macs", "latency")


@dataclass(frozen=True)
class _Tables:
    """The polynomials as flat tensors of one device.

    Args:
        segment: int64 ``(U,)``, the group of each unit.
        fixed: ``(N + 1,)``, constant part of each block; the last is the empty product, 1.
        weight: ``(N + 1, K * G)``, product of multiplicities by which a sum over a group enters a block.
        factors: int64 ``(W, M)``, the blocks that each monomial multiplies.
        coefficients: ``(3, M)``, of parameters, MACs and latency.
        n_groups: G.
        highest: K.
    """

    segment: Tensor
    fixed: Tensor
    weight: Tensor
    factors: Tensor
    coefficients: Tensor
    n_groups: int
    highest: int

    def to(self, device: torch.device) -> _Tables:
        # Devices without float64 count in float32.
        real = torch.float32 if device.type == "mps" else torch.float64
        return _Tables(
            self.segment.to(device),
            self.fixed.to(device, real),
            self.weight.to(device, real),
            self.factors.to(device),
            self.coefficients.to(device, real),
            self.n_groups,
            self.highest,
        )


class CostModel:
    r"""Cost of a model as a function of which units are open.

    .. math:: C(n) = \sum_t c_t \prod_{a \in t} \Big(f_a + \sum_g m_{ag} n_g\Big), \qquad n_g = \sum_{i \in g} z_i

    Units of all groups of the structure stand in a row, in the order of ``structure.groups``: vectors of shape
    ``(U,)``. A group without a gate has chance 1. All evaluations are a handful of tensor operators, whatever the
    number of layers.

    Args:
        structure: the model's description; its ``groups``, ``axes`` and ``terms`` are read.

    Attributes:
        dense: cost with every unit open.
        least: cost with one unit left in every group, the smallest that a cut can reach.
        floor: units of each group that a cut leaves at least, int64 ``(G,)``.
        sizes: units of each group, ``(G,)`` numbers.
        total: ``U``.
        segment: int64 ``(U,)``, the group of each unit.

    Raises:
        BudgetError: if a term or axis names what is not there, or a count is negative.

    Example:
        >>> from types import SimpleNamespace
        >>> from secateur.structure.groups import Group
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

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.sizes: tuple[int, ...] = tuple(group.size for group in structure.groups)
        self.total: int = sum(self.sizes)
        _check(structure)
        terms = [term for kind in structure.terms for term in kind]
        owner = np.repeat(np.arange(len(KINDS)), [len(kind) for kind in structure.terms])
        self._highest = max((_sharing(term, structure.axes) for term in terms), default=1)
        self._tables = {torch.device("cpu"): _tabulate(structure.axes, terms, owner, self.sizes, self._highest)}
        # Apart: measured coefficients are no whole numbers, and would take the counts' exactness.
        self._counting = Counting(structure.axes, structure.terms[:2])
        self._timing = Counting(structure.axes, structure.terms[2:])
        self.segment: Tensor = self._tables[torch.device("cpu")].segment
        self.dense: Cost = self.count(self.sizes)
        #: units of each group that a cut leaves at least, ``(G,)``
        self.floor: NDArray[np.int64] = np.array([min(g.size, g.least) for g in structure.groups], dtype=np.int64)
        self.least: Cost = self.count(self.floor)

    def expected(self, prob_open: Tensor, kind: Kind = "params") -> Tensor:
        """Expected cost for independent units, differentiable.

        Args:
            prob_open: ``(U,)``, chance of each unit to be open; 1 where there is no gate.
            kind: ``"params"``, ``"macs"`` or ``"latency"`` (nanoseconds).

        Returns:
            A scalar in the precision of ``prob_open`` (at least float32; summed in float64).

        Raises:
            BudgetError: if the shape is not ``(U,)`` or the kind is unknown.
        """
        if kind not in KINDS:
            raise BudgetError(f"CostModel.expected: unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
        return self.expected_vector(prob_open)[KINDS.index(kind)]

    def expected_vector(self, prob_open: Tensor) -> Tensor:
        """Expected parameters, MACs and latency in one go, as :meth:`expected`.

        Args:
            prob_open: ``(U,)``.

        Returns:
            ``(3,)``, in the order of `KINDS`.
        """
        self._check_units(prob_open)
        dtype = torch.promote_types(prob_open.dtype, torch.float32)
        vector: Tensor = _Expectation.apply(prob_open.to(dtype), self._on(prob_open.device))  # type: ignore[no-untyped-call]
        return vector

    def slopes(self, prob_open: Tensor) -> tuple[Tensor, Tensor]:
        """Expected parameters, MACs and latency, and how they grow with each unit's chance.

        Args:
            prob_open: ``(U,)``.

        Returns:
            ``(3,)`` and ``(3, U)``, without a graph, in the device's widest precision.
        """
        self._check_units(prob_open)
        return _evaluate(self._on(prob_open.device), prob_open.detach())

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
        return self.count(np.maximum(n_open, self.floor))

    def cuts(self, n_open: NDArray[np.int64]) -> NDArray[np.int64]:
        """`cut` of many patterns at once: ``(..., G)`` to costs in the order of `KINDS`, ``(..., 3)``."""
        return self._counts(np.maximum(n_open, self.floor))

    def n_open(self, is_open: Tensor) -> NDArray[np.int64]:
        """Open units of each group, int64 ``(G,)``; ``is_open`` is bool ``(U,)``. Only these numbers leave a device."""
        flat = is_open.detach().to(torch.int64)
        empty = flat.new_zeros(len(self.sizes))
        counts: NDArray[np.int64] = empty.index_add(0, self.segment_on(flat.device), flat).cpu().numpy()
        return counts

    def segment_on(self, device: torch.device) -> Tensor:
        """`segment` on that device."""
        return self._on(device).segment

    def count(self, n_open: Sequence[int] | NDArray[np.int64]) -> Cost:
        """Cost with so many units of each group, ``(G,)`` integers, counted in integers."""
        return Cost(*self._counts(np.asarray(n_open, dtype=np.int64)).tolist())

    @cached_property
    def priced(self) -> dict[Kind, NDArray[np.bool_]]:
        """For each kind the groups whose units cost something, bool ``(G,)``."""
        slopes = self.slopes(torch.ones(self.total))[1]
        starts = np.cumsum([0, *self.sizes])[:-1].clip(max=max(self.total - 1, 0))
        filled = np.asarray(self.sizes) > 0
        return {kind: (row.numpy()[starts] > 0) & filled for kind, row in zip(KINDS, slopes, strict=True)}

    @cached_property
    def largest_term(self) -> dict[Kind, str]:
        """For each kind the label of the term that costs most in the least model: what keeps it large."""
        least = [*self._counting.by_term(self.floor), *self._timing.by_term(self.floor)]
        labels = []
        for terms in self.structure.terms:
            own, least = least[: len(terms)], least[len(terms) :]
            labels.append(terms[int(np.argmax(own))].label if terms else "")
        return dict(zip(KINDS, labels, strict=True))

    def _counts(self, n_open: NDArray[np.int64]) -> NDArray[np.int64]:
        """Costs ``(..., 3)`` of so many units of each group ``(..., G)``."""
        counts = self._counting(n_open)
        time = self._timing(n_open) if self.structure.terms[2] else np.zeros_like(counts[..., :1])
        return np.concatenate([counts, time], axis=-1)

    def _on(self, device: torch.device) -> _Tables:
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def _check_units(self, vector: Tensor) -> None:
        if vector.shape != (self.total,):
            raise BudgetError(
                f"CostModel: got a tensor of shape {tuple(vector.shape)}, expected ({self.total},), one entry for each "
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


def _sharing(term: Term, axes: Sequence[Axis]) -> int:
    """The most axes of a term that one group occurs in."""
    groups = [group for axis in term.axes for group in {g for g, m in axes[axis].per_group if m}]
    return max((groups.count(group) for group in set(groups)), default=1)


def _joint(block: Sequence[int], axes: Sequence[Axis]) -> dict[int, int]:
    """Product of multiplicities of each group that all axes of a block share."""
    shared: dict[int, int] | None = None
    for axis in block:
        own: dict[int, int] = {}
        for group, multiplicity in axes[axis].per_group:
            own[group] = own.get(group, 0) + multiplicity
        shared = own if shared is None else {g: shared[g] * own[g] for g in shared.keys() & own.keys()}
    return {group: weight for group, weight in sorted((shared or {}).items()) if weight}


def _partitions(items: tuple[int, ...], axes: Sequence[Axis]) -> Iterator[list[tuple[int, ...]]]:
    """Ways to part the axes of a term into blocks, each a single axis or axes that share a group."""
    if not items:
        yield []
        return
    for rest in _partitions(items[1:], axes):
        yield [(items[0],), *rest]
        for position, block in enumerate(rest):
            joined = tuple(sorted((items[0], *block)))
            if _joint(joined, axes):
                yield [*rest[:position], joined, *rest[position + 1 :]]


def _tabulate(
    axes: Sequence[Axis], terms: Sequence[Term], owner: NDArray[np.int64], sizes: Sequence[int], highest: int
) -> _Tables:
    """Expand the terms into monomials of blocks and write both down flat."""
    blocks: dict[tuple[int, ...], int] = {}
    monomials: dict[tuple[int, ...], NDArray[np.float64]] = {}
    for term, kind in zip(terms, owner, strict=True):
        for partition in _partitions(term.axes, axes):
            factors = tuple(sorted(blocks.setdefault(block, len(blocks)) for block in partition))
            monomials.setdefault(factors, np.zeros(len(KINDS)))[kind] += term.coefficient
    fixed = np.ones(len(blocks) + 1)
    weight = np.zeros((len(blocks) + 1, highest * len(sizes)))
    for block, position in blocks.items():
        fixed[position] = axes[block[0]].fixed if len(block) == 1 else 0
        for group, product in _joint(block, axes).items():
            weight[position, (len(block) - 1) * len(sizes) + group] = product
    width = max((len(factors) for factors in monomials), default=1) or 1
    padded = [[*factors, *[len(blocks)] * (width - len(factors))] for factors in monomials]
    return _Tables(
        segment=torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64)),
        fixed=torch.from_numpy(fixed),
        weight=torch.from_numpy(weight),
        factors=torch.tensor(padded, dtype=torch.int64).reshape(-1, width).T.contiguous(),
        coefficients=torch.from_numpy(
            np.stack([*monomials.values()], axis=1) if monomials else np.zeros((len(KINDS), 0))
        ),
        n_groups=len(sizes),
        highest=highest,
    )


def _cumulants(chance: Tensor, highest: int) -> tuple[list[Tensor], list[Tensor | None]]:
    """The first cumulants of Bernoulli variables, ``(U,)`` each, and their derivatives in the chance (None for 1).

    They are polynomials in the chance p by ``k_1 = p, k_(j+1) = p (1 - p) dk_j/dp`` (an exponential family's).
    """
    rows: list[Tensor] = [chance]
    slopes: list[Tensor | None] = [None]
    polynomial = np.array([0.0, 1.0])
    for _ in range(highest - 1):
        polynomial = np.convolve(_derivative(polynomial), [0.0, 1.0, -1.0])
        rows.append(_horner(polynomial, chance))
        slopes.append(_horner(_derivative(polynomial), chance))
    return rows, slopes


def _derivative(polynomial: NDArray[np.float64]) -> NDArray[np.float64]:
    return polynomial[1:] * np.arange(1, len(polynomial))


def _horner(polynomial: NDArray[np.float64], at: Tensor) -> Tensor:
    value = torch.full_like(at, float(polynomial[-1]))
    for coefficient in polynomial[-2::-1]:
        value = value * at + float(coefficient)
    return value


def _evaluate(tables: _Tables, prob_open: Tensor) -> tuple[Tensor, Tensor]:
    """Costs ``(3,)`` and their gradients ``(3, U)``: units to group sums, to blocks, to monomials, and back."""
    cumulants, derivatives = _cumulants(prob_open.to(tables.fixed.dtype), tables.highest)
    empty = tables.fixed.new_zeros(tables.n_groups)
    sums = torch.cat([empty.index_add(0, tables.segment, row) for row in cumulants])
    blocks = torch.addmv(tables.fixed, tables.weight, sums)
    factors = [blocks[row] for row in tables.factors]
    in_blocks = torch.zeros_like(tables.fixed).expand(len(KINDS), -1).clone()
    for row, position in enumerate(tables.factors):
        others = tables.coefficients
        for factor in (*factors[:row], *factors[row + 1 :]):
            others = others * factor
        in_blocks.index_add_(1, position, others)
    values = others @ factors[-1]
    in_sums = (in_blocks @ tables.weight).reshape(len(KINDS), tables.highest, tables.n_groups)
    gradients = []
    for by_order in in_sums:
        total = by_order[0][tables.segment]
        for slope, derivative in zip(by_order[1:], derivatives[1:], strict=True):
            total = torch.addcmul(total, slope[tables.segment], derivative)  # type: ignore[arg-type]
        gradients.append(total)
    return values, torch.stack(gradients)


class _Expectation(torch.autograd.Function):
    """`_evaluate` with its own gradient: one pass over the tables serves the value and the backward pass."""

    @staticmethod
    def forward(ctx: Any, prob_open: Tensor, tables: _Tables) -> Tensor:
        values, gradients = _evaluate(tables, prob_open)
        ctx.save_for_backward(gradients)
        return values.to(prob_open.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        (gradients,) = ctx.saved_tensors
        return (outer[0].to(gradients.dtype) @ gradients).to(outer[0].dtype), None
