from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.pruning.activity import activity

DTYPE = torch.float64


def made(**more: object) -> tuple[nn.Sequential, sc.Pruner]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    rules = [sc.Rule(), sc.Rule("inputs", where="0"), sc.Rule("weights", where="2")]
    return net, sc.attach(net, examples=(torch.ones(2, 3, dtype=DTYPE),), gates=rules, **more)  # type: ignore[arg-type]


def test_it_is_the_expectation_of_the_gated_weights_squares() -> None:
    net, _ = made()
    chance = torch.rand(4 + 3 + 8, dtype=DTYPE)
    drawn = torch.rand(200_000, 15, dtype=DTYPE) < chance
    first, second = (net[place].parametrizations.weight.original.square() for place in (0, 2))
    mean = (first * drawn[:, 4:7, None].double().mean(0).T).sum()
    mean = mean + (second * (drawn[:, 7:].view(-1, 2, 4) & drawn[:, None, :4]).double().mean(0)).sum()
    torch.testing.assert_close(activity(net, chance), mean, rtol=2e-2, atol=0)
    exact = (first * chance[4:7]).sum() + (second * chance[7:].view(2, 4) * chance[:4]).sum()
    torch.testing.assert_close(activity(net, chance), exact)


@pytest.mark.parametrize("into_gates", [False, True])
@pytest.mark.parametrize("pressure", [{}, {"penalty": sc.Penalty(0.0, unit="density")}])
def test_its_gradient_reaches_the_gates_where_it_is_let(into_gates: bool, pressure: dict[str, object]) -> None:
    net, pruner = made(l2=sc.ActivityL2(0.4, into_gates=into_gates, n_examples=10), **pressure)
    x, y = torch.randn(6, 3, dtype=DTYPE), torch.randn(6, 2, dtype=DTYPE)
    expected = 0.02 * activity(net, pruner.gates.prob_open())
    torch.testing.assert_close(pruner.penalty(), expected)
    pruner.penalty().backward()
    found = [parameter.grad for parameter in pruner.gates.parameters()]
    assert all((grad is not None and bool(grad.any())) == into_gates for grad in found)
    original = net[0].parametrizations.weight.original
    torch.testing.assert_close(original.grad, 0.04 * original.detach() * pruner.gates.prob_open()[4:7].detach())
    assert net[0].bias.grad is None
    torch.manual_seed(1)
    state = pruner.state_dict()
    loss = pruner.loss(lambda: F.mse_loss(net(x), y))
    pruner.load_state_dict(state)
    torch.testing.assert_close(loss, F.mse_loss(net(x), y) + expected)


def test_a_tied_weight_counts_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.fc3.weight = self.fc2.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))

    net = Tied().double()
    pruner = sc.attach(net, examples=(torch.ones(2, 3, dtype=DTYPE),), gates=[sc.Rule("weights", where="fc[23]")])
    ones = torch.ones(pruner.gates.total, dtype=DTYPE)
    torch.testing.assert_close(activity(net, ones), net.fc2.parametrizations.weight.original.square().sum())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "weight=-1.0, expected a finite number"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"weight": 1.0, "n_examples": 0}, "n_examples=0, expected the number"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(sc.BudgetError, match=message):
        sc.ActivityL2(**settings)  # type: ignore[arg-type]


def test_lees_p_norm_is_what_a_penalty_counts() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    method = sc.DifferentiableSparsification(jitter=0.8)
    penalty = sc.Penalty(2.0, n_examples=100)
    pruner = sc.attach(net, examples=(torch.ones(2, 3, dtype=DTYPE),), method=method, penalty=penalty)
    (gate,) = pruner.gates.rules
    count = method.p_norm(gate.tensors, gate.layout).double()
    assert 1 < count.item() < 6
    # |g| = 3 weights, a bias and 2 weights; the 2 biases behind have no gate.
    torch.testing.assert_close(pruner.penalty().double(), (2.0 / 100) * (6 * count.squeeze() + 2), rtol=1e-6, atol=0)
