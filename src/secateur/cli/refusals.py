"""How commands end: one message on stderr and an exit code, never a traceback for what was foreseen."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from secateur.compaction.artifact import check_writable
from secateur.errors import SecateurError

__all__ = ["BAD_INPUT", "INTERRUPTED", "check_place", "errors", "plain_endings"]

#: Exit code for input that cannot be used.
BAD_INPUT = 2
#: Exit code after Ctrl-C: 128 + SIGINT, as shells have it.
INTERRUPTED = 130

P = ParamSpec("P")
R = TypeVar("R")


def errors() -> Console:
    """Standard error as it is at this moment (tests and pipes replace it)."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def plain_endings(command: Callable[P, R]) -> Callable[P, R]:
    """A command that says foreseen errors in one line and exits with ``BAD_INPUT``, or ``INTERRUPTED`` on Ctrl-C."""

    @functools.wraps(command)
    def ended(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except SecateurError as error:
            errors().print(Text(f"secateur: {error}"))
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt:
            errors().print(Text("secateur: interrupted; no half-written file is left"))
            raise typer.Exit(INTERRUPTED) from None

    return ended


def check_place(path: Path) -> None:
    """Makes sure, before anything long is begun, that a file can be written there; its directory is made.

    Raises:
        SecateurError: the path is a directory, or its directory cannot be made or written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SecateurError(f"cannot write {path}: {error.strerror or error}; choose another path") from error
    check_writable(path)
