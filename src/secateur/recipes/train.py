"""One training loop for all networks of a recipe, gated or not.

Index conventions: ``B`` examples in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.pruning.pruner import Pruner
from secateur.recipes.data import Images, batches, n_batches
from secateur.structure.groups import Cost

__all__ = ["Epoch", "Phase", "Watch", "train"]


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    Args:
        name: shown while it runs.
        epochs: passes over the training images, at least 0.
        batch: intended examples in a batch.
        lr: Adam's rate for the weights at the start; it falls to 0 along half a cosine.
        gate_lr: Adam's constant rate for the gates, where there are any.
        weight_decay: of the weights, decoupled: each step shrinks them by ``lr * weight_decay``. Gates have none.
        seed: of the order of the examples.
    """

    name: str
    epochs: int
    batch: int
    lr: float
    gate_lr: float = 0.0
    weight_decay: float = 0.0
    seed: int = 0

    def steps(self, n: int) -> int:
        """Optimizer steps over ``n`` training images."""
        return self.epochs * n_batches(n, self.batch)


@dataclass(frozen=True)
class Epoch:
    """What there is to see after an epoch.

    Args:
        phase: its phase.
        number: epochs done in this phase, from 1.
        loss: mean over the epoch's examples, penalty included.
        dense: cost of the network without gates; None without gates.
        expected: cost that the gates' chances give; None without gates.
        exact: cost of the gates as evaluation fixes them; None without gates.
    """

    phase: Phase
    number: int
    loss: float
    dense: Cost | None = None
    expected: Cost | None = None
    exact: Cost | None = None


#: Called after every epoch.
Watch = Callable[[Epoch], None]


def train(model: nn.Module, images: Images, phase: Phase, watch: Watch, pruner: Pruner | None = None) -> None:
    """Trains in place by AdamW on the cross-entropy, and through ``pruner`` where the model is gated.

    Args:
        model: maps images to logits; left in training mode.
        images: its training part is used, on the model's device.
        phase: length, rates, seed.
        watch: told about every epoch.
        pruner: of ``model``, or None.
    """
    n = len(images.y)
    steps = phase.steps(n)
    if pruner is None:
        groups = [{"params": list(model.parameters()), "lr": phase.lr, "weight_decay": phase.weight_decay}]
    else:
        groups = pruner.param_groups(lr=phase.lr, gate_lr=phase.gate_lr, weight_decay=phase.weight_decay)
    optimizer = torch.optim.AdamW(groups)

    def cosine(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))

    # Gates keep their rate: a budget that is still being approached must stay in reach until the end.
    rates = [cosine, lambda step: 1.0][: len(optimizer.param_groups)]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
    generator = torch.Generator().manual_seed(phase.seed)
    for number in range(1, phase.epochs + 1):
        model.train()
        total = 0.0
        for index in batches(n, phase.batch, generator):
            x, y = images.x[index], images.y[index]

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                return F.cross_entropy(model(x), y)

            loss = closure() if pruner is None else pruner.loss(closure)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if pruner is not None:
                pruner.step()
            total += loss.item() * len(index)
        costs = () if pruner is None else (pruner.costs.dense, pruner.expected, pruner.exact)
        watch(Epoch(phase, number, total / n, *costs))
