"""How near the controller brings a model to its budget, before the projection and after it.

    python benchmarks/budgets.py digits
    python benchmarks/budgets.py lenet-300-100 lenet-5 --data-dir ../shared/data/mnist
    python benchmarks/budgets.py --page

Each run trains a gated network to one budget from its recipe's settings, the same for all budgets, and measures it
as its gates leave it and as `finalize` does; no network is fine-tuned. Every run is a line of
``results/budgets.jsonl``, a stopped sweep goes on where it was. Writes ``docs/budgets-benchmark.md`` from the records.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import secateur as sc
from secateur.budgets.costs import CostModel
from secateur.errors import SecateurError
from secateur.recipes.data import load
from secateur.recipes.images import Images
from secateur.recipes.measure import accuracy
from secateur.recipes.record import write_text
from secateur.recipes.settings import Settings
from secateur.recipes.task import fresh, gates_for
from secateur.recipes.train import train

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "results" / "budgets.jsonl"
PAGE = ROOT / "docs" / "budgets-benchmark.md"
METHODS = ("hard-concrete", "arm", "ar", "diffprune", "diff-sparse")
KINDS = ("params", "macs")
#: What the fixed gates' cost may be off by before the projection, as a share of the target.
NEAR = 0.05
#: What `finalize` may leave unused, as a share of the dense cost.
UNUSED = 0.01


@dataclass(frozen=True)
class Sweep:
    """One network with its budgets; ``first``: only so many training images, 0 for all."""

    data: str
    net: str
    shares: tuple[float, ...]
    seeds: tuple[int, ...]
    epochs: int = 0
    first: int = 0


SWEEPS = {
    "digits": Sweep("digits", "resnet-7", (0.5, 0.2, 0.1, 0.05, 0.02), (0, 1, 2)),
    "lenet-300-100": Sweep("mnist", "lenet-300-100", (0.3, 0.1), (0,), 6),
    "lenet-5": Sweep("mnist", "lenet-5", (0.3, 0.1), (0,), 6),
    "resnet-20": Sweep("cifar10", "resnet-20", (0.3, 0.1), (0,), 6, 10_000),
}


@dataclass(frozen=True)
class Landing:
    """One run.

    Args:
        sweep: key of ``SWEEPS``.
        method: gate method.
        kind: what the budget limits.
        share: of the dense cost.
        seed: of weights, order and draws.
        dense: cost of the dense network.
        target: largest allowed cost.
        unit: what the largest unit costs, as the fixed gates leave the others.
        before: cost of the fixed gates before the projection.
        after: cost of the compact network.
        flipped: units that the projection flipped.
        accuracy_before: of the fixed gates on the test images, in percent.
        accuracy_after: of the compact network, not fine-tuned.
        third: cost of the fixed gates after a third of the training, as a share of dense.
    """

    sweep: str
    method: str
    kind: str
    share: float
    seed: int
    dense: int
    target: int
    unit: int
    before: int
    after: int
    flipped: int
    accuracy_before: float
    accuracy_after: float
    third: float

    @property
    def key(self) -> tuple[str, str, str, float, int]:
        """What tells this run from the others."""
        return self.sweep, self.method, self.kind, self.share, self.seed

    @property
    def off(self) -> float:
        """Deviation before the projection, as a share of the target."""
        return self.before / self.target - 1.0

    @property
    def near(self) -> bool:
        """Within 5% of the target before the projection."""
        return abs(self.off) <= NEAR

    @property
    def lands(self) -> bool:
        """Near, or, where single units are larger than that, within one unit."""
        return self.near or abs(self.before - self.target) <= self.unit

    @property
    def meets(self) -> bool:
        """At most the budget after, and at most 1% of dense, or one unit, below it."""
        return 0 <= self.target - self.after <= max(UNUSED * self.dense, self.unit)


def largest_unit(costs: CostModel, n_open: np.ndarray, kind: str) -> int:
    """What one unit more of the group where that costs most adds."""
    now = getattr(costs.cut(n_open), kind)
    more = [costs.cut(n_open + row) for row in np.eye(len(n_open), dtype=np.int64)]
    return max(getattr(cost, kind) - now for cost in more)


def landing(name: str, method: str, kind: str, share: float, seed: int, images: Images) -> Landing:
    """Train one gated network to its budget."""
    sweep = SWEEPS[name]
    settings = Settings(
        data=sweep.data, net=sweep.net, method=method, epochs=sweep.epochs, seed=seed, **{f"keep_{kind}": share}
    )
    phase = settings.schedule().gated("gated", seed)
    model = fresh(sweep.net, seed)
    budget = settings.budget(phase.steps(len(images.y)))
    pruner = sc.attach(model, examples=(images.x[:1],), gates=gates_for(settings), budget=budget, seed=seed)
    seen: list[int] = []
    train(model, images, phase, lambda epoch: seen.append(getattr(epoch.exact, kind)), pruner)
    before = accuracy(model, images.x_test, images.y_test)
    costs = pruner.costs
    unit = largest_unit(costs, costs.n_open(pruner._units.open(pruner.gates.fixed())), kind)
    small, report = pruner.finalize()
    dense = getattr(report.dense, kind)
    return Landing(
        sweep=name,
        method=method,
        kind=kind,
        share=share,
        seed=seed,
        dense=dense,
        target=int(share * dense),
        unit=unit,
        before=getattr(report.gated, kind),
        after=getattr(report.compact, kind),
        flipped=report.flipped,
        accuracy_before=before,
        accuracy_after=accuracy(small, images.x_test, images.y_test),
        third=seen[len(seen) // 3] / dense,
    )


def wanted(names: list[str], methods: list[str]) -> Iterator[tuple[str, str, str, float, int]]:
    for name in names:
        sweep = SWEEPS[name]
        for seed, share in itertools.product(sweep.seeds, sweep.shares):
            for kind, method in itertools.product(KINDS, methods):
                yield name, method, kind, share, seed


def recorded() -> dict[tuple[str, str, str, float, int], Landing]:
    if not RECORD.exists():
        return {}
    runs = (Landing(**json.loads(line)) for line in RECORD.read_text().splitlines())
    return {run.key: run for run in runs}


def page(runs: list[Landing]) -> str:
    """The page, from the records alone."""
    text = """# Budgets that are met

