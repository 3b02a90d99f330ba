"""One task from the dense network to the saved compact one: what ``secateur train`` does."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import secateur as sc
from secateur.errors import SecateurError
from secateur.pruning.conditional import When
from secateur.recipes.images import Images
from secateur.recipes.measure import (
    Latency,
    accuracy,
    largest_difference,
    latencies,
    n_bytes,
    n_macs,
    n_params,
)
from secateur.recipes.networks import network
from secateur.recipes.settings import Settings
from secateur.recipes.train import Epoch, Phase, Watch, train
from secateur.structure.cut import CutPlan, cut_

__all__ = ["Outcome", "Pruned", "Row", "attached", "fresh", "fresh_compact", "gates_for", "pruned", "run"]

#: Images in the batch whose latency is measured.
LATENCY_BATCH = 100
#: The networks of one run, in the order of the final table.
DENSE, SCRATCH, GATED, COMPACT, TUNED = ORDER = ("dense", "scratch", "gated", "compact", "fine-tuned")


@dataclass(frozen=True)
class Row:
    """One line of the final table.

    Args:
        name: which network.
        accuracy: on the test images, after the last epoch, in percent.
        params: numbers in all parameters, those of the gates included where there are gates.
        macs: multiply-accumulates that one image costs.
        bytes: of parameters and buffers as a ``.safetensors`` file.
        latency: of a batch of ``LATENCY_BATCH`` images.
    """

    name: str
    accuracy: float
    params: int
    macs: int
    bytes: int
    latency: Latency


@dataclass(frozen=True)
class Outcome:
    """All that one run found out.

    Args:
        settings: what was asked for.
        schedule: epochs by phase name.
        rows: the final table.
        difference: largest absolute difference between gated and compact outputs on the test images, by precision.
        widths: units of each group: (kept, of how many).
        flipped: units that the projection onto the budget opened or closed at the end.
        counted: live units as the papers' tables list them; empty where there is no such table.
        pruned: prune rate by the papers' formula, a share; None where there is none.
        n_test: test images behind each accuracy.
        seconds: wall time of the whole run.
        step_ms: by phase, milliseconds of an optimizer step in its first and its last epoch, medians.
    """

    settings: Settings
    schedule: Mapping[str, int]
    rows: tuple[Row, ...]
    difference: Mapping[str, float]
    widths: Mapping[str, tuple[int, int]]
    flipped: int
    counted: tuple[int, ...]
    pruned: float | None
    n_test: int
    seconds: float
    step_ms: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """The line of that name."""
        return next(row for row in self.rows if row.name == name)


def fresh(name: str, seed: int) -> nn.Module:
    """The network ``name`` with the initial weights of ``seed``; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network(name).build()


def fresh_compact(name: str, plan: CutPlan, seed: int) -> nn.Module:
    """The network ``name`` at the widths of ``plan``, with the initial weights that a layer of these widths gets."""
    model = fresh(name, seed)
    cut_(model, plan)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if callable(again := getattr(module, "reset_parameters", None)):
                # Drawn anew: what the cut leaves of a wide layer's weights is too small for a narrow one.
                again()
    return model


def gates_for(settings: Settings) -> list[sc.Rule]:
    """Gates on every group of the trace, and on single inputs where the papers' tables count them."""
    method = sc.method_from_name(settings.method)
    rules = [sc.Rule(units="structured", method=method)]
    if inputs := network(settings.net).inputs:
        rules.append(sc.Rule(units="inputs", where=inputs, method=method))
    return rules


@dataclass(frozen=True, eq=False)
class Pruned:
    """What training with gates made.

    Args:
        gated: the network with its gates.
        small: what was cut from it.
        report: of the cut.
        tuned: the small network after more training; None where the schedule has none.
        phases: of the training.
        steps: epochs of each phase.
    """

    gated: nn.Module
    small: nn.Module
    report: sc.Report
    tuned: nn.Module | None
    phases: tuple[Phase, ...]
    steps: Mapping[str, tuple[Epoch, ...]]


def attached(settings: Settings, images: Images, steps: int | None = None) -> tuple[nn.Module, sc.Pruner]:
    """The network at full size with its gates, and their pruner, for a training of so many steps."""
    model = fresh(settings.net, settings.seed).to(settings.device)
    budget = settings.budget(steps)
    gates = gates_for(settings)
    when: When = "auto" if settings.conditional else False
    examples = (images.x[:1],)
    pruner = sc.attach(model, examples=examples, gates=gates, budget=budget, seed=settings.seed, conditional=when)
    return model, pruner


