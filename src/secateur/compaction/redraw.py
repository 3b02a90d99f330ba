"""Other numbers for the same model: drawn anew, changed in the last place, or those of a larger one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from secateur.compaction.mask import copied
from secateur.errors import CompactionError
from secateur.structure.cut import CutPlan, cut_
from secateur.structure.tensors import distinct_tensors, first_names, named_tensors

__all__ = ["load_cut_", "nudge_", "overlaps", "redraw_"]

#: By how many units in the last place `nudge_` changes a number at most.
N_PLACES = 4


def redraw_(dense: nn.Module, model: nn.Module, generator: torch.Generator, redraw_buffers: bool) -> None:
    """Draw every floating tensor of the dense copy anew, scaled like the model's own."""
    old, first = named_tensors(model), first_names(model)
    for name, tensor in named_tensors(dense).items():
        if first[name] == name and not overlaps(tensor):
            source = old[name].detach().to(tensor.dtype)
            keeps = not redraw_buffers and not isinstance(tensor, nn.Parameter)
            with torch.no_grad():
                tensor.copy_(source if keeps else _drawn(name, source, generator))


def nudge_(module: nn.Module, generator: torch.Generator) -> None:
    """Change every floating number by up to `N_PLACES` units in its last place."""
    for tensor in distinct_tensors(module).values():
        if tensor.is_floating_point() and not overlaps(tensor):
            by = torch.rand(tensor.shape, dtype=tensor.dtype, generator=generator).to(tensor.device) * 2 - 1
            with torch.no_grad():
                tensor.mul_(1 + by * (N_PLACES * torch.finfo(tensor.dtype).eps))


def _drawn(name: str, old: Tensor, generator: torch.Generator) -> Tensor:
    """New numbers: positive where all were (variances), else normal at a scale that keeps layers alive."""
    if not (old.is_floating_point() or old.is_complex()):
        return old
    size = math.prod(old.shape[1:]) if old.dim() > 1 else 4
    new = torch.randn(old.shape, dtype=old.dtype, generator=generator) / math.sqrt(max(size, 1))
    if old.is_floating_point():
        uniform = torch.rand(old.shape, dtype=old.dtype, generator=generator)
        positive = bool((old >= 0).all()) and bool((old > 0).any())
        if positive or name.endswith("var"):
            new = (uniform + 0.5) * (float(old[old.isfinite()].abs().mean()) if positive else 1.0)
    return torch.where(old.isfinite(), new.to(old.device), old)


def overlaps(tensor: Tensor) -> bool:
    """Whether one number stands at several positions (an expanded buffer), so that it cannot be written to."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def load_cut_(small: nn.Module, dense: nn.Module, plan: CutPlan) -> None:
    """Give the small model the numbers of the dense one, as the plan cuts them."""
    twin = copied(dense)
    cut_(twin, plan)
    values = named_tensors(twin)
    for name, tensor in named_tensors(small).items():
        if name not in values or overlaps(tensor):
            continue
        if values[name].shape != tensor.shape:
            raise CompactionError(
                f"{name} of the compact model has shape {tuple(tensor.shape)}, expected {tuple(values[name].shape)}: "
                "it was not cut from this model by this keep."
            )
        with torch.no_grad():
            tensor.copy_(values[name])
