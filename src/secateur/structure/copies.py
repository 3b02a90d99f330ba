"""Copies of a model, so that the model itself is left alone: with its numbers, and with fake tensors for a trace."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode

from secateur.structure.fakes import fake_of
from secateur.structure.tensors import slots_of

__all__ = ["deep_copy", "fake_copy"]

M = TypeVar("M", bound=nn.Module)

#: What a copy shares with the original.
_SHARED = frozenset({int, float, complex, bool, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size})
_FOLDERS = frozenset({dict, OrderedDict, list, set})


def deep_copy(model: M) -> M:
    """What ``copy.deepcopy`` gives, with the marks of parameters (as "no weight decay"), which that leaves behind."""
    memo: dict[int, Any] = {}
    made = copy.deepcopy(model, memo)
    for parameter in model.parameters():
        twin = memo.get(id(parameter))
        if not isinstance(twin, nn.Parameter) or isinstance(twin, FakeTensor):
            continue  # made by a module that copies itself in its own way, or without numbers
        for key in vars(parameter).keys() - vars(twin).keys():
            setattr(twin, key, _mark(vars(parameter)[key], memo))
    return made


def _mark(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of a parameter's mark; the mark itself where it cannot be copied, such as a group of processes."""
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # noqa: BLE001 - whatever it raises, the model could be copied without it
        return value


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """What ``copy.deepcopy`` gives, with fake tensors for tensors.

    Modules that are copied in the ordinary way are taken apart here, for ``deepcopy`` itself takes most of the
    time of a trace; it does all the rest, and knows what has been copied already.
    """
    memo: dict[int, Any] = {}
    for slot in slots_of(model).values():
        if id(slot.tensor) not in memo and (made := fake_of(mode, slot.tensor)) is not None:
            memo[id(slot.tensor)] = made
    # The innermost first, for a module may look at its children when it takes its state.
    ordinary = [module for module in reversed(list(model.modules())) if _copies_as_usual(type(module))]
    for module in ordinary:
        memo[id(module)] = type(module).__new__(type(module))
    with FakeCopyMode(mode):
        for module in ordinary:
            state: Any = module.__reduce_ex__(2)[2]
            memo[id(module)].__setstate__({key: _copied(value, memo) for key, value in state.items()})
        return copy.deepcopy(model, memo)


def _copies_as_usual(kind: type[nn.Module]) -> bool:
    """Whether a module is copied by taking its state, and giving a copy of that to a new module."""
    usual = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
    return usual and not any(hasattr(kind, name) for name in _OTHERWISE)


_OTHERWISE = ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__", "__slots__")


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _SHARED:
        return value
    known = memo.get(id(value), memo)
    if known is not memo:
        return known
    if kind in _FOLDERS and (not value or kind in (dict, OrderedDict)):
        memo[id(value)] = made = kind()
        for key, item in value.items() if value else ():
            made[key if type(key) is str else copy.deepcopy(key, memo)] = _copied(item, memo)
        return made
    return copy.deepcopy(value, memo)
