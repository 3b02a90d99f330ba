"""One run of an experiment from the dense network to its record; killed at any point, it goes on from there."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import SecateurError
from secateur.pruning.pruner import Pruner
from secateur.recipes.checkpoint import Checkpoint
from secateur.recipes.data import folds
from secateur.recipes.images import Images
from secateur.recipes.measure import Latency, accuracy, n_macs, n_params, step_ratios
from secateur.recipes.networks import network
from secateur.recipes.papers.attached import attached
from secateur.recipes.papers.objectives import l0_penalty, learning, soft_targets
from secateur.recipes.papers.recipe import Job
from secateur.recipes.papers.result import Error, Result
from secateur.recipes.task import fresh, fresh_compact
from secateur.recipes.train import Epoch, Objective, Watch, optimizer_step, train

__all__ = ["run", "validation_split"]

#: Parts of the training images, of which one is held out for choosing hyper-parameters: 5,000 of 60,000.
PARTS = 12
#: Seed of the split, the same for all runs.
SPLIT_SEED = 0
#: Training steps of each network that are timed.
STEPS = 20


def validation_split(images: Images, part: int) -> Images:
    """The training images alone: one stratified part of them as the held-out set, the others to train on.

    Args:
        images: a data set; its test images are not looked at.
        part: which of ``PARTS``; another one gives another held-out set.
    """
    held_out = torch.zeros(len(images.y), dtype=torch.bool)
    held_out[torch.from_numpy(folds(images.y.cpu().numpy(), PARTS, SPLIT_SEED)[part % PARTS])] = True
    held_out = held_out.to(images.y.device)
    return replace(
        images, x=images.x[~held_out], y=images.y[~held_out], x_test=images.x[held_out], y_test=images.y[held_out]
    )


def run(job: Job, images: Images, work: Path, watch: Watch) -> tuple[Result, dict[str, tuple[Epoch, ...]]]:
    """Trains the dense, gated, compact and scratch networks of a job, and measures them.

    Args:
        job: what to do.
        images: the data set that the recipe names, on the device to train on.
        work: directory for checkpoints; those of the job are gone at its end, those of the dense network, which all
            methods share, stay.
        watch: told about every epoch that is trained now.

    Returns:
        The record, and all epochs by phase.
    """
    recipe = job.recipe
    images = _prepared(images, job)
    own = work / job.title
    bench = _Bench(job, images, own, watch)
    dense = bench.made(fresh(recipe.net, job.seed))
    shared = work / job.dense_title
    bench.train("dense", dense, learning(recipe, images, dropout=recipe.dropout), place=shared)
    soft = None
    if recipe.distillation is not None:
        soft = soft_targets(dense, images.x, recipe.distillation)
    taught = learning(recipe, images, dropout=recipe.noise, soft=soft)

    gated = bench.made(fresh(recipe.net, job.seed))
    pruner = attached(job, gated, images)
    beside = None
    if job.point.lambdas:
        beside = l0_penalty(pruner, job.point.lambdas, len(images.y))
    bench.train("gated", gated, replace(taught, beside=beside), pruner)
    small, report = pruner.finalize()
    plan = sc.cut_of(small)
    assert plan is not None  # what finalize returns was cut
    errors = {"compact": _error(small, images)}
    final, last_phase = small, "gated"
    if recipe.tuned is not None:
        final, last_phase = copy.deepcopy(small), "tuned"
        bench.train("tuned", final, taught)
    scratch = bench.made(fresh_compact(recipe.net, plan, job.seed))
    bench.train("scratch", scratch, taught)

    # Another one with all of its units, for the time that a step took at the start.
    whole = attached(job, bench.made(fresh(recipe.net, job.seed)), images)
    row = network(recipe.net)
    kept = row.kept({name: tuple(tensor.shape) for name, tensor in small.state_dict().items()})
    one = images.x_test[:1]
    result = Result(
        experiment=recipe.experiment,
        recipe=recipe.name,
        version=recipe.version,
        method=job.method,
        settings=dict(recipe.methods[job.method]),
        point=job.point.name,
        seed=job.seed,
        validated=job.validated,
        schedule=recipe.settings(),
        kept=kept,
        pruned=row.pruned(kept) if row.pruned is not None else None,
        widths=dict(report.widths),
        flipped=report.flipped,
        params=n_params(final),
        macs=n_macs(final, one),
        dense_params=n_params(dense),
        dense_macs=n_macs(dense, one),
        errors={
            "dense": bench.error("dense"),
            "gated": bench.error("gated"),
            "compact": Error(errors["compact"], errors["compact"]),
            "final": Error(_error(final, images), bench.error(last_phase).best),
            "scratch": bench.error("scratch"),
        },
        difference=report.difference_float64,
        n_test=len(images.y_test),
        epochs={name: len(epochs) for name, epochs in bench.epochs.items()},
        seconds=bench.seconds,
        step_ratio=_ratios(
            {"dense": dense, "compact": final}, {"gated": whole, "shrunk": pruner}, images, recipe.gated.batch, taught
        ),
    )
    shutil.rmtree(own, ignore_errors=True)
    return result, bench.epochs


class _Bench:
    """Trains the phases of one job, each with a checkpoint of its own, and notes their epochs."""

    def __init__(self, job: Job, images: Images, own: Path, watch: Watch) -> None:
        self.job, self.images, self.own, self.watch = job, images, own, watch
        self.epochs: dict[str, tuple[Epoch, ...]] = {}
        self.seconds: dict[str, float] = {}

    def made(self, model: nn.Module) -> nn.Module:
        """The model where the images are; convolutional ones with the channels last, which is faster."""
        model = model.to(self.images.x.device)
        return model.to(memory_format=torch.channels_last) if self.job.recipe.half else model  # type: ignore[call-overload]

    def train(
        self,
        name: str,
        model: nn.Module,
        objective: Objective,
        pruner: Pruner | None = None,
        place: Path | None = None,
    ) -> None:
        """One phase, from its checkpoint where there is one."""
        directory = self.own if place is None else place
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SecateurError(f"cannot make {directory}: {error.strerror or error}; choose another --work") from error
        started = time.perf_counter()
        self.epochs[name] = train(
            model,
            self.images,
            self.job.phase(name),
            self.watch,
            pruner,
            objective=objective,
            error=lambda model: _error(model, self.images),
            checkpoint=Checkpoint(directory / f"{name}.pt"),
        )
        self.seconds[name] = round(time.perf_counter() - started, 1)

    def error(self, name: str) -> Error:
        """Of the network that a phase trained."""
        errors = [epoch.error for epoch in self.epochs[name] if epoch.error is not None]
        return Error(errors[-1], min(errors))


def _prepared(images: Images, job: Job) -> Images:
    """The images of a job: its split, its scale of pixels, its memory format."""
    if job.validated:
        images = validation_split(images, job.seed)
    x, x_test = images.x, images.x_test
    if job.recipe.pixels == "unit":
        low, high = x.min(), x.max()
        x, x_test = ((part - low) / (high - low) for part in (x, x_test))
    if job.recipe.half:
        x, x_test = (part.contiguous(memory_format=torch.channels_last) for part in (x, x_test))
    return replace(images, x=x, x_test=x_test)


def _error(model: nn.Module, images: Images) -> float:
    return 100.0 - accuracy(model, images.x_test, images.y_test)


def _ratios(
    plain: dict[str, nn.Module],
    gated: dict[str, Pruner],
    images: Images,
    batch: int,
    objective: Objective,
) -> dict[str, Latency]:
    """Times of training steps over that of the dense network, on one batch."""
    index = torch.arange(min(batch, len(images.y)), device=images.y.device)

    def stepping(model: nn.Module, pruner: Pruner | None) -> Callable[[], None]:
        parameters = list(model.parameters())
        groups: Sequence[dict[str, object]] = [{"params": parameters}]
        optimizer = torch.optim.AdamW(groups if pruner is None else pruner.param_groups(lr=0.0, gate_lr=0.0))
        model.train()

        def step() -> None:
            def closure() -> Tensor:
                return objective.loss(model, index)

            optimizer_step(closure, [optimizer], pruner).item()  # waits for an accelerator

        return step

    steps = {name: stepping(model, None) for name, model in plain.items()}
    steps |= {name: stepping(pruner.model, pruner) for name, pruner in gated.items()}
    return step_ratios(steps, "dense", STEPS)
