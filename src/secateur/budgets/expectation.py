"""The cost polynomials in expectation: values and slopes for independent units, by a handful of array operators.

Index conventions: ``U`` units, ``G`` groups, ``K`` the most often that one group occurs in a term, ``N`` blocks, ``M``
monomials, ``W`` factors of the widest, ``R`` kinds of cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.budgets.runs import Runs, on_host
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

    values: NDArray[np.float64]
    in_sums: NDArray[np.float64]
    slopes: Sequence[NDArray[Any] | None]
    runs: Runs

    def pull(self, weights: Sequence[float] | NDArray[np.float64], dtype: Any = np.float64) -> NDArray[Any]:
        """Slopes of a weighted sum of the costs in each unit's chance, ``(R,)`` to ``(U,)`` of that type."""
        by_order = (np.asarray(weights, dtype=np.float64) @ self.in_sums).astype(dtype, copy=False)
        if len(self.slopes) == 1:
            return self.runs.spread(by_order)
        first, *others = by_order.reshape(len(self.slopes), -1)
        total = self.runs.spread(first)
        for row, slope in zip(others, self.slopes[1:], strict=True):
            assert slope is not None
            total += self.runs.spread(row) * slope.astype(dtype, copy=False)
        return total


@dataclass(frozen=True, eq=False)
class Tables:
    """The polynomials as flat arrays.

    Args:
        runs: where groups stand.
        fixed: ``(N + 1,)``, constant part of each block; the last is the empty product, 1.
        weight: ``(N + 1, K * G)``, product of multiplicities by which a sum over a group enters a block.
        factors: int64 ``(W, M)``, the blocks that each monomial multiplies.
        coefficients: ``(R, M)``, of parameters, MACs, latency and parts.
        highest: K.
    """

    runs: Runs
    fixed: NDArray[np.float64]
    weight: NDArray[np.float64]
    factors: NDArray[np.int64]
    coefficients: NDArray[np.float64]
    highest: int

    def values(self, prob_open: NDArray[Any]) -> NDArray[np.float64]:
        """Expected costs ``(R,)`` at chances ``(U,)``."""
        with np.errstate(all="ignore"):  # what is not finite is told by whoever asked
            factors = self._blocks(_cumulants(self._wide(prob_open), self.highest)[0])[self.factors]
            values: NDArray[np.float64] = self.coefficients @ factors.prod(0)
        return values

    def at(self, prob_open: NDArray[Any]) -> Point:
        """Expected costs with their slopes: units to group sums, to blocks, to monomials, and back."""
        with np.errstate(all="ignore"):
            cumulants, slopes = _cumulants(self._wide(prob_open), self.highest)
            factors = list(self._blocks(cumulants)[self.factors])
            in_blocks: Any = 0.0
            for number, scatter in enumerate(self._scatters):
                others = self.coefficients
                for factor in (*factors[:number], *factors[number + 1 :]):
                    others = others * factor
                in_blocks = in_blocks + others @ scatter
            return Point(others @ factors[-1], in_blocks @ self.weight, slopes, self.runs)

    def _wide(self, prob_open: NDArray[Any]) -> NDArray[Any]:
        # Sums are wide in any case; powers of the chances must be, too.
        return prob_open if self.highest == 1 else prob_open.astype(np.float64)

    def _blocks(self, cumulants: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
        sums = [self.runs.sum(row) for row in cumulants]
        blocks: NDArray[np.float64] = self.fixed + self.weight @ (sums[0] if len(sums) == 1 else np.concatenate(sums))
        return blocks

    @cached_property
    def _scatters(self) -> tuple[NDArray[np.float64], ...]:
        """Each row of factors as a 0/1 matrix, from monomials to blocks."""
        return tuple(np.eye(len(self.fixed))[row] for row in self.factors)


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
    return Tables(
        runs=Runs(tuple(sizes)),
        fixed=fixed,
        weight=weight,
        factors=np.ascontiguousarray(np.array(padded, dtype=np.int64).reshape(-1, width).T),
        coefficients=np.stack([*monomials.values()], axis=1) if monomials else np.zeros((n_rows, 0)),
        highest=highest,
    )


def _cumulants(chance: NDArray[Any], highest: int) -> tuple[list[NDArray[Any]], list[NDArray[Any] | None]]:
    """The first cumulants of Bernoulli variables, ``(U,)`` each, and their derivatives in the chance (None for 1).

    They are polynomials in the chance p by ``k_1 = p, k_(j+1) = p (1 - p) dk_j/dp`` (an exponential family's).
    """
    rows: list[NDArray[Any]] = [chance]
    slopes: list[NDArray[Any] | None] = [None]
    polynomial = np.array([0.0, 1.0])
    for _ in range(highest - 1):
        polynomial = np.convolve(_derivative(polynomial), [0.0, 1.0, -1.0])
        rows.append(_horner(polynomial, chance))
        slopes.append(_horner(_derivative(polynomial), chance))
    return rows, slopes


def _derivative(polynomial: NDArray[np.float64]) -> NDArray[np.float64]:
    return polynomial[1:] * np.arange(1, len(polynomial))


def _horner(polynomial: NDArray[np.float64], at: NDArray[Any]) -> NDArray[Any]:
    value = np.full_like(at, polynomial[-1])
    for coefficient in polynomial[-2::-1]:
        value = value * at + coefficient
    return value


def expectation(prob_open: Tensor, tables: Tables) -> Tensor:
    """Costs ``(R,)``, differentiable in ``prob_open`` ``(U,)`` once."""
    if not (prob_open.requires_grad and torch.is_grad_enabled()):
        return torch.from_numpy(tables.values(on_host(prob_open))).to(prob_open)
    values: Tensor = _Expectation.apply(prob_open, tables)  # type: ignore[no-untyped-call]
    return values


class _Expectation(torch.autograd.Function):
    """Costs with their own gradient: one pass over the tables serves the values and the backward pass."""

    @staticmethod
    def forward(ctx: Any, prob_open: Tensor, tables: Tables) -> Tensor:
        ctx.point = tables.at(on_host(prob_open))
        return torch.from_numpy(ctx.point.values).to(prob_open)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        return torch.from_numpy(ctx.point.pull(on_host(outer[0]))).to(outer[0]), None
