"""The record of a benchmark: read before, written after, with the versions that made it."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "src")]

from secateur.recipes.record import write_text  # noqa: E402

__all__ = ["keep", "recorded"]


def recorded(path: Path, empty: dict[str, Any]) -> dict[str, Any]:
    """What was recorded so far; ``empty`` where nothing was."""
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else empty
    return record


def keep(path: Path, record: dict[str, Any]) -> None:
    """Write a record, with the versions that it is made with now."""
    record["versions"] = {"python": platform.python_version(), "torch": version("torch")}
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(record, indent=1) + "\n")
