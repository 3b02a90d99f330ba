"""Forward passes of a model cut to many widths, timed whole and layer by layer.

Index conventions: ``P`` patterns of widths, ``G`` groups, ``L`` layers, ``R`` rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils._pytree import tree_map

from secateur.compaction.compact import compact
from secateur.latency.clock import Clock, clock_of
from secateur.structure.example import Example
from secateur.structure.groups import Keep
from secateur.structure.nested import tensors_in
from secateur.structure.structure import Structure

__all__ = ["LOW", "Measured", "keep_of", "measure", "widths"]

#: Equal shares of all groups that are measured, besides one unit in each.
SHARES = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
#: Least share of units that random widths keep.
LEAST_SHARE = 0.02
#: The quantile of the rounds that counts as the time of a pass: what a pass takes that little disturbs.
LOW = 0.02
#: Times that all patterns are gone through, so that a disturbance of seconds meets a part of each one's rounds.
SWEEPS = 4
#: Passes before the clock starts, in each sweep.
WARM_UP = 3
#: Fewest and most rounds of a pattern in one sweep.
ROUNDS = (4, 60)

#: Sizes of a tensor's dimensions by pattern, ``(P, n)``; None where its number of dimensions changes.
Sizes = NDArray[np.int64]


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Args:
        n_open: units of each group by pattern, int64 ``(P, G)``.
        whole: nanoseconds of a pass, ``(P,)``.
        twice: the same from the first half of the sweeps and from the second, ``(2, P)``.
        layers: modules that were called, by their paths.
        calls: how often each was, ``(L,)``.
        own: nanoseconds of a pass in each of them, without those in modules below it, ``(P, L)``; what the measuring
            itself takes is in it.
        shapes: for each layer the sizes of the tensors that it takes and returns.
        rounds: passes behind each time.
    """

    n_open: NDArray[np.int64]
    whole: NDArray[np.float64]
    twice: NDArray[np.float64]
    layers: tuple[str, ...]
    calls: NDArray[np.int64]
    own: NDArray[np.float64]
    shapes: Mapping[str, tuple[Sizes, ...]]
    rounds: int

    def first(self, n: int) -> Measured:
        """What was measured of the first ``n`` patterns."""
        return replace(
            self,
            n_open=self.n_open[:n],
            whole=self.whole[:n],
            twice=self.twice[:, :n],
            own=self.own[:n],
            shapes={path: tuple(sizes[:n] for sizes in tensors) for path, tensors in self.shapes.items()},
        )


def widths(structure: Structure, n_random: int, generator: np.random.Generator, *, grid: bool) -> NDArray[np.int64]:
    """Patterns of widths, int64 ``(P, G)``.

    Args:
        structure: whose groups they are of.
        n_random: how many are drawn: half with a share for each group, half with shares near a common one.
        generator: what they are drawn from.
        grid: whether equal shares of all groups, dense first, and one unit in each come before them.
    """
    sizes = np.array([group.size for group in structure.groups], dtype=np.int64)
    least = np.array([min(group.size, max(group.least, 1)) for group in structure.groups], dtype=np.int64)
    shares = [np.full(len(sizes), share) for share in (*SHARES, 0.0)] if grid else []
    for number in range(n_random):
        own = generator.uniform(LEAST_SHARE, 1.0, len(sizes))
        common = generator.uniform(LEAST_SHARE, 1.0)
        shares.append(own if number % 2 else common * (0.5 + own))
    return np.clip(np.rint(np.array(shares).reshape(-1, len(sizes)) * sizes).astype(np.int64), least, sizes)


def keep_of(structure: Structure, n_open: NDArray[np.int64]) -> Keep:
    """The first so many units of each group, ``(G,)``."""
    return {group.name: torch.arange(int(n)) for group, n in zip(structure.groups, n_open, strict=True)}


