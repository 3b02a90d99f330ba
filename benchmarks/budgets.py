"""How near the controller brings a model to its budget, before the projection and after it.

    python benchmarks/budgets.py digits
    python benchmarks/budgets.py lenet-300-100 lenet-5 --data-dir ../shared/data/mnist
    python benchmarks/budgets.py resnet-20 --data-dir ../shared/data/cifar10
    python benchmarks/budgets.py --page

Each run trains a gated network to one budget from its recipe's settings, the same for all budgets, and measures it
as its gates leave it and as `finalize` does; no network is fine-tuned. Every run is a line of
``results/budgets.jsonl``, a stopped sweep goes on where it was. Writes ``docs/budgets-benchmark.md`` from the records.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from secateur.budgets.costs import CostModel
from secateur.errors import SecateurError
from secateur.recipes.data import load
from secateur.recipes.images import Images
from secateur.recipes.measure import accuracy
from secateur.recipes.record import write_text
from secateur.recipes.settings import Settings
from secateur.recipes.task import attached
from secateur.recipes.train import train

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.landings import KINDS, METHODS, PAGE, RECORD, SWEEPS, Landing, page, recorded  # noqa: E402


def largest_unit(costs: CostModel, n_open: np.ndarray, kind: str) -> int:
    """What one unit more of the group where that costs most adds."""
    more = costs.cuts(n_open + np.eye(len(n_open), dtype=np.int64)) - costs.cuts(n_open)
    return int(more[:, costs.rows[kind]].max())


def landing(name: str, method: str, kind: str, share: float, seed: int, images: Images) -> Landing:
    """Train one gated network to its budget."""
    sweep = SWEEPS[name]
    settings = Settings(
        data=sweep.data, net=sweep.net, method=method, epochs=sweep.epochs, seed=seed, **{f"keep_{kind}": share}
    )
    phase = settings.schedule().gated("gated", seed)
    model, pruner = attached(settings, images, phase.steps(len(images.y)))
    target = settings.budget().targets(pruner.costs.dense)[kind]
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
        target=target,
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
        images = load(SWEEPS[name].data, args.data_dir).first(SWEEPS[name].first)
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
