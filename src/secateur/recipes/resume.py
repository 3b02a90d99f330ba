"""Records that a command finds again: what was found, beside the settings that it was found with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.recipes.record import versions, write_text

__all__ = ["keep", "kept"]

#: Version of the layout; other versions are refused, never guessed at.
FORMAT = 1


def keep(path: Path, settings: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Write what was found with these settings, plain JSON values both, whole or not at all."""
    content = {"format": FORMAT, "settings": settings, "versions": versions(), "found": found}
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def kept(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `keep` wrote for these settings; None where there is no file.

    Raises:
        SecateurError: the file is of other settings, of another version, or no such record.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "point.json"
        >>> keep(file, {"seed": 0}, {"accuracy": 98.5})
        >>> kept(file, {"seed": 0})
        {'accuracy': 98.5}
        >>> kept(file, {"seed": 1})
        Traceback (most recent call last):
        ...
        secateur.errors.SecateurError: ...point.json: was found with seed=0, not 1; delete it, or ...
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise SecateurError(f"{path}: a record of format {content['format']!r}, expected {FORMAT}; delete it")
        of, found = dict(content["settings"]), dict(content["found"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SecateurError(f"{path}: cannot be read as a record ({error!r}); delete it to find it anew") from error
    now = json.loads(json.dumps(dict(settings)))
    differ = [key for key in {**of, **now} if of.get(key) != now.get(key)]
    if differ:
        listed = ", ".join(f"{key}={of.get(key)!r}, not {now.get(key)!r}" for key in differ)
        raise SecateurError(f"{path}: was found with {listed}; delete it, or write to another directory")
    return found