Before the projection: the cost of the gates as evaluation fixes them, which the controller alone has brought about, as
deviation from the target. After: what `finalize` returns, not fine-tuned. A run *lands* if it is within 5% of the
target before the projection, or within one unit where the largest unit is larger than that; it *meets* its budget if it
is at most the target and at most 1% of the dense cost (or one unit) under it. Every network is trained from its
recipe's settings, the same for all budgets. Means over the seeds, the largest deviation beside it. "A third" is the
share of the dense cost that the fixed gates leave after a third of the training. Written by `benchmarks/budgets.py`;
no figure here is typed by hand.
"""
    columns = (
        "method",
        "budget",
        "a third",
        "off before, mean (largest)",
        "within 5%",
        "lands",
        "units flipped",
        "under after, of dense",
        "accuracy before",
        "after",
    )
    for name, sweep in SWEEPS.items():
        own = [run for run in runs if run.sweep == name]
        if not own:
            continue
        of = f", the first {sweep.first:,} training images" if sweep.first else ""
        near, landed, met = (sum(getattr(run, what) for run in own) for what in ("near", "lands", "meets"))
        text += f"""
## {sweep.net} on {sweep.data}{of}

{len(own)} runs, {len({run.seed for run in own})} seed(s): {near} within 5%, {landed} land, {met} meet their budget;
the projection flips nothing in {sum(not run.flipped for run in own)}.

| {" | ".join(columns)} |
| --- | --- |{" ---: |" * (len(columns) - 2)}
"""
        for method, kind, share in itertools.product(METHODS, KINDS, sweep.shares):
            rows = [run for run in own if (run.method, run.kind, run.share) == (method, kind, share)]
            if not rows:
                continue
            off = [run.off for run in rows]
            under = max((run.target - run.after) / run.dense for run in rows)
            flipped = [run.flipped for run in rows]
            cells = (
                method,
                f"{share:.0%} {kind}",
                f"{statistics.mean(run.third for run in rows):.1%}",
                f"{statistics.mean(off):+.1%} ({max(off, key=abs):+.1%})",
                f"{sum(run.near for run in rows)} of {len(rows)}",
                f"{sum(run.lands for run in rows)} of {len(rows)}",
                ", ".join(map(str, flipped)),
                f"{under:.2%}",
                f"{statistics.mean(run.accuracy_before for run in rows):.2f}",
                f"{statistics.mean(run.accuracy_after for run in rows):.2f}",
            )
            text += f"| {' | '.join(cells)} |\n"
    missed = [run for run in runs if not (run.lands and run.meets)]
    if missed:
        text += "\n## What did not land or meet\n\n"
        for run in missed:
            text += (
                f"- {SWEEPS[run.sweep].net}, {run.method}, {run.share:.0%} of the {run.kind}, seed {run.seed}: "
                f"{run.before:,} before, {run.after:,} after, target {run.target:,}, largest unit {run.unit:,}\n"
            )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", help=f"of {', '.join(SWEEPS)}")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--data-dir", type=Path, default=None, help="folder of the data set's files")
    parser.add_argument("--page", action="store_true", help="write the page from the records, train nothing")
    args = parser.parse_args()
    if unknown := set(args.sweeps) - set(SWEEPS):
        raise SecateurError(f"unknown sweep {sorted(unknown)}; there are: {', '.join(SWEEPS)}")
    for name in [] if args.page else args.sweeps:
        images = load(SWEEPS[name].data, args.data_dir)
        if first := SWEEPS[name].first:
            images = replace(images, x=images.x[:first], y=images.y[:first])
        for key in wanted([name], args.methods):
            if key in recorded():
                continue
            run = landing(*key, images=images)
            with RECORD.open("a") as lines:
                lines.write(json.dumps(asdict(run)) + "\n")
            print(*key, f"off {run.off:+.1%}", "lands" if run.lands else "MISSES", f"flipped {run.flipped}", flush=True)
    write_text(PAGE, page(sorted(recorded().values(), key=lambda run: run.key)))


if __name__ == "__main__":
    try:
        torch.set_num_threads(1)
        main()
    except SecateurError as error:
        sys.exit(str(error))
