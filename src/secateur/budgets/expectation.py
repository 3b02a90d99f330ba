"""The cost polynomials in expectation: values and slopes for independent units, by a handful of tensor operators.

Index conventions: ``U`` units, ``G`` groups, ``K`` the most often that one group occurs in a term, ``N`` blocks, ``M``
monomials, ``W`` factors of the widest, ``R`` kinds of cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from secateur.budgets.runs import Runs
from secateur.structure.groups import Axis, Term

__all__ = ["Point", "Tables", "expectation", "sharing", "tabulate"]


@dataclass(frozen=True, eq=False)
class Point:
    """Expected costs at some chances, and how they grow.

    Args:
        values: ``(R,)``.
        in_sums: ``(R, K * G)``, slopes in the sums of each cumulant over each group.
        slopes: derivative of each cumulant in the chance, ``(U,)``; None for the first, which is the chance itself.
        runs: where groups stand.
    """

    values: Tensor
    in_sums: Tensor
    slopes: Sequence[Tensor | None]
    runs: Runs

    def pull(self, weights: Tensor | Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
        """Slopes of a weighted sum of the costs in each unit's chance, ``(R,)`` to ``(U,)``."""
        given = torch.as_tensor(weights, dtype=self.in_sums.dtype, device=self.in_sums.device)
        by_order = (given @ self.in_sums).to(self.in_sums.dtype if dtype is None else dtype)
        if len(self.slopes) == 1:
            return self.runs.spread(by_order)
        first, *others = by_order.view(len(self.slopes), -1)
        total = self.runs.spread(first)
        for row, slope in zip(others, self.slopes[1:], strict=True):
            assert slope is not None
            total = torch.addcmul(total, self.runs.spread(row), slope.to(row.dtype))
        return total


class _Products(NamedTuple):
    """The tables as the arrays that one kind of device computes with, with each row of factors as a 0/1 matrix."""

    fixed: Any
    weight: Any
    coefficients: Any
    factors: tuple[Any, ...]
    scatters: tuple[Any, ...]


@dataclass(frozen=True)
class Tables:
    """The polynomials as flat tensors of one device.

    Args:
        runs: where groups stand.
        fixed: ``(N + 1,)``, constant part of each block; the last is the empty product, 1.
        weight: ``(N + 1, K * G)``, product of multiplicities by which a sum over a group enters a block.
        factors: int64 ``(W, M)``, the blocks that each monomial multiplies.
        coefficients: ``(R, M)``, of parameters, MACs, latency and parts.
        n_groups: G.
        highest: K.
    """

    runs: Runs
    fixed: Tensor
    weight: Tensor
    factors: Tensor
    coefficients: Tensor
    n_groups: int
    highest: int

    def to(self, device: torch.device) -> Tables:
        """The same on that device, in its widest precision."""
        # Devices without float64 count in float32.
        real = torch.float32 if device.type == "mps" else torch.float64
        return Tables(
            Runs(self.runs.sizes, self.runs.segment.to(device)),
            self.fixed.to(device, real),
            self.weight.to(device, real),
            self.factors.to(device),
            self.coefficients.to(device, real),
            self.n_groups,
            self.highest,
        )

    def values(self, prob_open: Tensor) -> Tensor:
        """Expected costs ``(R,)`` at chances ``(U,)``."""
        with np.errstate(all="ignore"):  # what is not finite is told by whoever asked
            return self._values(prob_open)

    def _values(self, prob_open: Tensor) -> Tensor:
        blocks = self._blocks(_cumulants(self._wide(prob_open), self.highest)[0])
        product = self._products.coefficients
        for row in self._products.factors:
            product = product * blocks[row]
        return torch.as_tensor(product.sum(-1))

    def at(self, prob_open: Tensor) -> Point:
        """Expected costs with their slopes: units to group sums, to blocks, to monomials, and back."""
        with np.errstate(all="ignore"):
            return self._at(prob_open)

    def _at(self, prob_open: Tensor) -> Point:
        cumulants, slopes = _cumulants(self._wide(prob_open), self.highest)
        blocks, products = self._blocks(cumulants), self._products
        factors = [blocks[row] for row in products.factors]
        in_blocks = 0.0
        for number, scatter in enumerate(products.scatters):
            others = products.coefficients
            for factor in (*factors[:number], *factors[number + 1 :]):
                others = others * factor
            in_blocks = in_blocks + others @ scatter
        values, in_sums = (torch.as_tensor(one) for one in (others @ factors[-1], in_blocks @ products.weight))
        return Point(values, in_sums, slopes, self.runs)

    def _wide(self, prob_open: Tensor) -> Tensor:
        # Sums are wide in any case; powers of the chances must be, too.
        return prob_open if self.highest == 1 else prob_open.to(self.fixed.dtype)

    def _blocks(self, cumulants: Sequence[Tensor]) -> Any:
        sums = torch.cat([self.runs.sum(row, self.fixed.dtype) for row in cumulants])
        products = self._products
        return products.fixed + products.weight @ (sums.numpy() if sums.device.type == "cpu" else sums)

    @cached_property
    def _products(self) -> _Products:
        """What is multiplied, in numpy on the CPU, where an operator of torch on so few numbers is mostly overhead."""
        scatters = [F.one_hot(row, len(self.fixed)).to(self.fixed.dtype) for row in self.factors]

        def as_is(tensor: Tensor) -> Any:
            return tensor.numpy() if tensor.device.type == "cpu" else tensor

        return _Products(
            as_is(self.fixed),
            as_is(self.weight),
            as_is(self.coefficients),
            tuple(as_is(row) for row in self.factors),
            tuple(as_is(row) for row in scatters),
        )


