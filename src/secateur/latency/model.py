"""A measured model of a network's latency, as one more polynomial of its structure."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.compaction.artifact import check_writable
from secateur.compaction.mask import checked_model
from secateur.errors import LatencyError, SecateurError
from secateur.latency.cache import conditions, place_of, read, write
from secateur.latency.clock import clock_of
from secateur.latency.fit import fitted, predicted
from secateur.latency.measure import Measured, measure, widths
from secateur.structure.example import Examples, as_examples
from secateur.structure.groups import Keep, Term
from secateur.structure.structure import Structure

__all__ = ["Check", "LatencyModel", "latency_model"]

#: Random patterns that a fit sees besides the grid of equal shares.
FITTED = 16
#: Random patterns that no fit sees.
HELD_BACK = 10
#: Nanoseconds in a millisecond.
MILLISECOND = 1e6


@dataclass(frozen=True)
class Check:
    """One network that the fit did not see.

    Args:
        predicted: milliseconds.
        measured: milliseconds.
        again: relative difference between its times in the first and the second half of the measuring.
    """

    predicted: float
    measured: float
    again: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return abs(self.predicted / self.measured - 1.0)


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """How long a network takes at any widths, on one machine; made by `latency_model`.

    Args:
        structure: of the network, with ``latency_terms``: nanoseconds as a polynomial of open units.
        conditions: what it was measured on: device, processor, threads, torch, inputs.
        clock: what was measured, in words.
        dense: milliseconds of the dense network, measured; `predict` says what the polynomial gives.
        checks: networks of random widths that the fit did not see.
        rounds: passes behind each time.

    Attributes:
        error: median relative error over the checks.
        noise: median relative difference between two measurements of the same network.
    """

    structure: Structure
    conditions: Mapping[str, Any]
    clock: str
    dense: float
    checks: tuple[Check, ...]
    rounds: int

    @property
    def error(self) -> float:
        """Median relative error over the checks."""
        return statistics.median(check.error for check in self.checks)

    @property
    def noise(self) -> float:
        """Median relative difference between two measurements of the same network."""
        return statistics.median(check.again for check in self.checks)

    def predict(self, keep: Keep | None = None) -> float:
        """Milliseconds of one pass with the kept units only; dense where ``keep`` is None."""
        return self.structure.cost(keep).latency / MILLISECOND

    def by_layer(self) -> dict[str, float]:
        """Milliseconds of the dense network's pass in each module, without those below it, as predicted."""
        found = dict.fromkeys((term.label for term in self.structure.latency_terms), 0.0)
        dense = np.array([[group.size for group in self.structure.groups]])
        for term in self.structure.latency_terms:
            found[term.label] += float(predicted(self.structure.axes, [term], dense)[0]) / MILLISECOND
        return found

    def __str__(self) -> str:
        known = self.conditions
        threads = f", {known['threads']} thread{'s' * (known['threads'] != 1)}" if known["device"] == "cpu" else ""
        return (
            f"{self.predict():.4g} ms predicted, {self.dense:.4g} ms measured, for a pass of {known['inputs']}: "
            f"{self.clock}, {known['processor']}{threads}, torch {known['torch']}\n"
            f"{len(self.checks)} networks of random widths that the fit did not see: median error {self.error:.1%}, "
            f"largest {max(check.error for check in self.checks):.1%}; the same network measured twice differs by "
            f"{self.noise:.1%} (median), each time from {self.rounds} passes"
        )


