"""Penalties: the papers' formulas, what they show, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.polynomials import chain, convolutional

from secateur.budgets.costs import CostModel
from secateur.budgets.penalty import Penalty
from secateur.errors import BudgetError


def test_penalties_are_the_papers_formulas() -> None:
    costs = CostModel(convolutional())
    chances = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = costs.expected_vector(chances)
    per_example = Penalty(0.3, n_examples=500).start(costs)
    assert per_example.loss(chances).item() == pytest.approx(0.3 / 500 * expected[0].item())
    share = Penalty(0.3, "density", kind="macs").start(costs)
    assert share.loss(chances).item() == pytest.approx(0.3 * expected[1].item() / costs.dense.macs)
    (got,) = torch.autograd.grad(share.loss(chances), chances)
    (wanted,) = torch.autograd.grad(0.3 * expected[1] / costs.dense.macs, chances)
    torch.testing.assert_close(got, wanted)


def test_a_penalty_displays_costs_and_has_no_state() -> None:
    costs = CostModel(chain([4, 4]))
    term = Penalty(1.0, "density").start(costs)
    chances = torch.full((8,), 0.5)
    term.step(chances, torch.arange(8) % 2 == 0)
    assert (term.expected.params, term.exact.params) == (4, 4)
    assert term.state_dict() == {}
    term.load_state_dict({})
    with pytest.raises(BudgetError, match="the state of a budget"):
        term.load_state_dict({"prices": {}})
    with pytest.raises(BudgetError, match="diverged"):
        term.step(torch.full((8,), math.nan), chances > 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0, "n_examples": 5}, "weight=-1.0"),
        ({"weight": math.nan, "n_examples": 5}, "weight=nan"),
        ({"weight": "a", "n_examples": 5}, "weight='a', expected a finite number"),
        ({"weight": 1.0}, "n_examples=None, expected the number of training examples"),
        ({"weight": 1.0, "n_examples": 0}, "n_examples=0"),
        ({"weight": 1.0, "unit": "density", "n_examples": 5}, "has no meaning"),
        ({"weight": 1.0, "unit": "flops", "n_examples": 5}, "unit='flops'"),
        ({"weight": 1.0, "unit": "density", "kind": "bytes"}, "kind='bytes'"),
    ],
)
def test_wrong_penalties_are_refused(settings: dict[str, Any], message: str) -> None:
    Penalty(0.0, n_examples=1)
    with pytest.raises(BudgetError, match=message):
        Penalty(**settings)
