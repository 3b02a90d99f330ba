"""What is seen while a network trains: live bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich import progress as bars
from rich.console import Console
from rich.text import Text

from secateur.recipes.train import Epoch

__all__ = ["Progress"]

#: Lines that a phase gets where there is no terminal.
LINES = 5


class Progress:
    """Shows each epoch that it is called with; a context, so that the terminal is left in order.

    Args:
        console: to write to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = bars.Progress(
            bars.TextColumn("{task.description:<10}"),
            bars.BarColumn(bar_width=24),
            bars.TextColumn("{task.completed:>3.0f}/{task.total:.0f} epochs"),
            bars.TimeElapsedColumn(),
            bars.TextColumn("loss {task.fields[loss]:.4f} {task.fields[size]}"),
            console=console,
        )
        self._tasks: dict[str, bars.TaskID] = {}
        self._started = time.monotonic()

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def __call__(self, epoch: Epoch) -> None:
        """Shows one epoch."""
        size = _size(epoch)
        if self._console.is_terminal:
            if epoch.phase.name not in self._tasks:
                added = self._live.add_task(epoch.phase.name, total=epoch.phase.epochs, loss=epoch.loss, size=size)
                self._tasks[epoch.phase.name] = added
            self._live.update(self._tasks[epoch.phase.name], completed=epoch.number, loss=epoch.loss, size=size)
        elif epoch.number in {1, epoch.phase.epochs} or epoch.number % max(1, epoch.phase.epochs // LINES) == 0:
            seconds = time.monotonic() - self._started
            line = f"{epoch.phase.name:<10} epoch {epoch.number:>3}/{epoch.phase.epochs} loss {epoch.loss:.4f} {size}"
            self._console.print(Text(f"{line.rstrip()} ({seconds:.0f} s)"))


def _size(epoch: Epoch) -> str:
    """Expected and actual size as shares of the dense network."""
    if epoch.expected is None or epoch.exact is None or epoch.dense is None:
        return ""
    parts = []
    for kind in ("params", "macs"):
        dense, expected, exact = (getattr(cost, kind) for cost in (epoch.dense, epoch.expected, epoch.exact))
        parts.append(f"{kind} expected {expected / dense:6.1%} actual {exact / dense:6.1%}")
    if epoch.left is not None:
        parts.append(f"{epoch.left.params / epoch.dense.params:6.1%} of params still there")
    return ", ".join([*parts, f"step {epoch.step_ms:.1f} ms"])
