"""What a budget takes beside a training step, and what gates take at the least."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.step_cases import CASES  # noqa: E402
from benchmarks.step_clock import made, timed  # noqa: E402

import secateur as sc  # noqa: E402
from secateur.gates import Layout  # noqa: E402
from secateur.pruning.pressure import STEPS_BETWEEN  # noqa: E402

__all__ = ["cost_rows", "floor_rows", "n_operators"]


class _Operators(TorchDispatchMode):
    """Counts what is dispatched."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def n_operators(step: Callable[[], None]) -> int:
    """Operators that torch dispatches within a step, its backward pass included."""
    with _Operators() as operators:
        step()
    return operators.count


def cost_rows(name: str, rounds: int, size: int | None = None) -> list[dict[str, Any]]:
    """Expected cost with its gradient, as the loss has them, and the multipliers' step, over the dense step."""
    case = CASES[name]
    (_, base), (_, ours), pruner = made(case, sc.HardConcrete(), None, size or case.size)
    ours()
    controller = pruner.controller
    for _ in range(STEPS_BETWEEN):
        pruner.step()  # multipliers that have moved
    # Two in turn, for at the same chances the costs are not worked out again.
    several = itertools.cycle([torch.full((pruner.costs.total,), p, requires_grad=True) for p in (0.9, 0.8)])
    is_open, scores = torch.ones(pruner.costs.total, dtype=torch.bool), torch.rand(pruner.costs.total)
    task_loss = torch.ones(())

    def gradient() -> None:
        chances = next(several)
        controller.loss(chances, task_loss=task_loss).backward()
        chances.grad = None

    def step() -> None:
        controller.step(next(several), is_open, scores=scores)

    parts = {"expected cost and its gradient": gradient, "step of the multipliers": step}
    return [{"network": name, "method": kind, **timed(base, part, rounds)} for kind, part in parts.items()]


def floor_rows(name: str, rounds: int, size: int | None = None) -> list[dict[str, Any]]:
    """The least that gates add, over the dense step: parts of a gated step, each by itself."""
    case = CASES[name]
    (model, base), (_, ours), _ = made(case, sc.HardConcrete(), None, size or case.size)
    more = n_operators(ours) - n_operators(base)
    x, _ = case.batch(size or case.size)
    number = torch.zeros(1)
    weights = [p for p in model.parameters() if p.dim() > 1]
    n_weights = sum(weight.numel() for weight in weights)
    generator, layout = torch.Generator().manual_seed(0), Layout((n_weights,))
    gates = [torch.rand_like(weight, requires_grad=True) for weight in weights]
    outer = [torch.rand_like(weight) for weight in weights]

    def called() -> None:
        for _ in range(more):
            number.neg()

    def again() -> None:
        with torch.no_grad():
            model(x)

    def drawn() -> None:
        sc.HardConcrete().noise(layout, generator)

    def multiplied() -> None:
        products = [weight * gate for weight, gate in zip(weights, gates, strict=True)]
        torch.autograd.grad(products, [*weights, *gates], outer)

    parts = {
        "one more optimizer call": _adam(400),
        f"{more} operators on one number": called,
        "a second pass without graph, as ARM's": again,
        "noise for every weight": drawn,
        "every weight times a gate, and back": multiplied,
        "Adam over as many gates as weights": _adam(n_weights),
    }
    return [{"network": name, "method": kind, **timed(base, part, rounds)} for kind, part in parts.items()]


def _adam(size: int) -> Callable[[], object]:
    """The step of a fused Adam over one parameter."""
    gate = nn.Parameter(torch.zeros(size))
    gate.grad = torch.zeros(size)
    return torch.optim.Adam([gate], lr=1e-4, fused=True).step
