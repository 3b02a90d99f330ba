"""One training loop for all networks of a recipe, gated or not.

Index conventions: ``B`` examples in a batch.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.pruning.pruner import Pruner
from secateur.recipes.average import Average
from secateur.recipes.checkpoint import Checkpoint
from secateur.recipes.data import batches, n_batches
from secateur.recipes.images import Images
from secateur.structure.groups import Cost

__all__ = ["Epoch", "Objective", "Phase", "Watch", "cross_entropy", "optimizer_step", "train"]

#: Momentum of SGD, with Nesterov's correction, as the papers train residual networks.
MOMENTUM = 0.9
#: What a checkpoint holds of an epoch: costs, and plain numbers.
_COSTS = ("dense", "expected", "exact", "left")
_NUMBERS = ("number", "loss", "error", "step_ms")


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    Args:
        name: shown while it runs.
        epochs: passes over the training images, at least 0.
        batch: intended examples in a batch.
        lr: the weights' rate at the start, or at its height after a warm-up.
        gate_lr: the gates' constant rate, where there are any.
        weight_decay: of the weights, decoupled under Adam: each step shrinks them by ``lr * weight_decay``. Gates have
            none.
        seed: of the order of the examples and of all else that is drawn, such as dropout.
        optimizer: ``"adam"`` for all, or ``"sgd"`` with Nesterov momentum for weights and Adam for gates.
        warm_up: share of the steps in which the weights' rate rises from 0, in [0, 1).
        milestones: epochs after which the weights' rate is multiplied by ``drop``; without any it falls to 0 along half
            a cosine.
        drop: factor at each milestone; 1 and one milestone keep the rate constant.
        fused: whether Adam runs as one kernel for all parameters: faster for small networks, other roundings.
        average: memory of the moving average of all parameters that ends the phase, in [0, 1); 0 for none.
        checks: how often, evenly spread over the steps, units that have stayed closed are removed (`Pruner.shrink`); 0
            for never. Without effect where there are no gates, or gates of which that cannot be done.
    """

    name: str
    epochs: int
    batch: int
    lr: float
    gate_lr: float = 0.0
    weight_decay: float = 0.0
    seed: int = 0
    optimizer: Literal["adam", "sgd"] = "adam"
    warm_up: float = 0.0
    milestones: tuple[int, ...] = ()
    drop: float = 1.0
    fused: bool = False
    average: float = 0.0
    checks: int = 0

    def is_check(self, step: int, n: int) -> bool:
        """Whether units are removed after a step, counted from 1, for ``n`` training images."""
        steps = self.steps(n)
        return step * self.checks // steps > (step - 1) * self.checks // steps

    def steps(self, n: int) -> int:
        """Optimizer steps over ``n`` training images."""
        return self.epochs * n_batches(n, self.batch)

    def rate(self, step: int, n: int) -> float:
        """What the weights' rate is multiplied by at a step, for ``n`` training images."""
        steps = max(1, self.steps(n))
        rise = round(self.warm_up * steps)
        if step < rise:
            return (step + 1) / rise
        if self.milestones:
            return self.drop ** sum(step >= milestone * n_batches(n, self.batch) for milestone in self.milestones)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))


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
        error: what was asked to be measured of the network, of its average where there is one; None otherwise.
        left: cost of what the network has physically, with all its units open; None without gates.
        step_ms: median time of an optimizer step, in milliseconds.
    """

    phase: Phase
    number: int
    loss: float
    dense: Cost | None = None
    expected: Cost | None = None
    exact: Cost | None = None
    error: float | None = None
    left: Cost | None = None
    step_ms: float = field(default=0.0, compare=False)


#: Called after every epoch.
Watch = Callable[[Epoch], None]


@dataclass(frozen=True)
class Objective:
    """What a training minimises.

    Args:
        loss: of a model on the training images of these positions, int64 ``(B,)``: a scalar.
        beside: a term that depends on no draw of gates, added once. In ``loss`` it would enter what score-function
            gates compare, and add variance.
    """

    loss: Callable[[nn.Module, Tensor], Tensor]
    beside: Callable[[], Tensor] | None = None


def cross_entropy(images: Images) -> Objective:
    """The mean cross-entropy on a batch of the training images."""
    return Objective(lambda model, index: F.cross_entropy(model(images.x[index]), images.y[index]))


def train(
    model: nn.Module,
    images: Images,
    phase: Phase,
    watch: Watch,
    pruner: Pruner | None = None,
    *,
    objective: Objective | None = None,
    error: Callable[[nn.Module], float] | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[Epoch, ...]:
    """Trains in place, through ``pruner`` where the model is gated, and tells what was seen after each epoch.

    Args:
        model: maps images to logits; left in training mode.
        images: its training part is used, on the model's device.
        phase: length, rates, seed.
        watch: told about every epoch that is trained now.
        pruner: of ``model``, or None.
        objective: the loss of a batch; the cross-entropy by default.
        error: measured after every epoch; may leave the model in evaluation mode.
        checkpoint: where the state is kept after every epoch, and where an earlier call left off.

    Returns:
        All epochs of the phase, those before an interruption included.

    Raises:
        SecateurError: the checkpoint is of another training.
    """
    n = len(images.y)
    aim = cross_entropy(images) if objective is None else objective
    state = None if checkpoint is None else checkpoint.load(phase)
    if state is not None and pruner is not None:
        pruner.load_state_dict(state["pruner"])  # first of all, for it brings the model to the size that it had
    optimizers = _optimizers(model, phase, pruner)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizers[0], _rates(optimizers[0], phase, n))
    generator = torch.Generator().manual_seed(phase.seed)
    average = Average(phase.average) if phase.average else None
    epochs: list[Epoch] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(phase.seed)
        if state is not None:
            _restore(state, model, optimizers, scheduler, average)
            generator.set_state(state["order"])
            torch.set_rng_state(state["random"])
            epochs = [_epoch(phase, row) for row in state["epochs"]]
        taken = len(epochs) * n_batches(n, phase.batch)
        left = None if pruner is None else epochs[-1].left if epochs else pruner.costs.dense
        for number in range(len(epochs) + 1, phase.epochs + 1):
            total, times = 0.0, []
            model.train()
            for index in batches(n, phase.batch, generator):
                start = time.perf_counter()

                def closure(index: Tensor = index) -> Tensor:
                    return aim.loss(model, index)

                total += len(index) * optimizer_step(closure, optimizers, pruner, aim.beside).item()
                times.append(1e3 * (time.perf_counter() - start))
                scheduler.step()
                if average is not None:
                    average.update(model)
                taken += 1
                if pruner is not None and not pruner.why_whole and phase.is_check(taken, n):
                    left = pruner.shrink(optimizers, ema=[] if average is None else [average.sums]).cost
            seen = _seen(model, phase, number, total / n, pruner, average, error)
            epochs.append(replace(seen, left=left, step_ms=statistics.median(times)))
            if checkpoint is not None:
                state = _state(model, optimizers, scheduler, pruner, average)
                state |= {"order": generator.get_state(), "random": torch.get_rng_state()}
                checkpoint.save(phase, state | {"epochs": [_plain(epoch) for epoch in epochs]})
            watch(epochs[-1])
    if average is not None and phase.epochs:
        average.end(model)
    model.train()
    return tuple(epochs)


def optimizer_step(
    closure: Callable[[], Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    pruner: Pruner | None,
    beside: Callable[[], Tensor] | None = None,
) -> Tensor:
    """One step on the batch that the closure runs the model on, gated or not; its loss, detached.

    Args:
        closure: the loss of the batch.
        optimizers: of all parameters.
        pruner: of the model, or None.
        beside: what is added to the loss once, however often the closure runs.
    """
    loss = closure() if pruner is None else pruner.loss(closure)
    if beside is not None:
        loss = loss + beside()
    loss.backward()  # type: ignore[no-untyped-call]
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    if pruner is not None:
        pruner.step()
    return loss.detach()


def _optimizers(model: nn.Module, phase: Phase, pruner: Pruner | None) -> list[torch.optim.Optimizer]:
    """One optimizer for all parameters, or one for the weights and Adam for the gates."""
    if pruner is None:
        groups = [{"params": list(model.parameters()), "lr": phase.lr, "weight_decay": phase.weight_decay}]
    else:
        groups = pruner.param_groups(lr=phase.lr, gate_lr=phase.gate_lr, weight_decay=phase.weight_decay)
    if phase.optimizer == "adam":
        return [torch.optim.AdamW(groups, fused=phase.fused or None)]
    weights = torch.optim.SGD(groups[:1], momentum=MOMENTUM, nesterov=True)
    return [weights, *(torch.optim.Adam([group], fused=phase.fused or None) for group in groups[1:])]


def _rates(optimizer: torch.optim.Optimizer, phase: Phase, n: int) -> list[Callable[[int], float]]:
    # Gates keep their rate: a budget that is still being approached must stay in reach until the end.
    return [lambda step: phase.rate(step, n), lambda step: 1.0][: len(optimizer.param_groups)]


def _seen(
    model: nn.Module,
    phase: Phase,
    number: int,
    loss: float,
    pruner: Pruner | None,
    average: Average | None,
    error: Callable[[nn.Module], float] | None,
) -> Epoch:
    with contextlib.nullcontext() if average is None else average.applied(model):
        measured = None if error is None else error(model)
    if pruner is None:
        return Epoch(phase, number, loss, error=measured)
    return Epoch(phase, number, loss, pruner.costs.dense, pruner.expected, pruner.exact, measured)


def _state(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    pruner: Pruner | None,
    average: Average | None,
) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        # The functions in it are made anew from the phase.
        "scheduler": {k: v for k, v in scheduler.state_dict().items() if isinstance(v, (bool, int, float, list))},
        "pruner": None if pruner is None else pruner.state_dict(),
        "average": None if average is None else average.state_dict(),
    }


def _restore(
    state: Mapping[str, Any],
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    average: Average | None,
) -> None:
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    scheduler.load_state_dict(scheduler.state_dict() | state["scheduler"])
    if average is not None:
        average.load_state_dict(state["average"])


def _plain(epoch: Epoch) -> dict[str, Any]:
    """An epoch as values that a checkpoint can hold, without its phase."""
    costs = {kind: getattr(epoch, kind) for kind in _COSTS}
    known = {kind: None if cost is None else [cost.params, cost.macs] for kind, cost in costs.items()}
    return {key: getattr(epoch, key) for key in _NUMBERS} | known


def _epoch(phase: Phase, row: Mapping[str, Any]) -> Epoch:
    """The epoch again; what an older checkpoint does not tell is as by default."""
    costs: dict[str, Any] = {kind: Cost(*row[kind]) for kind in _COSTS if row.get(kind) is not None}
    return Epoch(phase, **{key: row[key] for key in _NUMBERS if key in row}, **costs)