def latency_model(
    model: nn.Module,
    structure: Structure,
    *,
    examples: Examples,
    device: torch.device | str | None = None,
    cache: bool | str | os.PathLike[str] = True,
    seconds: float = 20.0,
    seed: int = 0,
) -> LatencyModel:
    r"""Measure how long a model's layers take at many widths on this machine, and fit a polynomial of open units.

    .. math:: t(n) = \sum_l \sum_{k \in F_l} c_{lk} \prod_{a \in k} \mathrm{size}_a(n), \qquad c_{lk} \ge 0

    The model is cut to a grid of widths, from dense to one unit in every group, and to random ones, and run in
    evaluation mode on the first example; each module's own time is read off with hooks while it runs in its place,
    caches and all. The time of a pass is the 2% quantile of many: what it takes when little disturbs. It is that of
    the batch size of the example and of the threads that torch has now (``torch.set_num_threads``), so give the example
    that the compact network is to be fast on.

    The cost is differentiable in the gates' chances, and never falls when a unit opens. The ``structure`` of what is
    returned is the given one with that cost: attach with it, and ``sc.Budget(latency=0.5)`` and
    ``sc.Budget(latency_ms=3.0)`` work like other budgets. Gates on inputs that belong to no unit, and on single
    weights, save no time that was measured.

    Args:
        model: plain, as it was traced; not changed.
        structure: what ``sc.trace`` found.
        examples: inputs, as for ``sc.trace``; the first one is timed.
        device: ``"cpu"`` or a CUDA device, where the compact network is to run; the model's own by default.
        cache: True: a file in the user's cache (``$SECATEUR_CACHE``, else ``$XDG_CACHE_HOME``, else ``~/.cache``) whose
            name follows from processor, device, torch, threads, inputs and layers is read instead of measuring, or
            written; False: none; a path: that file.
        seconds: about how long to measure, over 0, by the clock that measures; cutting the networks comes on top.
        seed: of the random widths.

    Raises:
        LatencyError: the device has no clock, the cache file cannot be written or is of other conditions, nothing can
            go from the model, or a setting is outside its range.
        CompactionError: the structure is not of this model.

    Example:
        >>> import torch, secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(256, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 10))
        >>> x = torch.zeros(64, 256)
        >>> structure = sc.trace(net, examples=(x,))
        >>> latency = sc.latency_model(net, structure, examples=(x,), cache=False, seconds=0.1)
        >>> latency.predict({"0": torch.arange(8)}) <= latency.predict()
        True
        >>> pruner = sc.attach(net, structure=latency.structure, budget=sc.Budget(latency=0.8))
    """
    example = as_examples(examples)[0]
    checked_model(model, structure)
    where = torch.device(device) if device is not None else next(model.parameters()).device
    clock = clock_of(where)
    if not structure.groups:
        raise LatencyError("no unit of this model can go, so its latency cannot change; structure.frozen says why")
    if isinstance(seconds, bool) or not 0.0 < seconds < float("inf"):
        raise LatencyError(f"seconds={seconds!r}, expected a finite number over 0")
    known = conditions(model, structure, example, where)
    place = _place(cache, known)
    found = None if place is None else read(place, known)
    if found is None:
        generator = np.random.default_rng(seed)
        n_open = widths(structure, FITTED, generator, grid=True)
        n_open = np.concatenate([n_open, widths(structure, HELD_BACK, generator, grid=False)])
        found = _found(structure, measure(model, structure, n_open, example, where, seconds))
        if place is not None:
            write(place, known, found)
    return LatencyModel(
        structure=replace(structure, latency_terms=tuple(Term(c, tuple(a), label) for c, a, label in found["terms"])),
        conditions=known,
        clock=clock.unit_of,
        dense=found["dense"],
        checks=tuple(Check(*one) for one in found["checks"]),
        rounds=found["rounds"],
    )


def _place(cache: bool | str | os.PathLike[str], known: Mapping[str, Any]) -> Path | None:
    """The file, after trying whether it can be written."""
    if cache is False:
        return None
    path = place_of(known) if cache is True else Path(cache)
    try:
        if cache is True:
            path.parent.mkdir(parents=True, exist_ok=True)
        return check_writable(path)
    except (OSError, SecateurError) as error:
        raise LatencyError(
            f"the cache {path} cannot be written ({error}); name a file by cache=, or cache=False"
        ) from error


def _found(structure: Structure, measured: Measured) -> dict[str, Any]:
    """Fit to all but the held-back patterns, and compare these."""
    terms = fitted(structure, measured.first(len(measured.whole) - HELD_BACK))
    of = predicted(structure.axes, terms, measured.n_open)
    again = np.abs(measured.twice[0] - measured.twice[1]) / measured.whole
    checks = [
        Check(p / MILLISECOND, m / MILLISECOND, a)
        for p, m, a in zip(of.tolist(), measured.whole.tolist(), again.tolist(), strict=True)
    ]
    return {
        "terms": [[term.coefficient, list(term.axes), term.label] for term in terms],
        "dense": float(measured.whole[0]) / MILLISECOND,
        "checks": [list(astuple(check)) for check in checks[-HELD_BACK:]],
        "rounds": measured.rounds,
    }
