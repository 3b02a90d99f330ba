"""The tensors in what a model returns, whatever holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["is_cache", "tensors_in"]

_CACHE_KEYS = frozenset({"past_key_values", "past_key_value", "cache_params"})


def is_cache(value: Any) -> bool:
    """Whether an object holds keys and values that only the model itself reads again: their widths follow a cut."""
    return any(kind.__name__.endswith("Cache") for kind in type(value).__mro__)


def tensors_in(value: Any, depth: int = 6) -> list[torch.Tensor]:
    """All tensors in an output: containers, dataclasses and plain objects are looked into, caches are not."""
    if isinstance(value, torch.Tensor):
        return [value]
    if depth == 0 or value is None or isinstance(value, (str, bytes, int, float, bool, nn.Module)) or is_cache(value):
        return []
    if isinstance(value, Mapping):
        items: list[Any] = [item for key, item in value.items() if key not in _CACHE_KEYS]
    elif isinstance(value, (list, tuple, set, frozenset)):
        items = list(value)
    elif is_dataclass(value):
        items = [getattr(value, f.name, None) for f in fields(value)]
    else:
        items = list(vars(value).values()) if hasattr(value, "__dict__") else []
    return [tensor for item in items for tensor in tensors_in(item, depth - 1)]
