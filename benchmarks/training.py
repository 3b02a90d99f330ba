"""What a whole training costs that prunes on its way, side by side with the dense one of as many epochs.

    python benchmarks/training.py lenet-5 --data-dir ../shared/data/mnist
    python benchmarks/training.py resnet-20 --data-dir ../shared/data/cifar10
    python benchmarks/training.py --page        # write the page from the record

Both are trained in one process by the recipe that `secateur train` follows, and take turns epoch by epoch: dense on one
side; on the other gates, removal of closed units, the cut and what follows it. Seconds are those of the processor, in
one thread. Writes ``results/training.json`` and, from it, ``docs/training-time.md``.
"""

from __future__ import annotations

import argparse
import copy
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.records import keep, recorded  # noqa: E402

from secateur.errors import SecateurError  # noqa: E402
from secateur.recipes.data import load  # noqa: E402
from secateur.recipes.images import Images  # noqa: E402
from secateur.recipes.measure import accuracy  # noqa: E402
from secateur.recipes.record import write_text  # noqa: E402
from secateur.recipes.settings import Settings  # noqa: E402
from secateur.recipes.task import attached, fresh  # noqa: E402
from secateur.recipes.train import Epoch, train  # noqa: E402

RECORD, PAGE = ROOT / "results" / "training.json", ROOT / "docs" / "training-time.md"


@dataclass(frozen=True)
class Case:
    """A training.

    Args:
        settings: what is trained, and to which budget.
        first: how many of the training images are used; 0 for all.
        target: the ratio that is aimed at.
    """

    settings: Settings
    first: int
    target: float


CASES = {
    "lenet-5": Case(Settings(data="mnist", net="lenet-5", keep_params=0.05), 0, 0.6),
    "lenet-5-conditional": Case(Settings(data="mnist", net="lenet-5", keep_params=0.05, conditional=True), 0, 0.6),
    "resnet-20": Case(Settings(data="cifar10", net="resnet-20", keep_macs=0.5, epochs=16), 10_000, 0.85),
}

COLUMNS = (
    "network", "images", "epochs", "kept params / MACs", "time over dense", "aim", "first epoch", "cheapest epoch",
    "until 90% of parameters were closed", "dense accuracy", "accuracy",
)  # fmt: skip

#: Called between two epochs.
Pause = Callable[[], None]


def alternating(parties: Mapping[str, Callable[[Pause], None]]) -> dict[str, list[float]]:
    """Runs the parties in turns, from pause to pause; the processor's seconds of each of these stretches."""
    turn = threading.Condition()
    waiting = list(parties)
    spent: dict[str, list[float]] = {name: [] for name in parties}
    failures: list[BaseException] = []

    def body(name: str) -> None:
        start = 0.0

        def wait() -> None:
            nonlocal start
            with turn:
                turn.wait_for(lambda: waiting[0] == name)
            start = time.thread_time()

        def pause() -> None:
            spent[name].append(time.thread_time() - start)
            with turn:
                waiting.append(waiting.pop(0))
                turn.notify_all()
            wait()

        try:
            wait()
            parties[name](pause)
            spent[name].append(time.thread_time() - start)
        except BaseException as error:  # noqa: BLE001 - raised again where the turns were asked for
            failures.append(error)
        with turn:
            waiting.remove(name)
            turn.notify_all()

    threads = [threading.Thread(target=body, args=(name,)) for name in parties]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return spent


