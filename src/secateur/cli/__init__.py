"""The command line: ``secateur train | compare | frontier | inspect | report | reproduce``."""

from __future__ import annotations

import typer

from secateur.cli.compare import compare
from secateur.cli.frontier import frontier
from secateur.cli.inspect import inspect
from secateur.cli.report import report
from secateur.cli.reproduce import reproduce
from secateur.cli.train import train

__all__ = ["app"]

app = typer.Typer(
    name="secateur",
    help="Train PyTorch networks to become small, and cut out what they no longer need.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(train)
app.command()(compare)
app.command()(frontier)
app.command()(inspect)
app.command()(report)
app.command()(reproduce)


@app.callback()
def _commands() -> None:
    """Train PyTorch networks to become small, and cut out what they no longer need."""