def sharing(term: Term, axes: Sequence[Axis]) -> int:
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


def tabulate(
    axes: Sequence[Axis],
    terms: Sequence[Term],
    owner: NDArray[np.int64],
    sizes: Sequence[int],
    extent: tuple[int, int],
) -> Tables:
    """Expand the terms into monomials of blocks and write both down flat; ``extent``: R and K."""
    n_rows, highest = extent
    blocks: dict[tuple[int, ...], int] = {}
    monomials: dict[tuple[int, ...], NDArray[np.float64]] = {}
    for term, kind in zip(terms, owner, strict=True):
        for partition in _partitions(term.axes, axes):
            factors = tuple(sorted(blocks.setdefault(block, len(blocks)) for block in partition))
            monomials.setdefault(factors, np.zeros(n_rows))[kind] += term.coefficient
    fixed = np.ones(len(blocks) + 1)
    weight = np.zeros((len(blocks) + 1, highest * len(sizes)))
    for block, position in blocks.items():
        fixed[position] = axes[block[0]].fixed if len(block) == 1 else 0
        for group, product in _joint(block, axes).items():
            weight[position, (len(block) - 1) * len(sizes) + group] = product
    width = max((len(factors) for factors in monomials), default=1) or 1
    padded = [[*factors, *[len(blocks)] * (width - len(factors))] for factors in monomials]
    segment = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64))
    return Tables(
        runs=Runs(tuple(sizes), segment),
        fixed=torch.from_numpy(fixed),
        weight=torch.from_numpy(weight),
        factors=torch.tensor(padded, dtype=torch.int64).reshape(-1, width).T.contiguous(),
        coefficients=torch.from_numpy(np.stack([*monomials.values()], axis=1) if monomials else np.zeros((n_rows, 0))),
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


def expectation(prob_open: Tensor, tables: Tables) -> Tensor:
    """Costs ``(R,)``, differentiable in ``prob_open`` ``(U,)`` once."""
    if not (prob_open.requires_grad and torch.is_grad_enabled()):
        return tables.values(prob_open).to(prob_open.dtype)
    values: Tensor = _Expectation.apply(prob_open, tables)  # type: ignore[no-untyped-call]
    return values


class _Expectation(torch.autograd.Function):
    """Costs with their own gradient: one pass over the tables serves the values and the backward pass."""

    @staticmethod
    def forward(ctx: Any, prob_open: Tensor, tables: Tables) -> Tensor:
        ctx.point = tables.at(prob_open)
        return ctx.point.values.to(prob_open.dtype)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        return ctx.point.pull(outer[0], outer[0].dtype), None
