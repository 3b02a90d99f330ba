"""The eps of RMSNorms: a number of their own, or the one that torch takes for a type where they have none.

A cut gives every RMSNorm that it narrows a number of its own (``norms`` has the algebra). That is the one of the type
in which the model is when it is cut, and stays if the model is converted afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import nn

from secateur.structure.groups import NormWidth

__all__ = ["default_eps", "eps_of", "settle_eps_", "with_eps_of"]


def default_eps(dtype: torch.dtype) -> float:
    """The eps that `torch.nn.RMSNorm` takes where it has none: that of the type in which it computes."""
    return float(torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps)


def eps_of(module: nn.Module, name: str, dtype: torch.dtype) -> float:
    """What an RMSNorm with weights of that type adds, whose eps is that attribute."""
    value = getattr(module, name)
    return default_eps(dtype) if value is None else float(value)


def with_eps_of(model: nn.Module, norms: Iterable[NormWidth]) -> tuple[NormWidth, ...]:
    """Norms of a structure with the eps that they have in the model as it is now."""
    found = {norm.eps: eps for norm, _, _, eps in _held(model, norms)}
    return tuple(replace(norm, eps_value=found.get(norm.eps, norm.eps_value)) for norm in norms)


def settle_eps_(model: nn.Module, norms: Iterable[NormWidth]) -> None:
    """Give RMSNorms that take torch's eps that number for their own, in place."""
    for _, module, name, eps in list(_held(model, norms)):
        if getattr(module, name) is None:
            setattr(module, name, eps)


def _held(model: nn.Module, norms: Iterable[NormWidth]) -> Iterator[tuple[NormWidth, nn.Module, str, float]]:
    """Each norm, its module, the name of the attribute that holds its eps, and its eps."""
    for norm in norms:
        path, _, name = norm.eps.rpartition(".")
        with contextlib.suppress(AttributeError):  # it went with a block
            module = model.get_submodule(path)
            eps = eps_of(module, name, getattr(module, norm.weight.rpartition(".")[2]).dtype)
            yield norm, module, name, eps
