"""Accuracy against size: one task at many budgets, each network going on where the next larger one ended.

A point's gated network starts as that of the point before, weights, gates and all: the dense network first, which is
trained without gates. So units may open again, and no point pays for what the one before has learned. What is cut from
it, fine-tuned and measured goes nowhere else, and so the next point need not wait for that.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import secateur as sc
from secateur.errors import SecateurError
from secateur.pruning.pruner import Pruner
from secateur.recipes.checkpoint import Checkpoint
from secateur.recipes.data import load
from secateur.recipes.images import Images
from secateur.recipes.jobs import Job
from secateur.recipes.measure import Latency, accuracy, largest_difference, latencies, n_bytes, n_macs, n_params
from secateur.recipes.resume import keep, kept
from secateur.recipes.settings import Schedule, Settings
from secateur.recipes.task import LATENCY_BATCH, fresh, gates_for
from secateur.recipes.train import Phase, Watch, train
from secateur.structure.groups import Term

__all__ = ["Point", "Sweep", "check", "jobs_of", "points", "recorded", "timed", "with_latency"]

#: What a sweep can be over.
By = Literal["params", "macs", "latency"]
KINDS: tuple[By, ...] = ("params", "macs", "latency")


@dataclass(frozen=True)
class Sweep:
    """What a frontier is made of.

    Args:
        data: a name in ``DATA_SETS``.
        net: a name in ``NETWORKS``; "" for the data set's own.
        method: a name in ``secateur.gates.METHODS``.
        by: what the shares are of: ``"params"``, ``"macs"`` or ``"latency"``.
        shares: of the dense network's cost, each in (0, 1]; kept from large to small, 1 being the dense network.
        epochs: passes over the training images for each point, at least 2; 0 for the network's own number.
        seeds: each has a frontier of its own.
        device: torch's name of the device to train on.
        data_dir: directory of the data set's files.
        out: directory of records, checkpoints and networks.
        latency_terms: of ``with_latency``, where shares are of latency.

    Raises:
        SecateurError: names every setting that is unknown or outside its range.
    """

    data: str
    net: str
    method: str
    by: By
    shares: tuple[float, ...]
    epochs: int
    seeds: tuple[int, ...]
    device: str
    data_dir: Path | None
    out: Path
    latency_terms: tuple[Term, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.by not in KINDS:
            problems.append(f"by={self.by!r}; expected one of {', '.join(KINDS)}")
        if wrong := [f"{share:g}" for share in self.shares if not 0.0 < share <= 1.0]:
            problems.append(f"budgets {', '.join(wrong)} are outside (0, 1]; expected shares of the dense network")
        if not any(share < 1.0 for share in self.shares):
            problems.append("no budget under 1; expected some, such as 0.5,0.2,0.1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            problems.append(f"seeds {self.seeds}; expected at least one, each once")
        if problems:
            raise SecateurError("; ".join(problems))
        settings = [self.settings(seed) for seed in self.seeds]
        object.__setattr__(self, "net", settings[0].net)
        object.__setattr__(self, "shares", tuple(sorted({s for s in self.shares if s < 1.0}, reverse=True)))

    def settings(self, seed: int) -> Settings:
        """What the recipes take; its budget means nothing here."""
        return Settings(self.data, self.net, self.method, 1.0, None, self.epochs, seed, self.device)

    @property
    def schedule(self) -> Schedule:
        """How each point is trained."""
        return self.settings(self.seeds[0]).schedule()

    def name(self, share: float, seed: int) -> str:
        """Of a point, and of its files."""
        return f"{'dense' if share == 1.0 else f'{self.by}{share:g}'}-seed{seed}"

    def before(self, share: float) -> float:
        """The point that one starts from; 1 for the dense network."""
        return min((larger for larger in self.shares if larger > share), default=1.0)

    def of_point(self, share: float, seed: int) -> dict[str, Any]:
        """All that a point's record depends on, as plain values."""
        return {
            "data": self.data,
            "net": self.net,
            "method": self.method,
            "by": self.by if share < 1.0 else "",
            "share": share,
            "starts_from": self.before(share) if share < 1.0 else None,
            "schedule": dataclasses.asdict(self.schedule),
            "seed": seed,
        }

    def budget(self, share: float, steps: int | None = None) -> sc.Budget:
        """What a point is trained to."""
        params, macs, latency = (share if self.by == kind else None for kind in KINDS)
        return sc.Budget(keep_params=params, keep_macs=macs, latency=latency, steps=steps)