def measure(
    model: nn.Module,
    structure: Structure,
    n_open: NDArray[np.int64],
    example: Example,
    device: torch.device,
    seconds: float,
) -> Measured:
    """Time the model, in evaluation mode and without gradients, at the given widths.

    Each pattern's model is cut and timed, passes one after the other, first whole ones and then ones that are watched
    layer by layer, and then forgotten, for all patterns in turns.

    Args:
        model: plain, as it was traced; not changed.
        structure: of the model.
        n_open: patterns ``(P, G)``.
        example: inputs of a pass.
        device: where it runs.
        seconds: about how long to measure, by the device's clock.

    Raises:
        LatencyError: the device has no clock.
    """
    clock = clock_of(device)
    call = Example(*tree_map(_mover(device), (example.args, dict(example.kwargs))))
    layers: dict[str, int] = {}
    plain: list[list[float]] = [[] for _ in n_open]
    watched: list[list[NDArray[np.float64]]] = [[] for _ in n_open]
    halves: list[list[int]] = [[] for _ in n_open]
    shapes: list[dict[str, list[tuple[int, ...]]]] = []
    calls: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    rounds = ROUNDS[0]
    for sweep in range(SWEEPS):
        for pattern, n in enumerate(n_open):
            small = compact(model, structure, keep_of(structure, n)).to(device).eval()
            with torch.inference_mode():
                if sweep == 0:
                    shapes.append(_shapes(small, call))
                    layers = {path: place for place, path in enumerate(shapes[0])}
                for _ in range(WARM_UP):
                    marks = [clock.mark()]
                    small(*call.args, **call.kwargs)
                    took = max(float(clock.read([*marks, clock.mark()])[1]), 1.0)
                if sweep == pattern == 0:
                    rounds = int(np.clip(1e9 * seconds / (2 * SWEEPS * len(n_open) * took), *ROUNDS))
                watch = _Watch(small, layers, clock)
                for _ in range(rounds):
                    marks = [clock.mark()]
                    small(*call.args, **call.kwargs)
                    plain[pattern].append(float(clock.read([*marks, clock.mark()])[1]))
                # Apart: after a watched pass the processor's caches are full of other things.
                for _ in range(rounds):
                    with watch:
                        small(*call.args, **call.kwargs)
                    watched[pattern].append(watch.own())
                    calls = watch.calls
            halves[pattern].append(len(plain[pattern]))
    middle = [ends[SWEEPS // 2 - 1] for ends in halves]
    return Measured(
        n_open=n_open,
        whole=np.array([np.quantile(times, LOW) for times in plain]),
        twice=np.array(
            [
                [np.quantile(times[:half], LOW) for times, half in zip(plain, middle, strict=True)],
                [np.quantile(times[half:], LOW) for times, half in zip(plain, middle, strict=True)],
            ]
        ),
        layers=tuple(layers),
        calls=calls,
        own=np.array([np.quantile(np.array(times), LOW, axis=0) for times in watched]),
        shapes={path: _together([one.get(path, []) for one in shapes]) for path in layers},
        rounds=rounds * SWEEPS,
    )


class _Watch:
    """Hooks that mark when each module is entered and left; a context.

    Args:
        model: to be watched.
        layers: position of each module that counts, by path.
        clock: to mark with.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, int], clock: Clock) -> None:
        self._modules = [(layers[path], module) for path, module in model.named_modules() if path in layers]
        self._n = len(layers)
        self._clock = clock
        self._marks: list[Any] = []
        self._places: list[int] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> _Watch:
        marks, places, mark = self._marks, self._places, self._clock.mark
        marks.clear()
        places.clear()
        for place, module in self._modules:

            def enter(*_: Any, place: int = place) -> None:
                places.append(place)
                marks.append(mark())

            def leave(*_: Any) -> None:
                marks.append(mark())
                places.append(-1)

            self._hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @property
    def calls(self) -> NDArray[np.int64]:
        """How often each layer was entered, ``(L,)``."""
        return np.bincount([place for place in self._places if place >= 0], minlength=self._n)

    def own(self) -> NDArray[np.float64]:
        """Nanoseconds in each layer and in none below it, ``(L,)``."""
        times = self._clock.read(self._marks)
        own = np.zeros(self._n)
        inside: list[int] = []
        last = 0.0
        for place, moment in zip(self._places, times.tolist(), strict=True):
            if inside:
                own[inside[-1]] += moment - last
            last = moment
            if place >= 0:
                inside.append(place)
            else:
                inside.pop()
        return own


def _shapes(model: nn.Module, call: Example) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of all tensors that each called module takes and returns, by path."""
    found: dict[str, list[tuple[int, ...]]] = {}

    @contextmanager
    def hooked() -> Iterator[None]:
        hooks = []
        for path, module in model.named_modules():

            def entered(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                found.setdefault(path, []).extend(tuple(t.shape) for t in tensors_in([args, kwargs]))

            def left(_: nn.Module, __: Any, ___: Any, out: Any, path: str = path) -> None:
                found[path].extend(tuple(t.shape) for t in tensors_in(out))

            hooks.append(module.register_forward_pre_hook(entered, with_kwargs=True))
            hooks.append(module.register_forward_hook(left, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    with hooked():
        model(*call.args, **call.kwargs)
    return found


def _together(by_pattern: Sequence[Sequence[tuple[int, ...]]]) -> tuple[Sizes, ...]:
    """Sizes ``(P, n)`` of each tensor that has the same number of dimensions in every pattern."""
    if len({len(shapes) for shapes in by_pattern}) > 1:
        return ()
    tensors = list(zip(*by_pattern, strict=True))
    return tuple(np.array(sizes, dtype=np.int64) for sizes in tensors if len({len(size) for size in sizes}) == 1)


def _mover(device: torch.device) -> Any:
    return lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf
