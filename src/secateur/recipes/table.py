"""The final table of a run, for a terminal and for a page."""

from __future__ import annotations

from rich import box
from rich.table import Table

from secateur.recipes.task import LATENCY_BATCH, Outcome, Row

__all__ = ["command", "page", "summary", "table", "title"]

#: The latency is that of a batch: its median, and the quartiles.
HEADINGS = ("network", "acc. %", "params", "share", "MACs", "bytes", "ms (quartiles)")


def _cells(row: Row, dense: Row) -> tuple[str, ...]:
    time = row.latency
    return (
        row.name,
        f"{row.accuracy:.2f}",
        f"{row.params:,}",
        f"{row.params / dense.params:.1%}",
        f"{row.macs:,}",
        f"{row.bytes:,}",
        f"{time.median:.2f} ({time.low:.2f}-{time.high:.2f})",
    )


def title(outcome: Outcome) -> str:
    """What was run, in one line."""
    settings = outcome.settings
    shares = {"parameters": settings.keep_params, "MACs": settings.keep_macs}
    budget = " and ".join(f"{share:.4g} of the {kind}" for kind, share in shares.items() if share is not None)
    return f"{settings.net} on {settings.data}, {settings.method}, to {budget}, seed {settings.seed}"


def table(outcome: Outcome) -> Table:
    """One line for each network; shares are of the dense one."""
    made = Table(title=title(outcome), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in HEADINGS:
        made.add_column(heading, justify="left" if heading == "network" else "right", no_wrap=True)
    for row in outcome.rows:
        made.add_row(*_cells(row, outcome.row("dense")))
    return made


def summary(outcome: Outcome) -> list[str]:
    """What the table does not say, a line each."""
    widths = ", ".join(f"{name} {kept}/{size}" for name, (kept, size) in outcome.widths.items())
    apart = ", ".join(f"{value:.1e} in {precision}" for precision, value in outcome.difference.items())
    least = min(outcome.rows, key=lambda row: row.macs)
    lines = [
        f"accuracy on {outcome.n_test:,} test images; ms for {LATENCY_BATCH} images, median and quartiles",
        f"largest output difference, gated and compact: {apart}",
        f"units kept: {widths}; flipped to meet the budget at the end: {outcome.flipped}",
        f"multiply-accumulates kept: {least.macs / outcome.row('dense').macs:.1%}",
    ]
    if outcome.step_ms:
        (gated, last), dense = outcome.step_ms["gated"], outcome.step_ms["dense"][-1]
        lines.append(
            f"ms of an optimizer step: dense {dense:.2f}, gated {gated:.2f} at the start, {last:.2f} at the end"
        )
    if outcome.pruned is not None:
        counted = "-".join(map(str, outcome.counted))
        lines.append(f"as the papers count: {counted}, {outcome.pruned:.2%} pruned")
    return lines


def command(outcome: Outcome) -> str:
    """The command that gives the same table again, times apart."""
    settings = outcome.settings
    words = ["secateur", "train", "--data", settings.data, "--net", settings.net, "--method", settings.method]
    if settings.data != "digits":
        words += ["--data-dir", "DIR"]
    for option, share in (("--keep-params", settings.keep_params), ("--keep-macs", settings.keep_macs)):
        if share is not None:
            words += [option, f"{share:g}"]
    words += ["--epochs", str(settings.schedule().epochs), "--seed", str(settings.seed)]
    words += ["--conditional"] if settings.conditional else []
    return " ".join(words)


def page(outcome: Outcome) -> str:
    """A Markdown page of one run, from its record alone."""
    dense = outcome.row("dense")
    settings = outcome.settings
    final = outcome.rows[-1]
    phases = ", ".join(f"{name} {epochs}" for name, epochs in outcome.schedule.items())
    lines = [
        f"# {settings.net} on {settings.data}",
        "",
        f"The compact network: **{100 - final.accuracy:.2f}% test error** at {final.params:,} parameters, "
        f"{final.params / dense.params:.2%} of the dense network's {dense.params:,}"
        + (f"; {outcome.pruned:.2%} pruned as the papers count." if outcome.pruned is not None else "."),
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "| --- |" + " ---: |" * (len(HEADINGS) - 1),
        *("| " + " | ".join(_cells(row, dense)) + " |" for row in outcome.rows),
        "",
        *(f"- {line[0].upper()}{line[1:]}." for line in summary(outcome)),
        f"- Epochs: {phases}. Accuracies are those after the last epoch, on {outcome.n_test:,} test images, one seed.",
        f"- The whole run took {outcome.seconds:.0f} s. Latencies depend on the machine and on what else it was doing.",
        "",
        "```",
        command(outcome),
        "```",
        "",
    ]
    return "\n".join(lines)
