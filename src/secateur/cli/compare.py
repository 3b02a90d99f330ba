"""``secateur compare``: gate methods side by side on one task at one budget, over seeds and folds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from secateur.cli.kept import KeepMacs, KeepParams, params_kept
from secateur.cli.numbers import numbers
from secateur.cli.progress import Progress
from secateur.cli.refusals import check_place, errors, plain_endings

__all__ = ["compare"]

#: What is compared where no method is named: those of the papers, and the baseline.
METHODS = ("hard-concrete", "arm", "ar", "diffprune", "diff-sparse", "magnitude")
#: Where records go unless told otherwise, below the working directory.
RUNS = Path("runs/compare")


@plain_endings
def compare(  # noqa: PLR0913, PLR0917 - one argument for each option
    data: Annotated[str, typer.Option(help="Data set: digits, mnist or cifar10.")] = "digits",
    data_dir: Annotated[Path | None, typer.Option(help="Directory that holds the data set's files.")] = None,
    net: Annotated[str, typer.Option(help="Network; the data set's own where none is given.")] = "",
    method: Annotated[list[str] | None, typer.Option(help="Gate method, can be repeated; all without it.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds with commas between.")] = "0,1,2",
    folds: Annotated[int, typer.Option(help="Of the digits: each is the test set in turn; 1 for the fixed split.")] = 1,
    keep_params: KeepParams = None,
    keep_macs: KeepMacs = None,
    epochs: Annotated[int, typer.Option(help="Of every network; 0 for its own number.")] = 0,
    results: Annotated[
        Path | None, typer.Option(help="Directory of the records; what is recorded there is not trained again.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Markdown page to write, besides the table.")] = None,
    device: Annotated[str, typer.Option(help="Device to train on, as torch names it.")] = "cpu",
) -> None:
    """Train every method with every seed to one budget, and print one table; goes on where it stopped."""
    from secateur.recipes.compare import HEADINGS, Comparison, page, table_rows
    from secateur.recipes.compare import compare as compared
    from secateur.recipes.data import load
    from secateur.recipes.memory import keep_memory
    from secateur.recipes.record import write_text

    keep_params = params_kept(keep_params, keep_macs)
    asked = Comparison(
        data,
        net,
        tuple(method or METHODS),
        numbers(seeds, "--seeds", int),
        folds,
        keep_params,
        keep_macs,
        epochs,
        device,
    )
    shares = {"params": keep_params, "macs": keep_macs}
    budget = "-".join(f"{kind}{share:g}" for kind, share in shares.items() if share is not None)
    directory = results if results is not None else RUNS / f"{asked.data}-{asked.net}-{budget}"
    check_place(directory / "steps.json")
    if out is not None:
        check_place(out)
    keep_memory()
    console = errors()
    with Progress(console) as progress:
        told = console.print
        lines = compared(asked, lambda: load(data, data_dir), directory, progress, lambda line: told(Text(line)))
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in HEADINGS:
        made.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in table_rows(lines):
        made.add_row(*row)
    # Standard output carries the result alone, so that it can be kept by a redirection.
    Console(highlight=False, soft_wrap=True).print(made)
    if out is not None:
        write_text(out, page(asked, lines, _command(asked, data_dir, directory, out)))


def _command(asked: object, data_dir: Path | None, results: Path, out: Path) -> str:
    from secateur.recipes.compare import Comparison

    assert isinstance(asked, Comparison)
    words = ["secateur compare", f"--data {asked.data}", f"--net {asked.net}"]
    words += ["--data-dir DIR"] if data_dir is not None else []
    words += [f"--method {name}" for name in asked.methods]
    words += [f"--seeds {','.join(map(str, asked.seeds))}", f"--folds {asked.folds}"]
    for option, share in (("--keep-params", asked.keep_params), ("--keep-macs", asked.keep_macs)):
        words += [f"{option} {share:g}"] if share is not None else []
    words += [f"--epochs {asked.epochs}"] if asked.epochs else []
    return " ".join([*words, f"--results {results}", f"--out {out}"])
