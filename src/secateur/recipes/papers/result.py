"""The record of one run: a small JSON file, and beside it the log of its epochs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.recipes.measure import Latency
from secateur.recipes.papers.recipe import Job
from secateur.recipes.record import versions, write_text
from secateur.recipes.train import Epoch

__all__ = ["FORMAT", "Error", "Result", "is_of", "log_text", "read_result", "write_result"]

#: Version of the layout; other versions are refused, never guessed at.
FORMAT = 1


@dataclass(frozen=True)
class Error:
    """Error of one network on the held-out images, in percent.

    Args:
        last: after the last epoch.
        best: least of all epochs of its last phase, as papers report it.
    """

    last: float
    best: float


@dataclass(frozen=True)
class Result:
    """All that one run found out.

    Args:
        experiment: its name.
        recipe: ``"paper"`` or ``"ours"``.
        version: of the recipe.
        method: of the gates.
        settings: what the method was made with.
        point: name of the size.
        seed: of everything.
        validated: whether the errors are those on a part of the training images.
        schedule: the recipe's settings.
        kept: live units as the papers' tables list them; empty where there is no such table.
        pruned: prune rate by the papers' formula, a share; None where there is none.
        widths: units of each group: (kept, of how many).
        flipped: units that the projection onto the budget opened or closed at the end.
        params: of the compact network.
        macs: multiply-accumulates of the compact network on one image.
        dense_params: of the dense network.
        dense_macs: alike.
        errors: by network: dense, gated, compact, tuned, scratch; ``final`` is the compact one at the end of all.
        difference: largest absolute difference of gated and compact outputs, in float64.
        n_test: held-out images behind each error.
        epochs: by phase.
        seconds: wall time by phase of the epochs that this process trained.
        step_ratio: time of a training step over that of the dense network's, medians and quartiles: with all gates,
            with those that were left at the end (``shrunk``), and of the compact network.
        versions: of what it was found with.
    """

    experiment: str
    recipe: str
    version: int
    method: str
    settings: Mapping[str, Any]
    point: str
    seed: int
    validated: bool
    schedule: Mapping[str, Any]
    kept: tuple[int, ...]
    pruned: float | None
    widths: Mapping[str, tuple[int, int]]
    flipped: int
    params: int
    macs: int
    dense_params: int
    dense_macs: int
    errors: Mapping[str, Error]
    difference: float
    n_test: int
    epochs: Mapping[str, int]
    seconds: Mapping[str, float]
    step_ratio: Mapping[str, Latency]
    versions: Mapping[str, str] = field(default_factory=versions)


def write_result(path: Path, result: Result) -> None:
    """Writes a record whole or not at all."""
    content = {"format": FORMAT, **dataclasses.asdict(result)}
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_result(path: Path) -> Result:
    """Reads a record back.

    Raises:
        SecateurError: the file cannot be read or is not a record of this format.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (found := content.pop("format")) != FORMAT:
            raise SecateurError(f"{path}: a record of format {found!r}, expected {FORMAT}; run it again")
        return Result(
            **content
            | {
                "kept": tuple(content["kept"]),
                "widths": {name: (kept, size) for name, (kept, size) in content["widths"].items()},
                "errors": {name: Error(**error) for name, error in content["errors"].items()},
                "step_ratio": {name: Latency(**ratio) for name, ratio in content["step_ratio"].items()},
            }
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SecateurError(f"{path}: not a record of `secateur reproduce` ({error!r})") from error


def is_of(result: Result, job: Job) -> str:
    """Why a record is not that of a job as the recipe is now; "" if it is."""
    recipe = job.recipe
    if result.version != recipe.version:
        return f"version {result.version} of the recipe, which is at version {recipe.version} now"
    if (result.schedule, result.settings) != (recipe.settings(), recipe.methods[job.method]):
        return f"version {result.version} of the recipe, but with other settings than that version has now"
    return ""


def log_text(phases: Mapping[str, Sequence[Epoch]]) -> str:
    """The epochs of a run, one JSON object a line."""
    lines = []
    for name, epochs in phases.items():
        for epoch in epochs:
            row: dict[str, Any] = {"phase": name, "epoch": epoch.number, "loss": round(epoch.loss, 5)}
            if epoch.error is not None:
                row["error"] = round(epoch.error, 3)
            if epoch.dense is not None and epoch.expected is not None and epoch.exact is not None:
                row["expected"] = round(epoch.expected.params / epoch.dense.params, 5)
                row["exact"] = round(epoch.exact.params / epoch.dense.params, 5)
            lines.append(json.dumps(row))
    return "\n".join(lines) + "\n"
