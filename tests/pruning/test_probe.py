from __future__ import annotations

import pytest
import torch
from tests.gated import DTYPE, ConvNet, Mlp, conv_net, gate, images, mlp, mlp_structure
from torch import Tensor

from secateur.errors import GateError
from secateur.pruning.probe import evaluating, probe
from secateur.structure.example import Example


def example() -> list[Example]:
    return [Example((torch.randn(4, 3, dtype=DTYPE),))]


def test_a_gated_model_passes_and_is_left_as_it_was() -> None:
    net, _ = conv_net(dropout=0.5)
    net.bn1.eval()
    modes = [m.training for m in net.modules()]
    examples = [Example((images(),)), Example((images(2),))]
    mean, state = net.bn2.running_mean.clone(), torch.get_rng_state()
    probe(net, examples)
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(net.bn2.running_mean, mean)
    assert torch.equal(torch.get_rng_state(), state)
    assert not net.fc1.parametrizations.weight[0]._forward_hooks


class Referring(Mlp):
    """Computes with a reference to its weight that it took when it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = (self.fc2.weight,)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc1(x)) @ self.taken[0].T + self.fc2.bias


class Elsewhere(Mlp):
    """Reads a copy of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.copied = (self.fc2.weight.detach().clone().double(),)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc1(x)) @ self.copied[0].T + self.fc2.bias


@pytest.mark.parametrize(
    ("build", "message"),
    [(Referring, r"fc2\.weight: read without its gate"), (Elsewhere, r"fc2\.weight: its gate is never read")],
)
def test_weights_that_are_read_round_their_gate_are_refused(build: type[Mlp], message: str) -> None:
    net = build().double()
    gate(net, mlp_structure())
    with pytest.raises(GateError, match=message):
        probe(net, example())


def test_gates_that_leave_something_open_are_refused() -> None:
    net, _ = mlp()
    with torch.no_grad():
        gate = net.fc2.parametrizations.weight[0]
        gate.rows.clear()
        gate.maps[1].on(torch.device("cpu")).fill_(6)  # no position is gated any more
    with pytest.raises(GateError, match=r"fc2\.weight: gates at 0 leave some of it"):
        probe(net, ())


def test_modes_and_random_state_come_back_after_an_error() -> None:
    net = ConvNet(dropout=0.5)
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), evaluating(net):
        torch.rand(3 // int(net.drop.training))
    assert all(m.training for m in net.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_hooks_are_gone_after_a_forward_that_fails() -> None:
    net, _ = mlp()
    hooks = [len(m._forward_hooks) for m in net.modules()]
    with pytest.raises(RuntimeError):
        probe(net, [Example((torch.randn(4, 99, dtype=DTYPE),))])
    assert [len(m._forward_hooks) for m in net.modules()] == hooks
