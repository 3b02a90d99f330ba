"""The page of all records: the papers' rows and ours side by side. Nothing in it is typed by hand."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.recipes.networks import network
from secateur.recipes.papers.experiments import EXPERIMENTS
from secateur.recipes.papers.published import BESIDE_DENSE, PUBLISHED, READING_MARGIN, READINGS, TARGETS, Target
from secateur.recipes.papers.recipe import Job, Point, Recipe
from secateur.recipes.papers.result import Result, is_of, read_result
from secateur.recipes.train import Phase

__all__ = ["Row", "collected", "one_line", "page_of", "rows_of"]

HEADINGS = (
    "network",
    "kept",
    "pruned %",
    "parameters %",
    "MACs %",
    "error % (last)",
    "best epoch",
    "same widths from scratch",
    "dense",
    "step, times dense",
    "seeds",
)
#: Seeds that a mean is asked of.
SEEDS = 3
#: Errors are hundredths of points; what is less than this is rounding of their mean.
TIE = 1e-9


@dataclass(frozen=True)
class Row:
    """All seeds of one recipe, method and point.

    Args:
        results: one for each seed, in order.
    """

    results: tuple[Result, ...]

    @property
    def first(self) -> Result:
        """The record of the first seed, for what all share."""
        return self.results[0]

    def mean(self, network: str, which: str = "last") -> float:
        """Mean error of one of the networks."""
        return statistics.fmean(getattr(result.errors[network], which) for result in self.results)

    @property
    def deviation(self) -> float:
        """Standard deviation of the compact network's last error; 0 for one seed."""
        errors = [result.errors["final"].last for result in self.results]
        return statistics.stdev(errors) if len(errors) > 1 else 0.0

    def of(self, seeds: Collection[int]) -> Row:
        """The same with some of its seeds alone."""
        return Row(tuple(result for result in self.results if result.seed in seeds))

    @property
    def seeds(self) -> set[int]:
        """All that were recorded."""
        return {result.seed for result in self.results}

    @property
    def kept(self) -> str:
        """Live units of each seed, as the papers list them; else the mean width of each group."""
        if any(result.kept for result in self.results):
            return "; ".join("-".join(map(str, result.kept)) for result in self.results)
        widths = ([result.widths[name][0] for result in self.results] for name in self.first.widths)
        return "-".join(f"{statistics.fmean(group):.0f}" for group in widths)

    @property
    def pruned(self) -> float | None:
        """Mean prune rate by the papers' formula."""
        rates = [result.pruned for result in self.results if result.pruned is not None]
        return statistics.fmean(rates) if rates else None

    @property
    def params(self) -> float:
        """Mean share of the parameters that is left."""
        return statistics.fmean(result.params / result.dense_params for result in self.results)

    @property
    def macs(self) -> float:
        """Mean share of the multiply-accumulates that is left."""
        return statistics.fmean(result.macs / result.dense_macs for result in self.results)


def collected(directory: Path) -> tuple[list[Result], list[str]]:
    """All records of recipes as they are now, and what was left out and why.

    Raises:
        SecateurError: a file is no record.
    """
    found, notes = [], []
    for path in sorted(directory.glob("*.json")):
        result = read_result(path)
        if reason := _other(result):
            notes.append(f"{path.name} is left out: it was made with {reason}")
        elif result.validated:
            notes.append(f"{path.name} is left out: it was judged on training images")
        else:
            found.append(result)
    return found, notes


def _other(result: Result) -> str:
    recipe = EXPERIMENTS.get(result.experiment, {}).get(result.recipe)
    if recipe is None or result.method not in recipe.methods:
        return f"the recipe {result.recipe!r} of {result.experiment!r} with {result.method}, which there is no more"
    try:
        job = Job(recipe, result.method, Point.named(result.point), result.seed)
    except SecateurError as error:
        return f"what cannot be asked for: {error}"
    return is_of(result, job)


def rows_of(results: Iterable[Result], experiment: str) -> list[Row]:
    """The rows of one experiment, in the order of its recipes, methods and sizes."""
    by_row: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
    for result in results:
        if result.experiment == experiment:
            by_row[result.recipe, result.method, result.point].append(result)
    recipes = EXPERIMENTS[experiment]
    order = {(name, method): i for name in recipes for i, method in enumerate(recipes[name].methods)}

    def place(row: Row) -> tuple[bool, float, int]:
        size = round(statistics.fmean(one.params for one in row.results) / row.first.dense_params, 3)
        return row.first.recipe == "paper", -size, order[row.first.recipe, row.first.method]

    rows = [Row(tuple(sorted(same, key=lambda one: one.seed))) for same in by_row.values()]
    return sorted(rows, key=place)


def one_line(result: Result) -> str:
    """A run in one line, for a terminal."""
    kept = "-".join(map(str, result.kept)) or f"{result.params:,} parameters"
    rate = "" if result.pruned is None else f", {result.pruned:.2%} pruned"
    errors = ", ".join(f"{name} {error.last:.2f}%" for name, error in result.errors.items())
    held_out = "held-out training images" if result.validated else "test images"
    return f"{result.method} {result.point} seed {result.seed}: {kept}{rate}; error on {held_out}: {errors}"


