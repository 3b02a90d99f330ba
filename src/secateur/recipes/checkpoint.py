"""The state of a training in a file, so that a killed run goes on where it was."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.compaction.artifact import whole_or_not_at_all
from secateur.errors import SecateurError

__all__ = ["Checkpoint", "beyond_defaults"]


class Checkpoint:
    """One file with the state of one training; each save replaces it whole or not at all.

    Only tensors and plain values are stored, and nothing else is read back.

    Args:
        path: the file; its directory exists.
        every: epochs between two saves, at least 1.

    Example:
        >>> import tempfile
        >>> from secateur.recipes.train import Phase
        >>> file = Path(tempfile.mkdtemp()) / "run.pt"
        >>> phase = Phase("dense", epochs=2, batch=8, lr=0.1)
        >>> Checkpoint(file).load(phase) is None
        True
        >>> Checkpoint(file).save(phase, {"epochs": [{"number": 1}]})
        >>> Checkpoint(file).load(phase)["epochs"]
        [{'number': 1}]
    """

    def __init__(self, path: Path, every: int = 1) -> None:
        self.path = path
        self.every = every

    def load(self, phase: Any) -> dict[str, Any] | None:
        """What `save` stored last; None where there is nothing.

        Args:
            phase: the settings that the training has now, a dataclass.

        Raises:
            SecateurError: the file cannot be read, or was stored by a training with other settings.
        """
        if not self.path.exists():
            return None
        try:
            content = torch.load(self.path, weights_only=True)
            settings, state = content["settings"], content["state"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise SecateurError(
                f"{self.path}: cannot be read as a checkpoint ({error}); delete it to start that training again"
            ) from error
        had, now = ({**_defaults(phase), **each} for each in (settings, dataclasses.asdict(phase)))
        if had != now:
            other = [f"{key}={had.get(key)!r} (now {now[key]!r})" for key in now if had.get(key) != now[key]]
            raise SecateurError(
                f"{self.path}: a checkpoint of a training with other settings: {', '.join(other) or 'fewer of them'}; "
                "delete it to start again, or go on with the settings that it was made with"
            )
        return dict(state)

    def save(self, phase: Any, state: Mapping[str, Any]) -> None:
        """Store the state of a training whose settings are ``phase``; in epochs between two saves nothing happens.

        Raises:
            SecateurError: it cannot be written; what was there before is untouched.
        """
        done = len(state["epochs"])
        if done % self.every and done != getattr(phase, "epochs", done):
            return
        with whole_or_not_at_all(self.path) as beside:
            torch.save({"settings": beyond_defaults(phase), "state": dict(state)}, beside)


def beyond_defaults(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass, and of those in it, that are not at their defaults: a field that is added later, with
    what was done before as its default, then leaves what was written before as it was.

    Example:
        >>> from secateur.recipes.train import Phase
        >>> beyond_defaults(Phase("dense", epochs=2, batch=8, lr=0.1, seed=0))
        {'name': 'dense', 'epochs': 2, 'batch': 8, 'lr': 0.1}
    """  # noqa: D205
    defaults = _defaults(settings)
    found = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {
        name: beyond_defaults(value) if dataclasses.is_dataclass(value) else value
        for name, value in found.items()
        if name not in defaults or value != defaults[name]
    }


def _defaults(settings: Any) -> dict[str, Any]:
    """What the fields of a dataclass are unless told otherwise."""
    found = {}
    for field in dataclasses.fields(settings):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found
