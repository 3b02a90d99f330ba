"""A layer that reads only some positions of its input: how inputs are cut more finely than what produces them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["Select", "plain_class", "select_input_"]


class Select(nn.Module):
    """Mixed into a layer's own class: the layer reads ``input[..., selected]``, and is otherwise what it was.

    ``isinstance``, ``.weight`` and the names in a state dict stay; the positions are one more buffer, ``selected``
    (int64, along the channels of a convolution, along the last dimension of any other layer).

    Example:
        >>> layer = torch.nn.Linear(2, 3)
        >>> select_input_(layer, torch.tensor([0, 4]))
        >>> layer
        SelectLinear(in_features=2, out_features=3, bias=True, reads 2 positions of its input)
        >>> layer(torch.zeros(7, 5)).shape
        torch.Size([7, 3])
    """

    selected: torch.Tensor
    select_dim: int

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: A002 - torch.nn's name for it
        """The layer's own forward, on the selected positions."""
        return super().forward(input.index_select(self.select_dim, self.selected), *args, **kwargs)

    def extra_repr(self) -> str:
        """The layer's own description, and how many positions it reads."""
        return f"{super().extra_repr()}, reads {self.selected.numel()} positions of its input"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so a copy or pickle can only name the class that it was made from.
        _, _, *state = tuple(super().__reduce_ex__(protocol))
        return _blank, (plain_class(self),), *state


def select_input_(layer: nn.Module, selected: torch.Tensor) -> None:
    """Let a layer read only the selected positions of its input, in place: every alias of the layer sees it."""
    layer.register_buffer("selected", selected)
    # Counted from the end, so that it holds for inputs with and without a batch.
    dim = -1 - len(layer.weight.shape[2:]) if isinstance(layer, _ConvNd) else -1
    layer.__dict__["select_dim"] = dim
    layer.__class__ = _select_class(type(layer))


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before `select_input_`."""
    return type(module).__bases__[1] if isinstance(module, Select) else type(module)


_made: dict[type[nn.Module], type[nn.Module]] = {}


def _select_class(plain: type[nn.Module]) -> type[nn.Module]:
    if plain not in _made:
        _made[plain] = type(f"Select{plain.__name__}", (Select, plain), {"__module__": plain.__module__})
    return _made[plain]


def _blank(plain: type[nn.Module]) -> nn.Module:
    made = _select_class(plain)
    return made.__new__(made)
