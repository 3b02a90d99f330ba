"""Several gate methods side by side on one task at one budget, over seeds and folds.

Every run leaves one record; what is recorded is not trained again.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from secateur.errors import SecateurError
from secateur.pruning.pruner import Pruner
from secateur.recipes.data import digits
from secateur.recipes.images import Images
from secateur.recipes.measure import Latency, accuracy, largest_difference, n_macs, n_params, step_ratios
from secateur.recipes.resume import keep, kept
from secateur.recipes.settings import Settings
from secateur.recipes.task import attached, fresh, pruned
from secateur.recipes.train import Watch, optimizer_step, train

__all__ = ["DENSE", "HEADINGS", "Comparison", "Line", "compare", "page", "table_rows"]

#: The row of the network without gates.
DENSE = "dense"
#: Steps that are timed of each method, and passes that are counted.
ROUNDS = 30
#: Of the table, which fits 80 columns.
HEADINGS = ("method", "acc. %", "dev.", "runs", "params", "share", "MACs", "step time", "passes")


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        data: a name in ``DATA_SETS``.
        net: a name in ``NETWORKS``; "" for the data set's own.
        methods: names in ``secateur.gates.METHODS``, each once.
        seeds: of initial weights, order of examples and draws, each once.
        folds: 1 for the data set's own test set; for the digits, n for each of n folds as the test set in turn.
        keep_params: share of the dense parameters to keep, in (0, 1], or None.
        keep_macs: share of the dense multiply-accumulates to keep, in (0, 1], or None.
        epochs: of every network, fine-tuning included; 0 for the network's own number.
        device: torch's name of the device to train on.

    Raises:
        SecateurError: names every setting that is unknown, out of range, or does not fit another one.
    """

    data: str
    net: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    folds: int = 1
    keep_params: float | None = None
    keep_macs: float | None = None
    epochs: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        problems = []
        for name, values in (("methods", self.methods), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                problems.append(f"{name} {values}; expected at least one, each once")
        if self.folds < 1 or (self.folds > 1 and self.data != "digits"):
            problems.append(f"folds={self.folds}; expected 1, or more for the digits, which come without a test set")
        if problems:
            raise SecateurError("; ".join(problems))
        found = [self.settings(method, self.seeds[0]) for method in self.methods]
        object.__setattr__(self, "net", found[0].net)

    def settings(self, method: str, seed: int) -> Settings:
        """What the recipes take; the dense network is trained by those of the first method."""
        name = self.methods[0] if method == DENSE else method
        return Settings(self.data, self.net, name, self.keep_params, self.keep_macs, self.epochs, seed, self.device)

    def runs(self) -> Iterator[tuple[str, int, int]]:
        """Method, seed and fold of every run; all methods of a seed before the next seed."""
        for seed in self.seeds:
            for fold in range(self.folds):
                for method in (DENSE, *self.methods):
                    yield method, seed, fold

    def of_run(self, method: str, seed: int, fold: int) -> dict[str, Any]:
        """All that a run's record depends on, as plain values."""
        budget = {} if method == DENSE else {"keep_params": self.keep_params, "keep_macs": self.keep_macs}
        return {
            "data": self.data,
            "net": self.net,
            "method": method,
            "seed": seed,
            "fold": [fold, self.folds],
            "schedule": dataclasses.asdict(self.settings(method, seed).schedule()),
            **budget,
        }


@dataclass(frozen=True)
class Line:
    """One method over all its runs.

    Args:
        method: its name, or ``"dense"``.
        accuracies: on the test images after the last epoch, in percent, one for each run.
        params: mean of the numbers in all parameters.
        macs: mean of the multiply-accumulates that one image costs.
        step: time of a training step with gates over that of the dense network's; None for the dense network.
        passes: mean of the forward passes that a training step makes.
        difference: largest absolute difference of gated and compact outputs over all runs, in float64.
    """

    method: str
    accuracies: tuple[float, ...]
    params: float
    macs: float
    step: Latency | None
    passes: float
    difference: float

    @property
    def mean(self) -> float:
        """Of the accuracies."""
        return statistics.mean(self.accuracies)

    @property
    def deviation(self) -> float:
        """Of the accuracies; 0 for a single run."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def compare(
    asked: Comparison, load: Callable[[], Images], out: Path, watch: Watch, told: Callable[[str], None]
) -> tuple[Line, ...]:
    """Train what is not recorded yet, and gather the table.

    Args:
        asked: what is compared.
        load: gives the data set.
        out: directory of the records.
        watch: told about every epoch.
        told: told of every run that is finished or was recorded already.

    Raises:
        SecateurError: a record is of other settings; nothing is trained then.
    """
    known = {run: kept(_file(out, *run), asked.of_run(*run)) for run in asked.runs()}
    steps = kept(out / "steps.json", _of_steps(asked))
    images = load().to(asked.device) if steps is None or None in known.values() else None
    for run, found in known.items():
        if found is None:
            assert images is not None
            known[run] = _train(asked, *run, _of_fold(asked, images, run[2]), watch)
            keep(_file(out, *run), asked.of_run(*run), known[run] or {})
        told(f"{_file(out, *run).stem}: {'recorded' if found is not None else 'trained'}")
    if steps is None:
        assert images is not None
        steps = _steps(asked, images)
        keep(out / "steps.json", _of_steps(asked), steps)
    lines = []
    for method in (DENSE, *asked.methods):
        rows = [found for run, found in known.items() if run[0] == method and found is not None]
        lines.append(
            Line(
                method,
                tuple(row["accuracy"] for row in rows),
                statistics.mean(row["params"] for row in rows),
                statistics.mean(row["macs"] for row in rows),
                None if method == DENSE else Latency(*steps["ratios"][method]),
                steps["passes"][method],
                max(row["difference"] for row in rows),
            )
        )
    return tuple(lines)


def table_rows(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """The cells of the table, under ``HEADINGS``; shares, of parameters and MACs, are of the dense network."""
    dense = lines[0]
    return [
        (
            line.method,
            f"{line.mean:.2f}",
            f"{line.deviation:.2f}",
            f"{len(line.accuracies)}",
            f"{line.params:,.0f}",
            f"{line.params / dense.params:.1%}",
            f"{line.macs / dense.macs:.1%}",
            "1" if line.step is None else f"{line.step.median:.2f} ({line.step.low:.2f}-{line.step.high:.2f})",
            f"{line.passes:.2f}",
        )
        for line in lines
    ]


def page(asked: Comparison, lines: Sequence[Line], command: str) -> str:
    """A Markdown page of the comparison, from its records alone."""
    shares = {"parameters": asked.keep_params, "MACs": asked.keep_macs}
    budget = " and ".join(f"{share:.4g} of the {kind}" for kind, share in shares.items() if share is not None)
    epochs = asked.settings(DENSE, asked.seeds[0]).schedule().epochs
    tests = f"each of {asked.folds} folds in turn as the test set" if asked.folds > 1 else "one test set"
    best = max(lines[1:], key=lambda line: line.mean)
    rows = "\n".join("| " + " | ".join(row) + " |" for row in table_rows(lines))
    others = ", ".join(f"{best.mean - line.mean:.2f} over `{line.method}`" for line in lines[1:] if line is not best)
    apart = max(line.difference for line in lines)
    seeds = ", ".join(map(str, asked.seeds))
    return f"""# Methods on {asked.data}, {asked.net}

Every method to {budget}, {epochs} epochs with fine-tuning, seeds {seeds}, {tests}.
Accuracy is that after the last epoch, in percent; its deviation is that of single runs. A step's time is that with
gates at full size over the dense network's: processor time, taken in turns in one process, median and quartiles.
Share and MACs are of the dense network's parameters and multiply-accumulates; passes, forward passes of one step.

| {" | ".join(HEADINGS)} |
| --- |{" ---: |" * (len(HEADINGS) - 1)}
{rows}

Most accurate: `{best.method}`{", by " + others if others else ""}. Largest output difference of gated and compact:
{apart:.1e} in float64.

```
{command}
```
"""


def _file(out: Path, method: str, seed: int, fold: int) -> Path:
    return out / f"{method}-seed{seed}-fold{fold}.json"


def _of_fold(asked: Comparison, images: Images, fold: int) -> Images:
    return images if asked.folds == 1 else digits(fold, asked.folds).to(asked.device)


def _train(asked: Comparison, method: str, seed: int, fold: int, images: Images, watch: Watch) -> dict[str, Any]:
    """One run; what its record holds."""
    settings = asked.settings(method, seed)
    difference, flipped = 0.0, 0
    if method == DENSE:
        model = fresh(settings.net, seed).to(settings.device)
        train(model, images, settings.schedule().whole(DENSE, seed), watch)
    else:
        found = pruned(settings, images, watch)
        difference = largest_difference(found.gated, found.small, images.x_test, torch.float64)
        flipped = found.report.flipped
        model = found.small if found.tuned is None else found.tuned
    return {
        "accuracy": accuracy(model, images.x_test, images.y_test),
        "params": n_params(model),
        "macs": n_macs(model, images.x_test[:1]),
        "difference": difference,
        "flipped": flipped,
        "n_test": len(images.y_test),
    }


def _of_steps(asked: Comparison) -> dict[str, Any]:
    return {"data": asked.data, "net": asked.net, "methods": list(asked.methods), "device": asked.device}


def _steps(asked: Comparison, images: Images) -> dict[str, Any]:
    """Time of a training step of each method over the dense network's, and its forward passes."""
    seed = asked.seeds[0]
    batch = asked.settings(DENSE, seed).schedule().batch
    x, y = images.x[:batch], images.y[:batch]
    counts: dict[str, int] = {}

    def stepping(name: str, model: nn.Module, pruner: Pruner | None) -> Callable[[], object]:
        lr = asked.settings(name, seed).schedule().lr
        groups = list(model.parameters()) if pruner is None else pruner.param_groups(lr=lr)
        optimizer = torch.optim.AdamW(groups, lr=lr)

        def closure() -> torch.Tensor:
            counts[name] = counts.get(name, 0) + 1
            return F.cross_entropy(model(x), y)

        def step() -> None:
            optimizer_step(closure, [optimizer], pruner)
            if x.is_cuda:
                torch.cuda.synchronize()

        model.train()
        return step

    made = {DENSE: stepping(DENSE, fresh(asked.net, seed).to(asked.device), None)}
    for method in asked.methods:
        made[method] = stepping(method, *attached(asked.settings(method, seed), images))
    done: dict[str, int] = dict.fromkeys(made, 0)

    def counted(name: str, step: Callable[[], object]) -> Callable[[], object]:
        def one() -> None:
            done[name] += 1
            step()

        return one

    ratios = step_ratios({name: counted(name, step) for name, step in made.items()}, DENSE, ROUNDS)
    return {
        "ratios": {name: [ratio.median, ratio.low, ratio.high] for name, ratio in ratios.items()},
        "passes": {name: counts[name] / done[name] for name in made},
    }
