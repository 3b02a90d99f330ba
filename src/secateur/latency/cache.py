"""Latency models on disk: what they were measured on, and one JSON file for each."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.compaction.artifact import whole_or_not_at_all
from secateur.errors import LatencyError
from secateur.latency.clock import processor
from secateur.structure.example import Example, summary
from secateur.structure.structure import Structure

__all__ = ["FORMAT", "conditions", "place_of", "read", "write"]

#: Version of the file and of what is measured how; files of others are refused.
FORMAT = 1


def conditions(model: nn.Module, structure: Structure, example: Example, device: torch.device) -> dict[str, Any]:
    """All that a measured time depends on and that can be known, as JSON data.

    Args:
        model: its layers, their settings and precisions; no weights.
        structure: its groups and cost axes.
        example: shapes of the inputs.
        device: by its maker's name.
    """
    layers = [f"{path}: {type(m).__qualname__}({m.extra_repr()})" for path, m in model.named_modules()]
    tensors = [f"{name}: {p.dtype} {tuple(p.shape)}" for name, p in model.named_parameters()]
    groups = [f"{group.name}: {group.size}" for group in structure.groups]
    text = "\n".join([*layers, *tensors, *groups, *map(repr, structure.axes)])
    return {
        "format": FORMAT,
        "device": device.type,
        "processor": processor(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "torch": torch.__version__,
        "inputs": summary(example),
        "layers": hashlib.sha256(text.encode()).hexdigest(),
    }


def place_of(known: Mapping[str, Any]) -> Path:
    """The file of these conditions in the user's cache.

    That is the folder ``secateur/latency`` in ``$SECATEUR_CACHE``, else in ``$XDG_CACHE_HOME``, else in ``~/.cache``.
    """
    named = os.environ.get("SECATEUR_CACHE") or os.environ.get("XDG_CACHE_HOME")
    folder = Path(named) if named else Path.home() / ".cache"
    digest = hashlib.sha256(json.dumps(dict(known), sort_keys=True).encode()).hexdigest()
    return folder / "secateur" / "latency" / f"{digest[:32]}.json"


def read(path: Path, known: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was found under these conditions; None where there is no file.

    Raises:
        LatencyError: the file is of other conditions, or no such file at all.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        of, found = content["conditions"], content["found"]
        differ = [f"{key} {of.get(key)!r}, here {known[key]!r}" for key in known if of.get(key) != known[key]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LatencyError(
            f"{path}: not a measured latency ({error!r}); delete it, or name another by cache="
        ) from error
    if differ:
        raise LatencyError(f"{path}: measured for {'; '.join(differ)}; delete it, or name another by cache=")
    assert isinstance(found, dict)
    return found


def write(path: Path, known: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Keep what was found, whole or not at all."""
    with whole_or_not_at_all(path) as beside:
        beside.write_text(json.dumps({"conditions": known, "found": found}, indent=1) + "\n", encoding="utf-8")
