"""Patterns within a budget where not every unit has a gate, or where units go with others."""

from __future__ import annotations

import pytest
import torch
from tests.pruning.test_placement import state_of
from torch import nn

import secateur as sc
from secateur.errors import BudgetError
from secateur.pruning.draws import gates_of


def net() -> nn.Sequential:
    """Two hidden layers of 32: 1,410 parameters."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))


@pytest.mark.parametrize(
    ("rules", "budget", "message"),
    [
        ([sc.Rule(where="0")], sc.Budget(keep_params=0.08), "112 params .* but one of every group, 139 remain"),
        ([sc.Rule(where="0")], sc.Budget(per={"4": {"keep_params": 0.5}}), "33 params of 4 .* 66 remain"),
        ([sc.Rule(exclude="2")], sc.Budget(keep_params=0.01), "14 params"),
    ],
)
def test_what_gates_cannot_reach_is_refused_before_training(
    rules: list[sc.Rule], budget: sc.Budget, message: str
) -> None:
    model = net()
    before = state_of(model)
    with pytest.raises(BudgetError, match=message):
        sc.attach(model, examples=(torch.zeros(2, 8),), gates=rules, budget=budget)
    assert state_of(model) == before


@pytest.mark.parametrize(
    "rules",
    [[sc.Rule(where="0")], [sc.Rule("inputs", where="2")], [sc.Rule("weights", where="4.weight")]],
    ids=["units", "inputs", "weights"],
)
def test_the_least_that_is_accepted_is_met(rules: list[sc.Rule]) -> None:
    """Weights of the last layer alone: what they read and no longer does goes with them, far more than they are."""
    model = net()
    pruner = sc.attach(model, examples=(torch.zeros(2, 8),), gates=rules, budget=sc.Budget(keep_params=0.3))
    with torch.no_grad():
        for parameter in gates_of(model).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    _, report = pruner.finalize()
    assert report.compact.params <= 0.3 * report.dense.params


def test_the_end_of_pruning_is_the_same_a_second_time() -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        model, x = net(), torch.randn(5, 8)
        rules = [sc.Rule(), sc.Rule("inputs")]
        pruner = sc.attach(model, examples=(x,), gates=rules, budget=sc.Budget(keep_macs=0.75))
        with torch.no_grad():
            for parameter in pruner.gates.trained:
                parameter.copy_(torch.randn_like(parameter) * 2 + 1)
        first, report = pruner.finalize(round_to=4)
        pruner.finalize()  # whatever was asked for in between
        second, again = pruner.finalize(round_to=4)
        assert (report.compact, report.gated, report.flipped) == (again.compact, again.gated, again.flipped)
        pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
        assert all(a == b and torch.equal(one, other) for (a, one), (b, other) in pairs)
