"""Records: one JSON file for each run, from which tables and pages are made."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import secateur as sc
from secateur.compaction.artifact import whole_or_not_at_all
from secateur.errors import SecateurError
from secateur.recipes.measure import Latency
from secateur.recipes.settings import Settings
from secateur.recipes.task import Outcome, Row

__all__ = ["FORMAT", "read_record", "versions", "write_record", "write_text"]

#: Version of the record's layout; other versions are refused, never guessed at.
FORMAT = 1


def versions() -> dict[str, str]:
    """What a result was found with."""
    return {"secateur": sc.__version__, "torch": torch.__version__, "python": platform.python_version()}


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all.

    Raises:
        SecateurError: it cannot be written; what was there before is untouched.
    """
    with whole_or_not_at_all(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_record(path: Path, outcome: Outcome) -> None:
    """Writes the outcome of a run and the versions that it was found with as JSON."""
    content = {
        "format": FORMAT,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        **dataclasses.asdict(outcome),
    }
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_record(path: Path) -> Outcome:
    """Reads a record back.

    Raises:
        SecateurError: the file cannot be read or is not a record of this format.
    """
    try:
        content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise SecateurError(f"{path}: a record of format {content['format']!r}, expected {FORMAT}; run it again")
        return Outcome(
            settings=Settings(**content["settings"]),
            schedule=content["schedule"],
            rows=tuple(Row(**{**row, "latency": Latency(**row["latency"])}) for row in content["rows"]),
            difference=content["difference"],
            widths={name: (kept, size) for name, (kept, size) in content["widths"].items()},
            flipped=content["flipped"],
            counted=tuple(content["counted"]),
            pruned=content["pruned"],
            n_test=content["n_test"],
            seconds=content["seconds"],
            step_ms={name: (first, last) for name, (first, last) in content.get("step_ms", {}).items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SecateurError(f"{path}: not a record of `secateur train --record` ({error!r})") from error
