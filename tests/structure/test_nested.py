"""Tensors in what a model returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from secateur.structure.nested import tensors_in


@dataclass
class Output:
    """An output class of a user's own."""

    logits: Tensor
    states: tuple[Tensor, ...] = ()
    name: str = "x"


class Named(NamedTuple):
    values: Tensor


class Plain:
    def __init__(self, tensor: Tensor) -> None:
        self.inside = {"deep": [tensor]}


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda t: t, 1),
        (lambda t: (t, [t, None, 3]), 2),
        (lambda t: {"a": t, "b": {"c": t}}, 2),
        (lambda t: Output(t, (t, t)), 3),
        (Named, 1),
        (Plain, 1),
        (lambda t: "nothing", 0),
        (lambda t: {"past_key_values": t, "logits": t}, 1),
    ],
)
def test_tensors_are_found_in_outputs_of_any_class(make: Any, count: int) -> None:
    assert len(tensors_in(make(torch.zeros(1)))) == count
