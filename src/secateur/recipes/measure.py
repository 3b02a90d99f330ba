"""What is measured of a finished network: accuracy, parameters, MACs, bytes on disk, latency, and differences.

Index conventions: ``B`` examples, ``K`` classes.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.errors import SecateurError
from secateur.latency.clock import WallTime, clock_of

__all__ = ["Latency", "accuracy", "largest_difference", "latencies", "n_bytes", "n_macs", "n_params", "step_ratios"]

#: Examples in one evaluation batch: bounds memory, changes no result.
EVALUATION_BATCH = 1000
#: Passes before the clock starts: the first ones pay for allocation and for choosing kernels.
WARM_UP_ROUNDS = 5


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass, in milliseconds: the median of the rounds and their quartiles.

    Args:
        median: of all rounds.
        low: first quartile.
        high: third quartile.
    """

    median: float
    low: float
    high: float


@torch.inference_mode()
def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in torch.split(x, EVALUATION_BATCH)])


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of examples that the model, in evaluation mode, gives the right class, in percent.

    Args:
        model: maps ``(B, C, H, W)`` to logits ``(B, K)``; left in evaluation mode.
        x: images.
        y: labels ``(B,)``.
    """
    predicted = _outputs(model.eval(), x).argmax(dim=1)
    return 100 * (predicted == y).sum().item() / len(y)


def largest_difference(a: nn.Module, b: nn.Module, x: Tensor, dtype: torch.dtype) -> float:
    """The largest absolute difference between the outputs of two models in evaluation mode, computed in ``dtype``.

    Args:
        a: one model; neither is changed.
        b: the other.
        x: inputs of both.
        dtype: that copies of both models, and ``x``, are converted to.
    """
    first, second = (_outputs(copy.deepcopy(model).to(dtype).eval(), x.to(dtype)) for model in (a, b))
    return (first - second).abs().max().item()


def n_params(model: nn.Module) -> int:
    """Numbers in all parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def n_macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of one forward pass on ``x`` in evaluation mode, counted by torch from the operators run."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    # torch counts a multiply-accumulate as two operations.
    return int(counter.get_total_flops()) // 2


def n_bytes(model: nn.Module) -> int:
    """Size of the model's parameters and buffers as a ``.safetensors`` file, in bytes."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.safetensors"
        safetensors.torch.save_model(model, str(path))
        return path.stat().st_size


def latencies(models: Mapping[str, nn.Module], x: Tensor, rounds: int = 50) -> dict[str, Latency]:
    """Times forward passes of several models in one process, turn by turn, so that disturbances meet all alike.

    With one thread on the processor that is the thread's own time, as for `secateur.latency_model`.

    Args:
        models: by name; each is timed in evaluation mode, without gradients.
        x: the batch that all of them get.
        rounds: passes of each model, at least 2.

    Raises:
        SecateurError: ``rounds`` is under 2, for which there is no spread.
    """
    if rounds < 2:
        raise SecateurError(f"latencies: rounds={rounds}; expected at least 2")

    clock = clock_of(x.device) if x.device.type in ("cpu", "cuda") else WallTime()
    for model in models.values():
        model.eval()
    seen: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(WARM_UP_ROUNDS + rounds):
            for name, model in models.items():
                marks = [clock.mark()]
                model(x)
                took = float(clock.read([*marks, clock.mark()])[1])
                if turn >= WARM_UP_ROUNDS:
                    seen[name].append(took / 1e6)
    quartiles = {name: statistics.quantiles(times, n=4, method="inclusive") for name, times in seen.items()}
    return {name: Latency(q[1], q[0], q[2]) for name, q in quartiles.items()}


def step_ratios(steps: Mapping[str, Callable[[], object]], base: str, rounds: int = 30) -> dict[str, Latency]:
    """Times of steps over that of one of them, taken turn by turn in one process; round by round, then the median.

    Processor time counts, so that other programs' work does not; on an accelerator a step has to wait for its end.

    Args:
        steps: by name; each call is one step.
        base: the name of the step that the others are divided by.
        rounds: calls of each, at least 2.

    Raises:
        SecateurError: ``rounds`` is under 2.

    Returns:
        Ratios by name, without the base.
    """
    if rounds < 2:
        raise SecateurError(f"step_ratios: rounds={rounds}; expected at least 2")
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP_ROUNDS + rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if turn >= WARM_UP_ROUNDS:
                found[name].append(time.process_time() - start)
    ratios = {
        name: [own / other for own, other in zip(times, found[base], strict=True)]
        for name, times in found.items()
        if name != base
    }
    quartiles = {name: statistics.quantiles(each, n=4, method="inclusive") for name, each in ratios.items()}
    return {name: Latency(q[1], q[0], q[2]) for name, q in quartiles.items()}
