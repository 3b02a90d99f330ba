"""Copies of a model with fake tensors: what deepcopy gives, with nothing of the model in them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from secateur.structure.copies import deep_copy, fake_copy
from secateur.structure.tensors import named_tensors


class Odd(nn.Module):
    """Keeps all that a module might keep."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.twin = self.layer
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.layer.weight
        self.shared: list[Any] = []
        self.shared_too = self.shared
        self.held = {"layer": self.layer, 3: [self.tied], "inner": {}}
        self.bare = torch.zeros(2)
        self.bound = self.layer.forward
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("absent", None)
        self.lstm = nn.LSTM(3, 3)
        self.register_forward_pre_hook(lambda module, args: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Nothing."""
        return x


class Own(nn.Module):
    """Copies itself in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.copied = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Own:
        made = Own()
        made.weight, made.copied = copy.deepcopy(self.weight, memo), True
        return made


def test_a_copy_is_what_deepcopy_gives() -> None:
    model = Odd()
    made: Any = fake_copy(model, FakeTensorMode())
    assert type(made) is Odd
    assert made.twin is made.layer is made.held["layer"]
    assert made.held[3] == [made.tied]
    assert made.tied.weight is made.layer.weight is not model.layer.weight
    assert made.shared is made.shared_too is not model.shared
    assert made.bound.__self__ is made.layer
    assert made.lstm._flat_weights[0] is made.lstm.weight_ih_l0
    assert len(made._forward_pre_hooks) == 1
    assert vars(made).keys() == vars(model).keys()
    assert [name for name, _ in made.named_modules()] == [name for name, _ in model.named_modules()]


def test_all_tensors_of_a_copy_are_fake_and_those_of_the_model_are_not() -> None:
    model = Odd()
    made: Any = fake_copy(model, FakeTensorMode())
    tensors = {**named_tensors(made), "bare": made.bare}
    assert all(isinstance(tensor, FakeTensor) for tensor in tensors.values())
    assert {name for name, _ in made.named_parameters()} == {name for name, _ in model.named_parameters()}
    assert not any(isinstance(tensor, FakeTensor) for tensor in (*named_tensors(model).values(), model.bare))
    made.held["inner"]["new"] = 1
    made.layer.in_features = 7
    assert (model.held["inner"], model.layer.in_features) == ({}, 3)


@pytest.mark.parametrize("inside", [False, True])
def test_a_module_that_copies_itself_does_so(inside: bool) -> None:
    model = nn.Sequential(Own(), nn.Linear(2, 2)) if inside else Own()
    made: Any = fake_copy(model, FakeTensorMode())
    own = made[0] if inside else made
    assert own.copied
    assert isinstance(own.weight, FakeTensor)


def test_a_deep_copy_keeps_the_marks_of_parameters() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].weight._no_weight_decay = True
    model[0].weight.settings = {"lr": 0.1}
    model[0].bias.loader = model[0].extra_repr  # bound to its module
    model[1].bias.lines = (line for line in ())  # cannot be copied
    made = deep_copy(model)
    assert made[0].weight is made[1].weight is not model[0].weight
    assert made[0].weight._no_weight_decay is True
    assert made[0].weight.settings == {"lr": 0.1}
    assert made[0].weight.settings is not model[0].weight.settings
    assert made[0].bias.loader.__self__ is made[0]
    assert made[1].bias.lines is model[1].bias.lines
    assert not hasattr(made[1].bias, "_no_weight_decay")
    assert deep_copy(Own()).copied