def pruned(settings: Settings, images: Images, watch: Watch) -> Pruned:
    """Trains with gates to the budget, cuts, and trains on.

    Args:
        settings: what to do.
        images: the data set that ``settings.data`` names, on ``settings.device``.
        watch: told about every epoch.
    """
    schedule, seed = settings.schedule(), settings.seed
    phases = [schedule.gated(GATED, seed)]
    gated, pruner = attached(settings, images, phases[0].steps(len(images.y)))
    steps = {GATED: train(gated, images, phases[0], watch, pruner)}
    small, report = pruner.finalize()
    tuned = None
    if schedule.epochs_after_cut:
        tuned = copy.deepcopy(small)
        phases.append(schedule.after_cut(TUNED, seed))
        steps[TUNED] = train(tuned, images, phases[-1], watch)
    return Pruned(gated, small, report, tuned, tuple(phases), steps)


def run(settings: Settings, images: Images, out: Path, watch: Watch) -> Outcome:
    """Trains dense, gated, compact and scratch networks, saves the compact one, measures them all.

    Args:
        settings: what to do.
        images: the data set that ``settings.data`` names.
        out: where the compact network is written, once everything is trained.
        watch: told about every epoch.

    Raises:
        SecateurError: the network cannot be gated or cut as asked, or the file that was written does not give the
            compact network's outputs again.
    """
    started = time.perf_counter()
    images = images.to(settings.device)
    schedule, seed = settings.schedule(), settings.seed

    def made(model: nn.Module) -> nn.Module:
        return model.to(settings.device)

    # Gated first: what cannot be gated or cut is refused before the longer training.
    found = pruned(settings, images, watch)
    gated, small, report, phases = found.gated, found.small, found.report, list(found.phases)
    steps = dict(found.steps)
    plan = sc.cut_of(small)
    assert plan is not None  # what finalize returns was cut
    difference = {
        str(dtype).removeprefix("torch."): largest_difference(gated, small, images.x_test, dtype)
        for dtype in (torch.float32, torch.float64)
    }
    models: dict[str, nn.Module] = {GATED: gated, COMPACT: small}
    if found.tuned is not None:
        models[TUNED] = found.tuned
    models[SCRATCH] = made(fresh_compact(settings.net, plan, seed))
    phases.append(schedule.whole(SCRATCH, seed))
    steps[SCRATCH] = train(models[SCRATCH], images, phases[-1], watch)
    models[DENSE] = made(fresh(settings.net, seed))
    phases.append(schedule.whole(DENSE, seed))
    steps[DENSE] = train(models[DENSE], images, phases[-1], watch)

    final = TUNED if schedule.epochs_after_cut else COMPACT
    sc.save(models[final], out)
    reloaded = sc.load(out, fresh(settings.net, seed)).to(settings.device)
    if largest_difference(reloaded, models[final], images.x_test, torch.float32) != 0:
        raise SecateurError(f"{out}: does not give back the outputs of the network that was saved; keep neither")

    row = network(settings.net)
    counted = row.kept({name: tuple(tensor.shape) for name, tensor in small.state_dict().items()})
    return Outcome(
        settings=settings,
        schedule={phase.name: phase.epochs for phase in phases},
        rows=_rows({name: models[name] for name in ORDER if name in models}, images),
        difference=difference,
        widths=dict(report.widths),
        flipped=report.flipped,
        counted=counted,
        pruned=row.pruned(counted) if row.pruned is not None else None,
        n_test=len(images.y_test),
        seconds=time.perf_counter() - started,
        step_ms={name: (steps[name][0].step_ms, steps[name][-1].step_ms) for name in ORDER if name in steps},
    )


def _rows(models: Mapping[str, nn.Module], images: Images) -> tuple[Row, ...]:
    measured = latencies(models, images.x_test[:LATENCY_BATCH])
    return tuple(
        Row(
            name,
            accuracy(model, images.x_test, images.y_test),
            n_params(model),
            n_macs(model, images.x_test[:1]),
            n_bytes(model),
            measured[name],
        )
        for name, model in models.items()
    )
