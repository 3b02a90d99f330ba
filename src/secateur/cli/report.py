"""``secateur report``: the page of a recorded run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.refusals import check_place, plain_endings

__all__ = ["report"]


@plain_endings
def report(
    record: Annotated[Path, typer.Argument(help="JSON record of `secateur train --record`.")],
    out: Annotated[Path | None, typer.Option(help="Markdown file to write, instead of standard output.")] = None,
) -> None:
    """Write the page of a recorded run: nothing in it is typed by hand."""
    from secateur.recipes.record import read_record, write_text
    from secateur.recipes.table import page

    text = page(read_record(record))
    if out is None:
        typer.echo(text, nl=False)
        return
    check_place(out)
    write_text(out, f"{text}\n<!-- written by `secateur report {record} --out {out}` -->\n")
