"""``secateur frontier``: one task at many budgets, with one table and one picture at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from secateur.cli.numbers import numbers
from secateur.cli.progress import Progress
from secateur.cli.refusals import check_place, errors, plain_endings
from secateur.errors import SecateurError

if TYPE_CHECKING:
    from secateur.recipes.frontier import Point, Sweep

__all__ = ["frontier"]

#: Where frontiers go unless told otherwise, below the working directory.
RUNS = Path("runs/frontier")
#: Shares of the dense cost, from dense to tiny.
BUDGETS = "0.5,0.3,0.2,0.1,0.05,0.02"
#: Columns that the table may take.
WIDEST = 200


@plain_endings
def frontier(  # noqa: PLR0913, PLR0917 - one argument for each option
    data: Annotated[str, typer.Option(help="Data set: digits (ships with scikit-learn) or mnist.")] = "digits",
    data_dir: Annotated[Path | None, typer.Option(help="Directory that holds the data set's files.")] = None,
    net: Annotated[str, typer.Option(help="Network; the data set's own where none is given.")] = "",
    method: Annotated[str, typer.Option(help="Gate method.")] = "hard-concrete",
    by: Annotated[str, typer.Option(help="What the budgets are shares of: params, macs or latency.")] = "params",
    budgets: Annotated[str, typer.Option(help="Shares of the dense network in (0, 1], commas between.")] = BUDGETS,
    seeds: Annotated[str, typer.Option(help="Seeds with commas between; each has a frontier of its own.")] = "0",
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images for each point.")] = None,
    jobs: Annotated[int, typer.Option(help="Trainings at a time, each in a process of its own where over 1.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Directory of records, networks and the picture.")] = None,
    page: Annotated[Path | None, typer.Option(help="Markdown page to write, its picture beside it.")] = None,
    record: Annotated[Path | None, typer.Option(help="File for a JSON record of all points.")] = None,
    picture: Annotated[bool, typer.Option(help="Draw frontier.svg and frontier.png.")] = True,
    device: Annotated[str, typer.Option(help="Device to train on, as torch names it.")] = "cpu",
) -> None:
    """Train a task at many budgets, each going on from the next larger one; what is recorded is kept."""
    from secateur.recipes import curves
    from secateur.recipes.data import load
    from secateur.recipes.frontier import Sweep, check, jobs_of, points, timed, with_latency
    from secateur.recipes.jobs import run_jobs
    from secateur.recipes.memory import keep_memory

    if epochs == 0:
        raise SecateurError("epochs=0; expected at least 2")
    if jobs < 1:
        raise SecateurError(f"--jobs {jobs}; expected at least 1")
    shares, from_seeds = numbers(budgets, "--budgets", float), numbers(seeds, "--seeds", int)
    if picture:
        curves.check_matplotlib()
    sweep = Sweep(data, net, method, by, shares, epochs or 0, from_seeds, device, data_dir, Path())  # type: ignore[arg-type]
    place = out if out is not None else RUNS / f"{sweep.data}-{sweep.net}-{method}-{by}"
    for path in (place / "frontier.svg", page, record):
        if path is not None:
            check_place(path)
    images = load(data, data_dir).to(device)
    sweep = replace(sweep, out=place)
    if by == "latency":
        sweep = with_latency(sweep, images)
    check(sweep, images)
    keep_memory()
    with Progress(errors()) as progress:
        run_jobs(jobs_of(sweep), jobs, progress, lambda name: errors().print(Text(f"done: {name}"), style="dim"))
    found = timed(sweep, points(sweep), images)
    console = Console(highlight=False, soft_wrap=True)
    made = curves.table(sweep, found)
    # A narrow terminal wraps the lines instead of losing digits.
    console.width = max(console.width, console.measure(made, options=console.options.update(width=WIDEST)).maximum)
    console.print(made)
    written = _written(sweep, found, picture=picture, page=page, record=record)
    console.print(Text(f"saved: {', '.join(map(str, written))}"))


def _written(
    sweep: Sweep, found: Sequence[Point], *, picture: bool, page: Path | None, record: Path | None
) -> list[Path]:
    """Write what was asked for; returns where it is."""
    from secateur.recipes import curves
    from secateur.recipes.frontier import recorded
    from secateur.recipes.record import write_text
    from secateur.recipes.resume import keep

    written = [sweep.out]
    if picture:
        curves.draw(sweep, found, sweep.out / "frontier.svg", sweep.out / "frontier.png")
        written.append(sweep.out / "frontier.svg")
    if record is not None:
        keep(record, recorded(sweep), {"points": [asdict(point) for point in found]})
        written.append(record)
    if page is not None:
        drawing = page.with_suffix(".svg")
        if picture:
            curves.draw(sweep, found, drawing, page.with_suffix(".png"))
        write_text(page, curves.page(sweep, found, drawing.name if picture else "", _command(sweep, page, record)))
        written.append(page)
    return written


def _command(sweep: Sweep, page: Path, record: Path | None) -> str:
    words = ["secateur", "frontier", "--data", sweep.data, "--net", sweep.net, "--method", sweep.method]
    if sweep.data_dir is not None:
        words += ["--data-dir", "DIR"]
    words += ["--by", sweep.by, "--budgets", ",".join(f"{share:g}" for share in sweep.shares)]
    words += ["--seeds", ",".join(map(str, sweep.seeds)), "--epochs", str(sweep.schedule.epochs)]
    if record is not None:
        words += ["--record", record.as_posix()]
    return " ".join([*words, "--page", page.as_posix()])