def measured(case: Case, images: Images) -> dict[str, Any]:
    """Both trainings, and what they took."""
    settings, schedule = case.settings, case.settings.schedule()
    found: dict[str, Any] = {}
    epochs: list[Epoch] = []

    def dense(pause: Pause) -> None:
        model = fresh(settings.net, settings.seed)
        train(model, images, schedule.whole("dense", settings.seed), lambda epoch: pause())
        found["dense_accuracy"] = accuracy(model, images.x_test, images.y_test)

    def pruned(pause: Pause) -> None:
        def watch(epoch: Epoch) -> None:
            epochs.append(epoch)
            pause()

        phase = schedule.gated("gated", settings.seed)
        model, pruner = attached(settings, images, phase.steps(len(images.y)))
        train(model, images, phase, watch, pruner)
        small, report = pruner.finalize()
        small = copy.deepcopy(small)
        train(small, images, schedule.after_cut("tuned", settings.seed), watch)
        found.update(
            kept={kind: getattr(report.compact, kind) / getattr(report.dense, kind) for kind in ("params", "macs")},
            accuracy=accuracy(small, images.x_test, images.y_test),
        )

    spent = alternating({"dense": dense, "pruned": pruned})
    # What follows the last pause is the test, which belongs to no training.
    seconds = {name: times[: schedule.epochs] for name, times in spent.items()}
    left = [epoch.exact.params / epoch.dense.params for epoch in epochs if epoch.exact and epoch.dense]
    return {**found, "seconds": seconds, "left": left, "epochs": schedule.epochs, "images": len(images.y)}


def _line(name: str, row: dict[str, Any]) -> str:
    seconds, target = row["seconds"], CASES[name].target
    totals = {side: sum(times) for side, times in seconds.items()}
    ratio = totals["pruned"] / totals["dense"]
    pairs = [ours / dense for ours, dense in zip(seconds["pruned"], seconds["dense"], strict=True)]
    sparse = next((k for k, share in enumerate(row["left"]) if share <= 0.1), None)
    until = "" if sparse is None else f"{sum(seconds['pruned'][: sparse + 1]) / totals['dense']:.2f}"
    kept = " / ".join(f"{row['kept'][kind]:.1%}" for kind in ("params", "macs"))
    return (
        f"| {name} | {row['images']:,} | {row['epochs']} | {kept} | **{ratio:.2f}** | {target} | {pairs[0]:.2f} |"
        f" {min(pairs):.2f} | {until} | {row['dense_accuracy']:.2f} | {row['accuracy']:.2f} |"
    )


def page(record: dict[str, Any]) -> str:
    """The page, from the record alone."""
    about = (
        "A training that prunes on its way over a dense one of as many epochs: gates, removal of units that stay "
        "closed, the cut, and the epochs after it, as `secateur train` does all that by default. In the rows named "
        "*conditional* a step also leaves out the units that it draws as closed, where that pays (`secateur train "
        "--conditional`). Both take turns in one process, epoch by epoch; seconds are those of the processor in one "
        "thread. Written by `benchmarks/training.py`; no figure here is typed by hand."
    )
    lines = [
        "# Time of whole trainings",
        "",
        *textwrap.wrap(about, 120),
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(_line(name, row) for name, row in record["networks"].items()),
    ]
    made = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    commands = [f"python benchmarks/training.py {name} --data-dir DIR" for name in record["networks"]]
    return "\n".join([*lines, "", f"One seed. Made with {made}, by", "", "```", *commands, "```", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(CASES)}")
    parser.add_argument("--data-dir", type=Path, default=None, help="folder of the data set's files")
    parser.add_argument("--page", action="store_true", help="write the page from the record, train nothing")
    args = parser.parse_args()
    if unknown := set(args.networks) - set(CASES):
        raise SecateurError(f"unknown network {sorted(unknown)}; there are: {', '.join(CASES)}")
    record = recorded(RECORD, {"networks": {}})
    for name in [] if args.page else args.networks:
        case = CASES[name]
        images = load(case.settings.data, args.data_dir).first(case.first)
        record["networks"][name] = measured(case, images)
        keep(RECORD, record)
        print(_line(name, record["networks"][name]), flush=True)
    write_text(PAGE, page(record))


if __name__ == "__main__":
    try:
        torch.set_num_threads(1)
        main()
    except SecateurError as error:
        sys.exit(str(error))
