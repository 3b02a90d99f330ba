"""Tables and pictures of frontiers: accuracy against parameters, multiply-accumulates and latency.

Index conventions: a point of the table is all seeds at one share.
"""

from __future__ import annotations

import io
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from secateur.compaction.artifact import whole_or_not_at_all
from secateur.errors import SecateurError
from secateur.recipes.frontier import Point, Sweep
from secateur.recipes.record import write_text
from secateur.recipes.task import LATENCY_BATCH

__all__ = ["check_matplotlib", "draw", "page", "table", "title"]

HEADINGS = ("budget", "acc. %", "at cut", "params", "share", "MACs", "share", "ms (quartiles)")
#: What is drawn: label of the axis, and its value for a point.
AXES: tuple[tuple[str, Callable[[Point], float]], ...] = (
    ("parameters", lambda point: point.params),
    ("multiply-accumulates", lambda point: point.macs),
    (f"ms for {LATENCY_BATCH} images", lambda point: point.latency.median if point.latency else float("nan")),
)
#: Dots for each inch of a PNG.
DPI = 150


def title(sweep: Sweep) -> str:
    """What was run, in one line."""
    what = {"params": "parameters", "macs": "MACs", "latency": "latency"}[sweep.by]
    return (
        f"{sweep.net} on {sweep.data}, {sweep.method}, shares of the {what}, seeds {', '.join(map(str, sweep.seeds))}"
    )


def table(sweep: Sweep, points: Sequence[Point]) -> Table:
    """One line for each budget; means over the seeds."""
    made = Table(title=title(sweep), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in HEADINGS:
        made.add_column(heading, justify="left" if heading == "budget" else "right", no_wrap=True)
    for cells in _rows(points):
        made.add_row(*cells)
    return made


def page(sweep: Sweep, points: Sequence[Point], picture: str, command: str) -> str:
    """A Markdown page of a frontier; ``picture`` is the name of its SVG file beside the page, "" for none."""
    epochs, name = sweep.schedule.epochs, title(sweep)
    how = (
        f"{name[0].upper()}{name[1:]}: {epochs} epochs for the dense network, and as many for each point, whose gated"
        " network goes on from that of the point before. Accuracy on the test images after the last epoch, `at cut`"
        f" before fine-tuning; latency of {LATENCY_BATCH} images, all networks in turns in one process, median and"
        " quartiles."
    )
    proof = (
        f"Units that the end decided, point by point: {', '.join(str(p.flipped) for p in points if p.share < 1.0)}."
        f" Largest output difference of gated and compact networks in float64: {max(p.difference for p in points):.1e}."
    )
    lines = [
        f"# Frontier: {sweep.net} on {sweep.data}",
        "",
        how,
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "| --- |" + " ---: |" * (len(HEADINGS) - 1),
        *("| " + " | ".join(cells) + " |" for cells in _rows(points)),
        "",
        *([f"![accuracy against size]({picture})", ""] if picture else []),
        proof,
        "",
        "```",
        command,
        "```",
        "",
    ]
    return "\n".join(lines)


def check_matplotlib() -> None:
    """Refuse to promise a picture that cannot be drawn.

    Raises:
        SecateurError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise SecateurError(
            f'a picture needs matplotlib ({error}); run `pip install "secateur[plots]"`, or say --no-picture'
        ) from error


def draw(sweep: Sweep, points: Sequence[Point], svg: Path, png: Path) -> None:
    """Accuracy against each size, a line through the means and a dot for each seed, as SVG and PNG.

    Raises:
        SecateurError: matplotlib is not installed, or a file cannot be written.
    """
    check_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The same records give the same file: no date, and names that do not depend on chance.
    with mpl.rc_context({"svg.hashsalt": "secateur", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        # Without latencies their axis is left out.
        shown = AXES if all(point.latency is not None for point in points) else AXES[:2]
        for ax, (label, value) in zip(figure.subplots(1, len(shown), sharey=True), shown, strict=True):
            means = [
                (statistics.mean(map(value, same)), statistics.mean(point.accuracy for point in same))
                for same in _by_share(points)
            ]
            ax.plot(*zip(*means, strict=True), color="C0", linewidth=1)
            ax.scatter([value(p) for p in points], [p.accuracy for p in points], s=14, color="C0", label="fine-tuned")
            cut = [point for point in points if point.share < 1.0]
            ax.scatter(
                [value(p) for p in cut], [p.at_cut for p in cut], s=14, marker="x", color="C1", label="at the cut"
            )
            ax.set_xscale("log")
            ax.set_xlabel(label)
            ax.grid(alpha=0.3, which="both")
        figure.axes[0].set_ylabel("test accuracy, %")
        figure.axes[0].legend(fontsize=7)
        figure.suptitle(title(sweep), fontsize=9)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        # Trailing blanks differ between releases of matplotlib, and are none of the picture.
        write_text(svg, "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")
        with whole_or_not_at_all(png) as beside:
            figure.savefig(beside, format="png", dpi=DPI, metadata={"Software": None})


def _by_share(points: Sequence[Point]) -> list[list[Point]]:
    """Points of the same share, from dense to small."""
    ordered = sorted(points, key=lambda point: (-point.share, point.seed))
    return [list(same) for _, same in itertools.groupby(ordered, key=lambda point: point.share)]


def _rows(points: Sequence[Point]) -> list[tuple[str, ...]]:
    groups = _by_share(points)
    dense = groups[0][0]
    rows: list[tuple[str, ...]] = []
    for same in groups:
        params, macs = (round(statistics.mean(getattr(p, kind) for p in same)) for kind in ("params", "macs"))
        spread = f" ± {statistics.stdev(p.accuracy for p in same):.2f}" if len(same) > 1 else ""
        times = [p.latency for p in same if p.latency is not None]
        ms = (statistics.mean(getattr(t, name) for t in times) for name in ("median", "low", "high")) if times else ()
        rows.append(
            (
                "dense" if same[0].share == 1.0 else f"{same[0].share:g}",
                f"{statistics.mean(p.accuracy for p in same):.2f}{spread}",
                "" if same[0].share == 1.0 else f"{statistics.mean(p.at_cut for p in same):.2f}",
                f"{params:,}",
                f"{params / dense.params:.1%}",
                f"{macs:,}",
                f"{macs / dense.macs:.1%}",
                "{:.2f} ({:.2f}-{:.2f})".format(*ms) if times else "",
            )
        )
    return rows