@dataclass(frozen=True)
class Point:
    """One network of a frontier.

    Args:
        share: what was asked for; 1 for the dense network.
        seed: of its frontier.
        accuracy: on the test images after the last epoch, in percent.
        at_cut: that right after the cut, before fine-tuning.
        params: numbers in all parameters.
        macs: multiply-accumulates that one image costs.
        bytes: of parameters and buffers as a ``.safetensors`` file.
        flipped: units that the projection onto the budget opened or closed at the end.
        difference: largest absolute difference of gated and compact outputs on the test images, in float64.
        seconds: wall time of cutting, fine-tuning and measuring.
        latency: of a batch of ``LATENCY_BATCH`` images, measured with all points' networks in turns; None before.
    """

    share: float
    seed: int
    accuracy: float
    at_cut: float
    params: int
    macs: int
    bytes: int
    flipped: int
    difference: float
    seconds: float
    latency: Latency | None = None


def with_latency(sweep: Sweep, images: Images) -> Sweep:
    """The sweep with the latency of its network, measured here or read from its directory.

    Args:
        sweep: by latency.
        images: on the sweep's device, as everywhere here.
    """
    net = fresh(sweep.net, 0).to(sweep.device)
    found = sc.latency_model(
        net,
        sc.trace(net, examples=(images.x[:1],)),
        examples=(images.x[:LATENCY_BATCH],),
        cache=sweep.out / "latency.json",
    )
    return replace(sweep, latency_terms=found.structure.latency_terms)


def check(sweep: Sweep, images: Images) -> None:
    """Refuse, before anything is trained, a budget that the network cannot reach and records of other settings.

    Raises:
        BudgetError: a share is out of reach.
        SecateurError: a record is of other settings.
    """
    pruner, _ = _attached(sweep, images, min(sweep.shares), sweep.seeds[0], steps=None)
    pruner.detach()
    for seed, share in _all(sweep):
        kept(sweep.out / f"{sweep.name(share, seed)}.json", sweep.of_point(share, seed))


def jobs_of(sweep: Sweep) -> list[Job]:
    """What is left to do: for each seed a chain of gated trainings, and beside it what is cut from each."""
    found: list[Job] = []
    for seed in sweep.seeds:
        wanted = [s for s in (1.0, *sweep.shares) if _found(sweep, s, seed) is None]
        for share in (1.0, *sweep.shares):
            if wanted and share >= min(wanted):
                name, start = sweep.name(share, seed), sweep.before(share)
                after = () if share == 1.0 else (f"{sweep.name(start, seed)} trained",)
                found.append(Job(f"{name} trained", functools.partial(_trained, sweep, share, seed), after))
                if share in wanted:
                    found.append(Job(name, functools.partial(_cut, sweep, share, seed), (f"{name} trained",)))
    return found


def points(sweep: Sweep) -> list[Point]:
    """The points that are recorded, by seed, from dense to small."""
    found = ((share, seed, _found(sweep, share, seed)) for seed, share in _all(sweep))
    return [Point(share, seed, **one) for share, seed, one in found if one is not None]


def timed(sweep: Sweep, found: Sequence[Point], images: Images) -> list[Point]:
    """The points with the latencies of their networks, measured in this process, turn by turn."""
    models: dict[str, nn.Module] = {}
    for point in found:
        name = sweep.name(point.share, point.seed)
        models[name] = sc.load(sweep.out / f"{name}.safetensors", fresh(sweep.net, point.seed)).to(sweep.device)
    measured = latencies(models, images.x_test[:LATENCY_BATCH])
    return [replace(point, latency=measured[sweep.name(point.share, point.seed)]) for point in found]


def recorded(sweep: Sweep) -> dict[str, Any]:
    """The settings of a sweep as plain values."""
    return {
        "data": sweep.data,
        "net": sweep.net,
        "method": sweep.method,
        "by": sweep.by,
        "shares": sweep.shares,
        "schedule": dataclasses.asdict(sweep.schedule),
        "seeds": sweep.seeds,
        "threads": torch.get_num_threads(),
    }


def _all(sweep: Sweep) -> Iterator[tuple[int, float]]:
    for seed in sweep.seeds:
        for share in (1.0, *sweep.shares):
            yield seed, share


def _found(sweep: Sweep, share: float, seed: int) -> dict[str, Any] | None:
    return kept(sweep.out / f"{sweep.name(share, seed)}.json", sweep.of_point(share, seed))


