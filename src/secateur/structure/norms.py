"""RMSNorm layers, recognised by what they compute, so that their width can be cut exactly.

``y = x rsqrt(mean(x^2) + eps) (w + offset)`` over the last dimension, ``offset`` 0 or 1 (Gemma). When ``d - d'``
of the ``d`` inputs are zero, the same outputs come from ``d'`` inputs with ``w' = (w + offset) sqrt(d / d') - offset``
and ``eps' = eps d / d'``: the sum of squares is the same, and only its divisor changes. (Algebra; no paper.)

Any module without children, with a single one-dimensional parameter and an eps that can be found, is
tried on numbers; names do not matter. While a model is traced, its RMSNorms run as one operator.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

__all__ = ["RmsNorm", "as_one_operator", "find_rms_norms"]

#: Agreement asked for; such layers often compute in float32 whatever their input.
_TOLERANCE = 1e-4
_LARGEST_EPS = 0.01


@dataclass(frozen=True)
class RmsNorm:
    """An RMSNorm layer of a model.

    Args:
        weight: qualified name of its weight.
        eps: qualified name of the attribute that holds its eps.
        eps_value: that eps.
        offset: what it adds to its weight, 0 or 1.
    """

    weight: str
    eps: str
    eps_value: float
    offset: float


def find_rms_norms(model: nn.Module) -> dict[str, RmsNorm]:
    """The RMSNorm layers of a model by their module path (the first one of a shared module)."""
    found: dict[str, RmsNorm] = {}
    tried: dict[tuple[type, str, float], tuple[str, float] | None] = {}
    for path, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if len(parameters) != 1 or any(True for _ in module.children()) or any(True for _ in module.buffers()):
            continue
        ((key, weight),) = parameters.items()
        if weight.ndim != 1 or not weight.is_floating_point():
            continue
        for name, value in vars(module).items():
            if type(value) is not float or not 0 < value <= _LARGEST_EPS:
                continue
            kind = (type(module), name, value)
            if kind not in tried:
                tried[kind] = _recognise(module, key, name)
            if (known := tried[kind]) is not None:
                dot = f"{path}." if path else ""
                found[path] = RmsNorm(f"{dot}{key}", f"{dot}{known[0]}", value, known[1])
                break
    return found


def _recognise(module: nn.Module, key: str, eps: str) -> tuple[str, float] | None:
    """Whether a copy of a module computes an RMSNorm whose eps is that attribute; gives (attribute, offset)."""
    generator = torch.Generator().manual_seed(0)
    try:
        twin = copy.deepcopy(module).to_empty(device="cpu").double().eval()
        weight = getattr(twin, key)
        x = torch.randn(3, weight.shape[0], generator=generator, dtype=torch.float64)
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
            for offset in (0.0, 1.0):
                # Twice, with an eps of its own size and a large one, so that it is this attribute that is added.
                agree = True
                for value in (getattr(module, eps), 0.37):
                    setattr(twin, eps, value)
                    agree = agree and torch.allclose(
                        twin(x).double(), _formula(x, weight, value, offset), rtol=_TOLERANCE, atol=_TOLERANCE
                    )
                if agree:
                    return eps, offset
    except Exception:  # noqa: BLE001 - a module that cannot be called like this is no RMSNorm
        return None
    return None


def _formula(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight + offset)


@functools.cache
def _operator() -> Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor]:
    """The operator, defined at its first use: importing the package adds nothing to torch."""

    def compute(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        return _formula(x, weight, eps, offset).contiguous()

    def shape(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        return x.new_empty(x.shape, dtype=torch.result_type(x, weight))

    operator = torch.library.custom_op("secateur::rms_norm", compute, mutates_args=())
    operator.register_fake(shape)
    return cast("Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor]", operator)


def as_one_operator(model: nn.Module, norms: Mapping[str, RmsNorm]) -> None:
    """Let the RMSNorms of a (copied) model run as the operator ``secateur::rms_norm``, in place."""
    for path, norm in norms.items():
        module = model.get_submodule(path)
        module.forward = functools.partial(
            _forward, module, norm.weight.rpartition(".")[2], norm.eps.rpartition(".")[2], norm.offset
        )


def _forward(module: nn.Module, weight: str, eps: str, offset: float, x: torch.Tensor) -> torch.Tensor:
    return _operator()(x, getattr(module, weight), float(getattr(module, eps)), offset)
