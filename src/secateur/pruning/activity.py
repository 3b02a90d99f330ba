"""L2 regularisation of gated weights, each weighed by the chance that it is there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.errors import BudgetError
from secateur.pruning.draws import gates_of
from secateur.pruning.gateset import extended
from secateur.pruning.placement import gated_sites

__all__ = ["ActivityL2", "activity"]


@dataclass(frozen=True)
class ActivityL2:
    r"""Half the squared norm of the gated weights, expected over the gates' being open.

    .. math:: \frac{\lambda_2}{2} \sum_j P(z_j \ne 0)\, w_j^2

    w are the weights without their gates; a weight that several gates multiply counts with the product of their
    chances. Weights without a gate and biases are not in it: give them the optimizer's weight decay, and gated ones
    none, or they are counted twice.

    Args:
        weight: :math:`\lambda_2`, >= 0; divided by ``n_examples`` where these are given, as lambda is in the papers.
        into_gates: whether its gradient reaches the gates, as in the paper. Off (default), it only shrinks weights:
            where it reaches them it closes gates by the size of their weights, whatever the loss says of them.
        n_examples: N, the number of training examples, or None.

    Raises:
        BudgetError: a setting is outside its range.

    Example:
        >>> import torch, secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> pruner = sc.attach(net, examples=(torch.zeros(2, 4),), l2=sc.ActivityL2(1e-2))
        >>> bool(pruner.penalty() > 0)
        True

    Reference:
        Louizos, Welling, Kingma, Learning Sparse Neural Networks through L0 Regularization, ICLR 2018, section 2.3;
        without the gradient into gates: Gallego-Posada et al., Controlled Sparsity via Constrained Optimization, 2022.
    """

    weight: float
    into_gates: bool = False
    n_examples: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if isinstance(self.weight, bool) or not 0.0 <= self.weight < math.inf:
            problems.append(f"weight={self.weight!r}, expected a finite number of at least 0")
        if self.n_examples is not None and (isinstance(self.n_examples, bool) or not self.n_examples >= 1):
            problems.append(f"n_examples={self.n_examples!r}, expected the number of training examples, or None")
        if problems:
            raise BudgetError("ActivityL2: " + "; ".join(problems))

    @property
    def factor(self) -> float:
        """What the expected sum of squares is multiplied by."""
        return self.weight / (2.0 * (self.n_examples or 1))


def activity(model: nn.Module, prob_open: Tensor) -> Tensor:
    """Sum of the squares of all gated weights of a model, each times its chance, from those of the gates ``(Z,)``."""
    chances = extended(prob_open)
    total = torch.zeros((), dtype=prob_open.dtype, device=gates_of(model).device)
    seen: set[int] = set()
    for site in gated_sites(model):
        weight = site.chain.original
        if id(weight) not in seen:  # a tied weight has several sites
            seen.add(id(weight))
            total = total + site.gate.product(weight.to(prob_open.dtype).square(), chances).sum().to(total)
    return total