@functools.lru_cache(maxsize=1)
def _images(data: str, data_dir: Path | None, device: str) -> Images:
    return load(data, data_dir).to(device)


def _attached(sweep: Sweep, images: Images, share: float, seed: int, steps: int | None) -> tuple[Pruner, nn.Module]:
    """A gated network for a point, as it is before the point before is loaded into it."""
    model = fresh(sweep.net, seed).to(sweep.device)
    examples = (images.x[:1],)
    pruner = sc.attach(
        model,
        structure=replace(sc.trace(model, examples=examples), latency_terms=sweep.latency_terms),
        examples=examples,
        gates=gates_for(sweep.settings(seed)),
        budget=sweep.budget(share, steps),
        seed=seed,
    )
    return pruner, model


def _phase(sweep: Sweep, share: float, seed: int) -> Phase:
    name = sweep.name(share, seed)
    if share == 1.0:
        return sweep.schedule.whole(name, seed)
    # Nothing is removed on the way: what one point closes the next may open again.
    return replace(sweep.schedule.gated(name, seed), checks=0)


def _checkpoint(sweep: Sweep, share: float, seed: int, stage: str = "trained") -> Checkpoint:
    return Checkpoint(sweep.out / f"{sweep.name(share, seed)}.{stage}.pt")


def _state(sweep: Sweep, share: float, seed: int) -> Mapping[str, torch.Tensor]:
    """The parameters and buffers at the end of a point's training."""
    checkpoint = _checkpoint(sweep, share, seed)
    state = checkpoint.load(_phase(sweep, share, seed))
    if state is None:
        raise SecateurError(
            f"{checkpoint.path} is gone; delete the records beside it that start from it, and start again"
        )
    model: Mapping[str, torch.Tensor] = state["model"]
    return model


def _trained(sweep: Sweep, share: float, seed: int, watch: Watch) -> None:
    """Train the dense network, or the gated one of a point on from where the point before ended."""
    images = _images(sweep.data, sweep.data_dir, sweep.device)
    phase, checkpoint = _phase(sweep, share, seed), _checkpoint(sweep, share, seed)
    if share == 1.0:
        train(fresh(sweep.net, seed).to(sweep.device), images, phase, watch, checkpoint=checkpoint)
        return
    pruner, model = _attached(sweep, images, share, seed, phase.steps(len(images.y)))
    # The dense network's names are taken by a gated one, too; its gates then start open.
    model.load_state_dict(_state(sweep, sweep.before(share), seed))
    train(model, images, phase, watch, pruner, checkpoint=checkpoint)


def _cut(sweep: Sweep, share: float, seed: int, watch: Watch) -> None:
    """Cut what a point has trained, fine-tune, measure and record it."""
    started = time.perf_counter()
    images, schedule = _images(sweep.data, sweep.data_dir, sweep.device), sweep.schedule
    flipped, difference = 0, 0.0
    tuning: Checkpoint | None = None
    if share == 1.0:
        model = fresh(sweep.net, seed).to(sweep.device)
        model.load_state_dict(_state(sweep, share, seed))
        at_cut = accuracy(model, images.x_test, images.y_test)
    else:
        pruner, gated = _attached(sweep, images, share, seed, None)
        gated.load_state_dict(_state(sweep, share, seed))
        small, report = pruner.finalize()
        flipped, difference = report.flipped, largest_difference(gated, small, images.x_test, torch.float64)
        at_cut = accuracy(small, images.x_test, images.y_test)
        model = copy.deepcopy(small)
        if schedule.epochs_after_cut:
            tuning = _checkpoint(sweep, share, seed, "tuned")
            train(model, images, schedule.after_cut(f"{sweep.name(share, seed)} tuned", seed), watch, checkpoint=tuning)
    name = sweep.name(share, seed)
    sc.save(model.eval(), sweep.out / f"{name}.safetensors")
    point = Point(
        share=share,
        seed=seed,
        accuracy=accuracy(model, images.x_test, images.y_test),
        at_cut=at_cut,
        params=n_params(model),
        macs=n_macs(model, images.x_test[:1]),
        bytes=n_bytes(model),
        flipped=flipped,
        difference=difference,
        seconds=time.perf_counter() - started,
    )
    found = {key: value for key, value in dataclasses.asdict(point).items() if key not in ("share", "seed", "latency")}
    keep(sweep.out / f"{name}.json", sweep.of_point(share, seed), found)
    if tuning is not None:
        tuning.path.unlink(missing_ok=True)