def page_of(results: Sequence[Result], notes: Sequence[str], drawing: str) -> str:
    """The Markdown page.

    Args:
        results: records of the recipes as they are now.
        notes: what was left out.
        drawing: file of the picture, beside the page.
    """
    lines = [
        "# The papers' tables",
        "",
        INTRODUCTION,
        "",
        f"![Error against parameters and multiply-accumulates]({drawing})",
        "",
    ]
    for experiment in EXPERIMENTS:
        if rows := rows_of(results, experiment):
            lines += [f"## {experiment}", "", *_recipes(rows), *_table(rows, experiment), *_judged(rows, experiment)]
    lines += ["## How to read it", "", READING, ""]
    if notes:
        lines += ["## Left out", "", *(f"- {note}." for note in notes), ""]
    lines += ["```", "secateur reproduce --report", "```", ""]
    return "\n".join(lines)


def _recipes(rows: Sequence[Row]) -> list[str]:
    lines = []
    for name in dict.fromkeys(row.first.recipe for row in rows):
        recipe = EXPERIMENTS[rows[0].first.experiment][name]
        parts = _described(recipe)
        lines += [f"- *{name}*, version {recipe.version}: {', '.join(parts)}."]
        for share in recipe.smaller:
            others = [part for part in _described(recipe.at(Point(keep_params=share))) if part not in parts]
            lines += [f"  Where {share:.2%} or less is to stay: {', '.join(others)}."]
        made = [f"{method} ({_settings(own)})" for method, own in recipe.methods.items() if own]
        lines += [f"  Not at their defaults: {', '.join(made)}."] if made else []
    return [*lines, ""]


def _settings(own: Mapping[str, Any]) -> str:
    """Settings in words; those of some groups alone after the groups' name."""

    def said(value: object) -> str:
        if isinstance(value, Mapping):
            return f": {_settings(value)}"
        return f" {value:.4g}" if isinstance(value, float) else f" {value}"

    return ", ".join(name + said(value) for name, value in own.items())


def _described(recipe: Recipe) -> list[str]:
    phases = [("dense", recipe.dense), ("with gates", recipe.gated), ("after the cut", recipe.tuned)]
    parts = [f"{phase.epochs} epochs {name} ({_learned(phase)})" for name, phase in phases if phase is not None]
    if recipe.distillation is not None:
        taught = recipe.distillation
        parts.append(f"learns from the dense network at temperature {taught.temperature:g}, share {taught.share:g}")
    for whose, rates in (("the dense network", recipe.dropout), ("the others", recipe.noise)):
        if rates:
            parts.append(f"dropout of {whose} " + ", ".join(f"{rate:g} before {at}" for at, rate in rates.items()))
    for part, size in recipe.per.items():
        parts.append(f"{part} at {_settings(size)} or less")
    if recipe.gated.checks:
        parts.append(f"units that stay closed are removed while gates train, at {recipe.gated.checks} checks")
    if recipe.gated.average:
        parts.append(f"parameters averaged with a memory of {recipe.gated.average:g}")
    return parts


def _learned(phase: Phase) -> str:
    """How the weights learn."""
    decay = f", decay {phase.weight_decay:g}" if phase.weight_decay else ""
    return f"{phase.optimizer} at {phase.lr:g}, batch {phase.batch}{decay}"


