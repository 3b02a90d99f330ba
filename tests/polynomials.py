"""Stand-ins for a structure: the cost polynomials alone, of networks that are counted by hand; gates for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.budgets.costs import CostModel
from secateur.structure.groups import Axis, Frozen, Group, Term


@dataclass(frozen=True)
class Polynomials:
    """The part of a structure that costs are read from."""

    groups: tuple[Group, ...]
    axes: tuple[Axis, ...]
    param_terms: tuple[Term, ...]
    mac_terms: tuple[Term, ...]
    latency_terms: tuple[Term, ...] = ()
    frozen: tuple[Frozen, ...] = ()

    @property
    def terms(self) -> tuple[tuple[Term, ...], tuple[Term, ...], tuple[Term, ...]]:
        return self.param_terms, self.mac_terms, self.latency_terms


def group(size: int, name: str = "g") -> Group:
    return Group(name, size=size, members=())


def chain(widths: list[int]) -> Polynomials:
    """A network of linear layers without biases, every width a group; MACs are parameters times 7 positions."""
    groups = tuple(group(width, f"g{i}") for i, width in enumerate(widths))
    axes = tuple(Axis(0, ((i, 1),)) for i in range(len(widths)))
    pairs = [(i, i + 1) for i in range(len(widths) - 1)]
    return Polynomials(
        groups,
        axes,
        tuple(Term(1.0, pair, f"fc{i}") for i, pair in enumerate(pairs)),
        tuple(Term(7.0, pair, f"fc{i}") for i, pair in enumerate(pairs)),
    )


def convolutional() -> Polynomials:
    """On 8 x 8 images: conv 3 -> 4 (3 x 3, padded, bias), BatchNorm 4, conv 4 -> 5 (3 x 3, bias), linear 5 -> 10."""
    return Polynomials(
        groups=(group(4, "conv1"), group(5, "conv2")),
        axes=(Axis(0, ((0, 1),)), Axis(0, ((1, 1),))),
        param_terms=(
            Term(27.0, (0,), "conv1.weight"),
            Term(1.0, (0,), "conv1.bias"),
            Term(2.0, (0,), "bn"),
            Term(9.0, (0, 1), "conv2.weight"),
            Term(1.0, (1,), "conv2.bias"),
            Term(10.0, (1,), "fc.weight"),
            Term(10.0, (), "fc.bias"),
        ),
        mac_terms=(Term(27.0 * 64, (0,), "conv1"), Term(9.0 * 64, (0, 1), "conv2"), Term(10.0, (1,), "fc")),
    )


def drawn(costs: CostModel, seed: int, opening: float) -> tuple[Tensor, Tensor]:
    """Scores with ties, and a pattern that follows them group by group as fixed gates do."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.round(torch.randn(costs.total, generator=generator, dtype=torch.float64) * 4) / 4
    return scores, scores > torch.tensor(scores.tolist()).quantile(1 - opening)
