"""The cost polynomials in expectation: values and slopes for independent units, by a handful of tensor operators.

Index conventions: ``U`` units, ``G`` groups, ``K`` the most often that one group occurs in a term, ``N`` blocks, ``M``
monomials, ``W`` factors of the widest, ``R`` kinds of cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.structure.groups import Axis, Term

__all__ = ["Tables", "evaluate", "expectation", "sharing", "tabulate"]


@dataclass(frozen=True)
class Tables:
    """The polynomials as flat tensors of one device.

    Args:
        segment: int64 ``(U,)``, the group of each unit.
        fixed: ``(N + 1,)``, constant part of each block; the last is the empty product, 1.
        weight: ``(N + 1, K * G)``, product of multiplicities by which a sum over a group enters a block.
        factors: int64 ``(W, M)``, the blocks that each monomial multiplies.
        coefficients: ``(R, M)``, of parameters, MACs, latency and parts.
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

    def to(self, device: torch.device) -> Tables:
        """The same on that device, in its widest precision."""
        # Devices without float64 count in float32.
        real = torch.float32 if device.type == "mps" else torch.float64
        return Tables(
            self.segment.to(device),
            self.fixed.to(device, real),
            self.weight.to(device, real),
            self.factors.to(device),
            self.coefficients.to(device, real),
            self.n_groups,
            self.highest,
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
    return Tables(
        segment=torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64)),
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


def evaluate(tables: Tables, prob_open: Tensor) -> tuple[Tensor, Tensor]:
    """Costs ``(R,)`` and their gradients ``(R, U)``: units to group sums, to blocks, to monomials, and back."""
    cumulants, derivatives = _cumulants(prob_open.to(tables.fixed.dtype), tables.highest)
    empty = tables.fixed.new_zeros(tables.n_groups)
    sums = torch.cat([empty.index_add(0, tables.segment, row) for row in cumulants])
    blocks = torch.addmv(tables.fixed, tables.weight, sums)
    factors = [blocks[row] for row in tables.factors]
    n_rows = len(tables.coefficients)
    in_blocks = torch.zeros_like(tables.fixed).expand(n_rows, -1).clone()
    for row, position in enumerate(tables.factors):
        others = tables.coefficients
        for factor in (*factors[:row], *factors[row + 1 :]):
            others = others * factor
        in_blocks.index_add_(1, position, others)
    values = others @ factors[-1]
    in_sums = (in_blocks @ tables.weight).reshape(n_rows, tables.highest, tables.n_groups)
    gradients = []
    for by_order in in_sums:
        total = by_order[0][tables.segment]
        for slope, derivative in zip(by_order[1:], derivatives[1:], strict=True):
            total = torch.addcmul(total, slope[tables.segment], derivative)  # type: ignore[arg-type]
        gradients.append(total)
    return values, torch.stack(gradients)


def expectation(prob_open: Tensor, tables: Tables) -> Tensor:
    """Costs ``(R,)``, differentiable in ``prob_open`` ``(U,)`` once."""
    values: Tensor = _Expectation.apply(prob_open, tables)  # type: ignore[no-untyped-call]
    return values


class _Expectation(torch.autograd.Function):
    """`evaluate` with its own gradient: one pass over the tables serves the value and the backward pass."""

    @staticmethod
    def forward(ctx: Any, prob_open: Tensor, tables: Tables) -> Tensor:
        values, gradients = evaluate(tables, prob_open)
        ctx.save_for_backward(gradients)
        return values.to(prob_open.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        (gradients,) = ctx.saved_tensors
        return (outer[0].to(gradients.dtype) @ gradients).to(outer[0].dtype), None
