"""``secateur train``: dense, gated, compact and scratch on one task, with one table at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from secateur.cli.kept import KeepMacs, KeepParams, params_kept
from secateur.cli.progress import Progress
from secateur.cli.refusals import check_place, errors, plain_endings
from secateur.errors import SecateurError

__all__ = ["train"]

#: Where compact networks go unless told otherwise, below the working directory.
RUNS = Path("runs")


@plain_endings
def train(  # noqa: PLR0913, PLR0917 - one argument for each option
    data: Annotated[str, typer.Option(help="Data set: digits (ships with scikit-learn), mnist or cifar10.")] = "digits",
    data_dir: Annotated[Path | None, typer.Option(help="Directory that holds the data set's files.")] = None,
    net: Annotated[str, typer.Option(help="Network; the data set's own where none is given.")] = "",
    method: Annotated[str, typer.Option(help="Gate method.")] = "hard-concrete",
    keep_params: KeepParams = None,
    keep_macs: KeepMacs = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images, fine-tuning included.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    out: Annotated[Path | None, typer.Option(help="File for the compact network, .safetensors.")] = None,
    record: Annotated[Path | None, typer.Option(help="File for a JSON record of the run.")] = None,
    device: Annotated[str, typer.Option(help="Device to train on, as torch names it.")] = "cpu",
    conditional: Annotated[
        bool, typer.Option("--conditional", help="Leave units that a step draws as closed out of it, where that pays.")
    ] = False,
) -> None:
    """Train with gates to a budget, cut, prove, save; compare with dense and with the same widths from scratch."""
    from secateur.recipes.data import load
    from secateur.recipes.memory import keep_memory
    from secateur.recipes.record import write_record
    from secateur.recipes.settings import Settings
    from secateur.recipes.table import summary, table
    from secateur.recipes.task import run

    if epochs == 0:
        raise SecateurError("epochs=0; expected at least 2")
    keep_params = params_kept(keep_params, keep_macs)
    settings = Settings(data, net, method, keep_params, keep_macs, epochs or 0, seed, device, conditional)
    path = out if out is not None else RUNS / f"{settings.title}.safetensors"
    check_place(path)
    if record is not None:
        check_place(record)
    images = load(data, data_dir)
    keep_memory()
    with Progress(errors()) as progress:
        outcome = run(settings, images, path, progress)
    if record is not None:
        write_record(record, outcome)
    # Standard output carries the result alone, so that it can be kept by a redirection.
    console = Console(highlight=False, soft_wrap=True)
    console.print(table(outcome))
    for line in summary(outcome):
        console.print(Text(line))
    console.print(Text(f"saved: {path}" + (f", record: {record}" if record is not None else "")))
