"""The moving average of all parameters along a training.

Index conventions: none; parameters are averaged one by one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Average"]


class Average:
    r"""An exponential moving average of a model's parameters, those of gates included, without the bias of its start.

    After t updates the average is :math:`\frac{1 - m}{1 - m^t} \sum_{i \le t} m^{t - i} p_i`.

    Args:
        memory: m, in (0, 1); 1 / (1 - m) steps are remembered.

    Example:
        >>> model, average = nn.Linear(1, 1, bias=False), Average(0.5)
        >>> for value in (1.0, 4.0):
        ...     with torch.no_grad():
        ...         _ = model.weight.fill_(value)
        ...     average.update(model)
        >>> with average.applied(model):
        ...     model.weight.item()
        3.0
        >>> model.weight.item()
        4.0

    Source: the evaluation of the hard concrete paper's authors, who average with a memory of 0.999.
    """

    def __init__(self, memory: float) -> None:
        self.memory = memory
        self.updates = 0
        self._sums: list[Tensor] = []

    @property
    def sums(self) -> list[Tensor]:
        """What is averaged, one tensor for each parameter; to be kept in step where parameters become smaller."""
        return self._sums

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After an optimizer step: take the parameters in."""
        parameters = [parameter.detach() for parameter in model.parameters()]
        if not self._sums:
            self._sums = [torch.zeros_like(parameter) for parameter in parameters]
        torch._foreach_mul_(self._sums, self.memory)
        torch._foreach_add_(self._sums, parameters, alpha=1.0 - self.memory)
        self.updates += 1

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within it the model has the averaged parameters, afterwards its own."""
        own = [parameter.detach().clone() for parameter in model.parameters()]
        self.end(model)
        try:
            yield
        finally:
            _fill(model, own)

    def end(self, model: nn.Module) -> None:
        """Give the model the averaged parameters; without an update it stays as it is."""
        if self.updates:
            whole = 1.0 - self.memory**self.updates
            _fill(model, [total / whole for total in self._sums])

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs."""
        return {"updates": self.updates, "sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.updates, self._sums = int(state["updates"]), list(state["sums"])


@torch.no_grad()
def _fill(model: nn.Module, values: list[Tensor]) -> None:
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.copy_(value)
