"""How two steps are timed side by side, and how the steps are made."""

from __future__ import annotations

import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.step_cases import Case  # noqa: E402

import secateur as sc  # noqa: E402
from secateur.recipes.train import optimizer_step  # noqa: E402

__all__ = ["made", "spread", "stepper", "timed"]

#: Steps of each side before the clock counts: the first ones pay for allocation and for choosing kernels.
WARM_UP = 3


def stepper(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    pruner: sc.Pruner | None,
    run: nn.Module | None = None,
    lr: float = 1e-4,
) -> Callable[[], None]:
    """One optimizer step, by fused Adam.

    Args:
        model: whose parameters are trained.
        batch: inputs and classes.
        pruner: of the model, or None.
        run: what is called, where it is not the model itself.
        lr: rate of weights and gates.
    """
    x, y = batch
    called = model if run is None else run
    groups = list(model.parameters()) if pruner is None else pruner.param_groups(lr=lr, gate_lr=lr)
    optimizer = torch.optim.Adam(groups, lr=lr, fused=True)

    def closure() -> Tensor:
        return F.cross_entropy(called(x), y)

    def step() -> None:
        optimizer_step(closure, [optimizer], pruner)

    return step


def timed(one: Callable[[], None], other: Callable[[], None], rounds: int, turn: int = 1) -> dict[str, Any]:
    """Both, turn by turn, the first of a round in alternation; seconds of the processor for one step.

    Args:
        one: the base.
        other: what is compared with it.
        rounds: turns of each.
        turn: steps in a turn, where not every step does the same.
    """
    for _ in range(WARM_UP):
        one()
        other()
    times: dict[str, list[float]] = {"base": [], "ours": []}
    sides = [("base", one), ("ours", other)]
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, side in sides:
                start = time.process_time()
                for _ in range(turn):
                    side()
                times[name].append((time.process_time() - start) / turn)
            sides.reverse()
    finally:
        gc.enable()
    ratios = [b / a for a, b in zip(times["base"], times["ours"], strict=True)]
    return {
        "ratio": spread(ratios),
        "base_ms": spread([1e3 * t for t in times["base"]]),
        "ours_ms": spread([1e3 * t for t in times["ours"]]),
        "rounds": rounds,
    }


def spread(values: Sequence[float]) -> list[float]:
    """Quartiles: first, median, third."""
    if len(values) < 2:
        return [round(values[0], 5)] * 3
    return [round(value, 5) for value in statistics.quantiles(values, n=4, method="inclusive")]


def made(case: Case, method: sc.Method, gates: list[sc.Rule] | None, size: int) -> tuple[Any, Any, sc.Pruner]:
    torch.manual_seed(0)
    dense = case.build()
    model = copy.deepcopy(dense)
    batch = case.batch(size)
    budget = sc.Budget(keep_params=0.5, steps=100_000, hold=0)  # no step in which the budget has nothing to do
    pruner = sc.attach(model, examples=(batch[0][:2],), gates=gates, method=method, budget=budget)
    return (dense, stepper(dense, batch, None)), (model, stepper(model, batch, pruner)), pruner
