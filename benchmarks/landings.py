"""What ``budgets.py`` measures: its sweeps, its records, and the page that is made of these."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

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
    "resnet-20": Sweep("cifar10", "resnet-20", (0.3, 0.1), (0,), 5, 10_000),
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
