"""A module whose output is multiplied by constants: what is left of gates that no weight can take up."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["SCALE", "scale_output_"]

#: The buffer that holds the factors.
SCALE = "output_scale"
_DIM = "output_scale_dim"


def scale_output_(module: nn.Module, factors: torch.Tensor, dim: int) -> None:
    """Let a module multiply its output along a dimension, in place; once for each module.

    Class and names in a state dict stay; the factors are one more buffer, ``output_scale``.

    Args:
        module: returns one tensor.
        factors: ``(S,)``, one for each position.
        dim: the dimension, counted from the first.

    Example:
        >>> layer = torch.nn.Identity()
        >>> scale_output_(layer, torch.tensor([2.0, 0.0]), dim=1)
        >>> layer(torch.ones(1, 2)).tolist()
        [[2.0, 0.0]]
    """
    module.register_buffer(SCALE, factors)
    setattr(module, _DIM, dim)
    module.register_forward_hook(_scaled)


def _scaled(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    factors: torch.Tensor = getattr(module, SCALE)
    shape = [-1 if place == getattr(module, _DIM) else 1 for place in range(output.dim())]
    return output * factors.to(output).view(shape)
