"""A gate that torch cannot put on a module leaves it, and the whole model, as it was."""

from __future__ import annotations

import pytest
import torch
from tests.pruning.test_placement import state_of
from torch import Tensor, nn

import secateur as sc
from secateur.errors import GateError
from secateur.pruning.registering import register_gate


class Final(nn.Linear):
    """A layer from whose class none can be derived."""

    def __init_subclass__(cls, **_: object) -> None:
        raise TypeError("is final")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 8), Final(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def test_the_tensor_keeps_its_place() -> None:
    layer = Final(3, 2)
    layer.register_buffer("scale", torch.ones(3), persistent=False)
    layer.register_buffer("shift", torch.ones(3))
    weight, before = layer.weight, state_of(layer)
    for key in ("weight", "scale"):
        with pytest.raises(GateError, match=f"{key} of a Final takes no gate: .* TypeError: is final.*exclude="):
            register_gate(layer, key, nn.Identity())
    assert state_of(layer) == before
    assert layer.weight is weight
    assert list(layer._buffers) == ["scale", "shift"]
    assert list(layer.state_dict()) == ["weight", "bias", "shift"]


def test_gates_that_were_placed_before_are_taken_off_again() -> None:
    net, x = Net(), torch.randn(5, 4)
    before, hooks = state_of(net), [len(module._forward_hooks) for module in net.modules()]
    with pytest.raises(GateError, match="weight of a Final takes no gate"):
        sc.attach(net, examples=(x,))
    assert state_of(net) == before
    assert [len(module._forward_hooks) for module in net.modules()] == hooks
    assert [type(module) for module in net.children()] == [nn.Linear, nn.Linear, Final]
    assert sc.attach(net, examples=(x,), gates=[sc.Rule(exclude="second")]).groups
