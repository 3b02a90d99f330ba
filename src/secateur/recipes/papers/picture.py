"""The picture of all records: error against what is left of parameters and multiply-accumulates."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from secateur.errors import SecateurError
from secateur.recipes.networks import network
from secateur.recipes.papers.experiments import EXPERIMENTS
from secateur.recipes.papers.published import PUBLISHED
from secateur.recipes.papers.report import Row, rows_of
from secateur.recipes.papers.result import Result
from secateur.recipes.record import write_text

__all__ = ["picture"]

MARKS = ("o", "s", "^", "v", "D", "P", "X")


def picture(results: Sequence[Result], path: Path) -> None:
    """Writes the picture as SVG: a row for each experiment, parameters on the left, multiply-accumulates on the right.

    Raises:
        SecateurError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SecateurError(f'{path}: needs matplotlib ({error}); run `pip install "secateur[plots]"`') from error
    shown = {name: rows for name in EXPERIMENTS if (rows := rows_of(results, name))}
    # The same records give the same file: no date, and names that do not depend on chance.
    with mpl.rc_context({"svg.hashsalt": "secateur", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10, 3.6 * len(shown)), layout="constrained")
        axes = figure.subplots(len(shown), 2, squeeze=False, sharey="row")
        for (experiment, rows), (left, right) in zip(shown.items(), axes, strict=True):
            _published(left, experiment, rows)
            for ax, kind in ((left, "params"), (right, "macs")):
                _points(ax, rows, kind)
                ax.set_xscale("log")
                ax.set_xlabel({"params": "parameters left, %", "macs": "multiply-accumulates left, %"}[kind])
                ax.grid(alpha=0.3, which="both")
            left.set_ylabel("test error, %")
            left.set_title(experiment)
            right.legend(fontsize=7)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    # Trailing blanks differ between releases of matplotlib, and are none of the picture.
    write_text(path, "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")


def _published(ax: object, experiment: str, rows: Sequence[Row]) -> None:
    net = network(rows[0].first.schedule["net"])
    for published in PUBLISHED.get(experiment, ()):
        if published.kept and net.pruned is not None:
            x = 100 * (1 - net.pruned(published.kept))
            ax.plot(x, published.error, "k+", zorder=1)  # type: ignore[attr-defined]
            ax.annotate(f" {published.name}", (x, published.error), fontsize=5, alpha=0.7)  # type: ignore[attr-defined]


def _points(ax: object, rows: Sequence[Row], kind: str) -> None:
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.first.recipe, row.first.method), []).append(row)
    for number, ((recipe, method), same) in enumerate(lines.items()):
        same.sort(key=lambda row: getattr(row, kind))
        ax.errorbar(  # type: ignore[attr-defined]
            [100 * getattr(row, kind) for row in same],
            [row.mean("final") for row in same],
            [row.deviation for row in same],
            marker=MARKS[number % len(MARKS)],
            markersize=5,
            capsize=2,
            linewidth=1,
            label=f"{method}, {recipe}",
        )
