"""A budget over very many gates, whose multipliers move only every few steps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.gated import ConvNet, conv_structure
from tests.pruning.test_pruner import batch, resume, saved, train
from torch import Tensor

import secateur as sc
from secateur.errors import BudgetError, GateError
from secateur.pruning import pressure
from secateur.pruning.attach import attach
from secateur.pruning.pruner import Pruner

BETWEEN = 3


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks are treated as large ones are."""
    monkeypatch.setattr(pressure, "GATES_AT_ONCE", 1)
    monkeypatch.setattr(pressure, "STEPS_BETWEEN", BETWEEN)
    monkeypatch.setattr(pressure, "FEWEST_MOVES", 1)


def made(
    method: sc.Method | None = None, steps: int = 40, **beside: object
) -> tuple[ConvNet, Pruner, torch.optim.Optimizer]:
    torch.manual_seed(5)
    net = ConvNet(dropout=0.3).double()
    budget = sc.Budget(keep_params=0.5, steps=steps, hold=0)
    pruner = attach(net, structure=conv_structure(), method=method, budget=budget, **beside)
    return net, pruner, torch.optim.Adam(pruner.param_groups(lr=1e-2))


def pressure_on(pruner: Pruner) -> list[Tensor]:
    """Its gradient; none before the first move."""
    term = pruner.penalty()
    return [*torch.autograd.grad(term, list(pruner.gates.parameters()))] if term.requires_grad else []


def test_a_state_of_another_budget_leaves_the_model_whole() -> None:
    def build(method: sc.Method | None = None, **beside: object) -> tuple[ConvNet, Pruner]:
        torch.manual_seed(5)
        net = ConvNet().double()
        method = sc.HardConcrete(clamp=None) if method is None else method
        return net, attach(net, structure=conv_structure(), method=method, **beside)  # type: ignore[arg-type]

    net, pruner = build(budget=sc.Budget(keep_params=0.5))
    optimizer = torch.optim.Adam(pruner.param_groups(lr=1e-3))
    with torch.no_grad():
        pruner.gates.trained[0][:5] = -30.0
    assert pruner.shrink(optimizer, checks=1).removed
    state = pruner.state_dict()
    penalty = build(penalty=sc.Penalty(0.1, unit="density"))[1].state_dict()
    cases = [
        ({"budget": sc.Budget(keep_params=0.6)}, state, BudgetError, "was steering to"),
        ({"penalty": sc.Penalty(0.1, unit="density")}, state, BudgetError, "the state of a budget"),
        ({}, state, GateError, "saved with a budget"),
        ({"budget": sc.Budget(keep_params=0.5)}, penalty, GateError, "another kind of budget or penalty"),
    ]
    for beside, given, error, message in cases:
        other, second = build(**beside)
        before, own = {name: tensor.clone() for name, tensor in other.state_dict().items()}, str(second.state_dict())
        with pytest.raises(error, match=message):
            second.load_state_dict(given)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
        assert str(second.state_dict()) == own
    other, second = build(budget=sc.Budget(keep_params=0.5))
    second.load_state_dict(state)
    other.load_state_dict(net.state_dict())


@pytest.mark.usefixtures("few_at_once")
def test_gradients_that_are_held_for_other_gates_are_refused() -> None:
    net, pruner, optimizer = made()
    train(net, pruner, optimizer, range(BETWEEN + 1))
    state = pruner.state_dict()
    state["pressure"]["held"]["grads"] = [grad[:-1] for grad in state["pressure"]["held"]["grads"]]
    _, second, _ = made()
    with pytest.raises(GateError, match="gates of other shapes"):
        second.load_state_dict(state)
    second.load_state_dict(pruner.state_dict())


@pytest.mark.usefixtures("few_at_once")
def test_multipliers_and_gradients_stay_between_two_moves() -> None:
    net, pruner, optimizer = made()
    seen = []
    for step in range(3 * BETWEEN):
        train(net, pruner, optimizer, range(step, step + 1))
        seen.append((pruner.controller.steps, pruner.controller.push, pressure_on(pruner)))
    assert [steps for steps, _, _ in seen] == [0, 0, 3, 3, 3, 6, 6, 6, 9]
    for at in range(BETWEEN - 1, len(seen) - 1):
        moved = (at + 1) % BETWEEN == BETWEEN - 1
        same = all(torch.equal(a, b) for a, b in zip(seen[at][2], seen[at + 1][2], strict=True))
        assert same != moved


@pytest.mark.usefixtures("few_at_once")
def test_the_gradient_at_a_move_is_that_of_the_budget_then() -> None:
    net, pruner, optimizer = made()
    train(net, pruner, optimizer, range(BETWEEN))
    held = pressure_on(pruner)
    parameters = list(pruner.gates.parameters())
    term = pruner.controller.loss(pruner.gates.prob_open())
    assert term.item() == pytest.approx(pruner.penalty().item())
    for ours, now in zip(held, torch.autograd.grad(term, parameters), strict=True):
        torch.testing.assert_close(ours, now)


@pytest.mark.usefixtures("few_at_once")
@pytest.mark.parametrize("killed", range(BETWEEN, 2 * BETWEEN))
def test_a_run_resumes_bit_for_bit_between_two_moves(killed: int) -> None:
    net, pruner, optimizer = made()
    train(net, pruner, optimizer, range(killed))
    file = saved(net, pruner, optimizer)
    expected = train(net, pruner, optimizer, range(killed, 12))

    net, pruner, optimizer = made(seed=99)
    resume(file, net, pruner, optimizer)
    assert train(net, pruner, optimizer, range(killed, 12)) == expected


@pytest.mark.usefixtures("few_at_once")
def test_what_changes_in_every_step_is_never_held() -> None:
    _, with_norms, _ = made(sc.Magnitude())
    assert with_norms._pressure.between(with_norms.gates) == 1
    net = ConvNet().double()
    penal = attach(net, structure=conv_structure(), penalty=sc.Penalty(0.1, unit="density"))
    assert penal._pressure.between(penal.gates) == 1


@pytest.mark.parametrize(("steps", "between"), [(1999, 1), (4000, 2), (7900, 3), (10**6, pressure.STEPS_BETWEEN)])
def test_few_gates_move_their_budget_a_thousand_times_while_it_falls(steps: int, between: int) -> None:
    _, pruner, _ = made(steps=steps)
    assert pruner._pressure.between(pruner.gates) == between


def test_a_short_ramp_is_followed_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure, "GATES_AT_ONCE", 1)
    _, pruner, _ = made()
    assert pruner._pressure.between(pruner.gates) == 1


@pytest.mark.usefixtures("few_at_once")
def test_accumulated_minibatches_each_get_the_held_term() -> None:
    net, pruner, optimizer = made()
    train(net, pruner, optimizer, range(BETWEEN))
    net.eval()
    x, y = batch(0)
    with torch.no_grad():
        alone = copy.deepcopy(pruner.penalty())
        total = sum(pruner.loss(lambda: F.cross_entropy(net(x), y), scale=0.5) for _ in range(2))
    torch.testing.assert_close(total - F.cross_entropy(net(x), y), alone)


@pytest.mark.usefixtures("few_at_once")
def test_a_model_that_is_converted_between_two_moves_gets_the_term_anew() -> None:
    net, pruner, optimizer = made()
    train(net, pruner, optimizer, range(BETWEEN))
    before = pressure_on(pruner)
    net.float()
    after = pressure_on(pruner)
    assert {grad.dtype for grad in after} == {torch.float32}
    for now, then in zip(after, before, strict=True):
        torch.testing.assert_close(now, then.float())
