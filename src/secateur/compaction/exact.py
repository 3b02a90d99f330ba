"""A run without what makes two runs differ: numbers of a lower precision, and masks that are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Exact"]

aten = torch.ops.aten


class Exact(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises every cast to a lower precision and turns dropout off, whoever asks for it.

    Off is every operator that draws for each element, and through which a trace lets units pass: a smaller model
    draws fewer numbers, so that its elements would meet others. What else is drawn, the trace takes for a constant.

    Args:
        raised: the type to which each lower one is raised.
    """

    def __init__(self, raised: Mapping[torch.dtype, torch.dtype]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.raised = raised

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "dtype" in kwargs:
            kwargs["dtype"] = self.raised.get(kwargs["dtype"], kwargs["dtype"])
        if func.overloadpacket is aten.bernoulli_:
            return args[0].fill_(1)
        if func.overloadpacket is aten.bernoulli:
            return kwargs["out"].resize_(args[0].shape).fill_(1) if "out" in kwargs else torch.ones_like(args[0])
        if func.overloadpacket is aten.native_dropout:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if func.overloadpacket in (aten.rrelu_with_noise, aten.rrelu_with_noise_):
            return _mean_slope(func, *args, **kwargs)
        names = [argument.name for argument in func._schema.arguments]
        if "dropout_p" in names:
            place = names.index("dropout_p")
            if place < len(args):
                args = (*args[:place], 0.0, *args[place + 1 :])
            elif "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


def _mean_slope(
    func: Any,
    x: Tensor,
    noise: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """RReLU with the slope that it has in evaluation; ``noise`` is the slope that its gradient reads in training."""
    if training:
        noise.copy_(torch.where(x > 0, 1.0, (lower + upper) / 2))
    result: Tensor = func(x, noise, lower, upper, False, generator)
    return result