def _table(rows: Sequence[Row], experiment: str) -> list[str]:
    net = network(rows[0].first.schedule["net"])
    lines = [
        f"| {' | '.join(HEADINGS)} |",
        f"| --- | --- |{' ---: |' * (len(HEADINGS) - 2)}",
    ]
    for published in PUBLISHED.get(experiment, ()):
        rate = f"{100 * net.pruned(published.kept):.2f}" if published.kept and net.pruned is not None else "-"
        kept = "-".join(map(str, published.kept)) or "-"
        lines.append(
            f"| {published.name} (paper) | {kept} | {rate} | - | - | - | {published.error:.1f} | - | - | - | - |"
        )
    for row in rows:
        rate = "-" if row.pruned is None else f"{100 * row.pruned:.2f}"
        spread = f" ± {row.deviation:.2f}" if len(row.results) > 1 else ""
        cells = [
            f"**{row.first.method}**, {row.first.recipe}, {row.first.point}",
            row.kept,
            rate,
            f"{100 * row.params:.2f}",
            f"{100 * row.macs:.2f}",
            f"**{row.mean('final'):.2f}**{spread}",
            f"{row.mean('final', 'best'):.2f}",
            f"{row.mean('scratch'):.2f}",
            f"{row.mean('dense'):.2f}",
            f"{statistics.median(result.step_ratio['gated'].median for result in row.results):.2f}",
            str(len(row.results)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _judged(rows: Sequence[Row], experiment: str) -> list[str]:
    ours = [row for row in rows if row.first.recipe == "ours"]
    targets = TARGETS.get(experiment, ())
    if not ours or not (targets or experiment in BESIDE_DENSE):
        return []
    lines = ["| asked for | of | found | |", "| --- | --- | --- | --- |"]
    for target in targets:
        asked = f"at least {target.pruned:.2%} pruned at {target.error:g}% error or less"
        of = f"{target.method} ({target.source})" if target.method else "the best method"
        found, verdict = _met(ours, target)
        lines.append(f"| {asked} | {of} | {found} | {verdict} |")
    lines += [*_beside_dense(ours, experiment), *_readings(ours)]
    return [*lines, ""]


def _beside_dense(rows: Sequence[Row], experiment: str) -> list[str]:
    """The least that any method of a size errs more than the dense network."""
    if experiment not in BESIDE_DENSE:
        return []
    share, margin = BESIDE_DENSE[experiment]
    asked = f"at most {margin:g} points above dense at {share:.0%} of the MACs or less"
    fitting = [row for row in rows if row.macs <= share]
    if not fitting:
        return [f"| {asked} | the best method | no run at this size yet | open |"]
    best, over = _best(fitting, lambda row: row.mean("final") - row.mean("dense") - margin)
    found = f"{best.first.method}: {best.mean('final'):.2f}% and {best.mean('dense'):.2f}%"
    return [f"| {asked} | the best method | {found} | {_verdict(over, best)} |"]


def _readings(rows: Sequence[Row]) -> list[str]:
    """The readings beside hard concrete gates at the same size, by the seeds of both, which share a dense network."""
    by_name = {(row.first.method, row.first.point): row for row in rows}
    lines = []
    for (method, point), row in by_name.items():
        other = by_name.get(("hard-concrete", point))
        if method not in READINGS or other is None or not (both := row.seeds & other.seeds):
            continue
        reading, gates = row.of(both), other.of(both)
        above = reading.mean("final") - gates.mean("final")
        asked = f"at {point} at most {READING_MARGIN:g} points above hard concrete gates"
        found = f"{reading.mean('final'):.2f}% and {gates.mean('final'):.2f}%"
        lines.append(f"| {asked} | {method} | {found} | {_verdict(above - READING_MARGIN, reading)} |")
    return lines


def _best(rows: Sequence[Row], over: Callable[[Row], float]) -> tuple[Row, float]:
    """The row that is the least over a limit, and how far; one of all seeds within it before any of fewer seeds."""

    def order(row: Row) -> tuple[bool, float]:
        return over(row) > TIE or len(row.results) < SEEDS, over(row)

    best = min(rows, key=order)
    return best, over(best)


def _verdict(over: float, *rows: Row) -> str:
    """Whether what is over a limit, in points, is nothing, and by how many seeds that is known."""
    if over > TIE:
        return f"missed by {over:.2f} points"
    seeds = min(len(row.results) for row in rows)
    return "met" if seeds >= SEEDS else f"met so far, by {seeds} of {SEEDS} seeds"


def _met(rows: Sequence[Row], target: Target) -> tuple[str, str]:
    """The best row that is pruned enough, and whether it meets the target."""
    fitting = [
        row
        for row in rows
        if row.pruned is not None and row.pruned >= target.pruned and target.method in {"", row.first.method}
    ]
    if not fitting:
        return "no run at this size yet", "open"
    best, over = _best(fitting, lambda row: row.mean("final") - target.error)
    assert best.pruned is not None
    return f"{best.first.method}: {best.pruned:.2%} at {best.mean('final'):.2f}%", _verdict(over, best)


#: What does not depend on any number.
INTRODUCTION = """\
Errors are those on the test images after the last epoch, mean and standard deviation over seeds; the least error of any
epoch, which papers report, stands apart. The papers' rows give only that one, and they are recollected. Prune rates are
by the papers' formula, from live units: an input that lies in a closed feature map does not count. Our recipes use
neither augmentation, but for WRN, nor an outside teacher: where a network learns from another, that is the dense
network of the same run, which learns from labels alone. Hyper-parameters were chosen as `--validate` judges, on a
twelfth of the training images by networks that had seen the others; the test images chose nothing. Final runs train on
all of them.

- *Kept*: live units as the papers list them, of each seed; of networks that they do not list, the mean number of
  channels of each group, in the order of the layers that make them.
- *Same widths from scratch*: a network of the kept widths, trained alike for as many epochs, without gates.
- *Step, times dense*: time of a training step with gates over one without, interleaved in one process."""
READING = """\
- The best of many epochs on the test images is lower than the last, by as much as the epochs scatter: compare papers
  with the column *best epoch*, networks with the other one.
- DiffPrune and Differentiable Sparsification are readings of their abstracts: their rows say what these readings do,
  not what the papers' own code would.
- Where the same widths from scratch do as well, gates found the widths, and the weights that they kept were worth no
  more than fresh ones."""
