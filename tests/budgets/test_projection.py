"""Projection onto a budget: at most it, near it, few flips, no group emptied, and nothing left to do afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.polynomials import Polynomials, chain, convolutional, drawn, group

from secateur.budgets.costs import CostModel, Kind
from secateur.budgets.flips import FIRST_LOOK
from secateur.budgets.projection import project_onto
from secateur.errors import BudgetError
from secateur.structure.groups import Axis, Cost, Term

WIDTHS = st.lists(st.integers(1, 9), min_size=2, max_size=5)
SHARES = st.floats(0.05, 1.0)


def within(cost: Cost, limits: dict[Kind, int]) -> bool:
    return all(getattr(cost, kind) <= limit for kind, limit in limits.items())


def limits_of(costs: CostModel, share: float, *, macs: bool) -> dict[Kind, int]:
    limits: dict[Kind, int] = {"params": max(int(share * costs.dense.params), costs.least.params)}
    if macs:
        limits["macs"] = max(int(0.8 * share * costs.dense.macs), costs.least.macs)
    return limits


@settings(max_examples=100)
@given(widths=WIDTHS, share=SHARES, opening=SHARES, seed=st.integers(0, 999), macs=st.booleans())
def test_the_contract(widths: list[int], share: float, opening: float, seed: int, macs: bool) -> None:
    costs = CostModel(chain(widths))
    scores, is_open = drawn(costs, seed, opening)
    limits = limits_of(costs, share, macs=macs)
    found = project_onto(costs, scores, is_open, limits)
    assert within(costs.exact(found), limits)
    # No group loses its last unit, and one that has none stays as it is.
    before, after = costs.n_open(is_open), costs.n_open(found)
    assert ((after > 0) == (before > 0)).all()
    # Without slack no single closed unit of a living group fits any more.
    for unit in torch.nonzero(~found).flatten().tolist():
        if after[costs.segment[unit]]:
            more = found.clone()
            more[unit] = True
            assert not within(costs.exact(more), limits)
    # In each group the kept units are those of the highest scores.
    for part, kept in zip(scores.split(list(costs.sizes)), found.split(list(costs.sizes)), strict=True):
        if kept.any() and not kept.all():
            assert part[kept].min() >= part[~kept].max()
    assert torch.equal(project_onto(costs, scores, found, limits), found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("opening", [0.2, 0.9])
def test_scores_of_low_precision(dtype: torch.dtype, opening: float) -> None:
    costs = CostModel(chain([5, 7, 4]))
    scores, is_open = drawn(costs, 3, opening)
    scores = scores.to(dtype)
    limits = limits_of(costs, 0.5, macs=True)
    found = project_onto(costs, scores, is_open, limits)
    assert torch.equal(found, project_onto(costs, scores.float(), is_open, limits))
    assert within(costs.exact(found), limits)


@settings(max_examples=100)
@given(widths=WIDTHS, share=SHARES, opening=SHARES, seed=st.integers(0, 999), slack=st.floats(0.0, 0.3))
def test_slack_spares_flips(widths: list[int], share: float, opening: float, seed: int, slack: float) -> None:
    costs = CostModel(chain(widths))
    scores, is_open = drawn(costs, seed, opening)
    limits = limits_of(costs, share, macs=False)
    found = project_onto(costs, scores, is_open, limits, slack)
    assert within(costs.exact(found), limits)
    n_flips = int((found != is_open).sum())
    assert n_flips <= int((project_onto(costs, scores, is_open, limits) != is_open).sum())
    unused = limits["params"] - costs.exact(is_open).params
    if 0 <= unused <= slack * costs.dense.params - 1:
        assert n_flips == 0
    # What was closed and would still fit was given back.
    for unit in torch.nonzero(is_open & ~found).flatten().tolist():
        more = found.clone()
        more[unit] = True
        assert not within(costs.exact(more), limits)
    assert torch.equal(project_onto(costs, scores, found, limits, slack), found)


def test_the_lowest_scores_close_first_across_groups() -> None:
    costs = CostModel(chain([4, 4, 4]))
    scores = torch.tensor([0.9, 0.8, 0.1, 0.7, 0.9, 0.9, 0.9, 0.2, 0.9, 0.3, 0.9, 0.9])
    everything = torch.ones(12, dtype=torch.bool)
    # 32 parameters; without units 2 and 7 there are 3 * 3 + 3 * 4 = 21, and unit 9 would be the next
    found = project_onto(costs, scores, everything, {"params": 21})
    assert torch.nonzero(~found).flatten().tolist() == [2, 7]


def test_small_units_take_the_room_that_a_large_one_left() -> None:
    # Group 0: two units of 100; group 1: units of 1.
    terms = (Term(100.0, (0,), "large"), Term(1.0, (1,), "small"))
    structure = Polynomials((group(2, "large"), group(9, "small")), (Axis(0, ((0, 1),)), Axis(0, ((1, 1),))), terms, ())
    costs = CostModel(structure)
    scores = torch.cat([torch.tensor([0.5, 0.4]), torch.linspace(0.1, 0.3, 9)])
    found = project_onto(costs, scores, torch.ones(11, dtype=torch.bool), {"params": 105})
    # Closing by score alone ends the large unit last; the small ones that fit beside the other come back.
    assert costs.n_open(found).tolist() == [1, 5]
    assert found[2:].tolist() == [False] * 4 + [True] * 5


def test_units_without_a_gate_keep_their_state() -> None:
    costs = CostModel(chain([4, 4, 4]))
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0))
    scores[4:8] = torch.inf
    found = project_onto(costs, scores, torch.ones(12, dtype=torch.bool), {"params": 12})
    assert found[4:8].all()
    assert costs.exact(found).params == 12
    with pytest.raises(BudgetError, match="params at most 7, least 8"):
        project_onto(costs, scores, torch.ones(12, dtype=torch.bool), {"params": 7})


def test_units_that_cost_nothing_keep_their_state() -> None:
    structure = convolutional()
    only_first = Polynomials(structure.groups, structure.axes, (Term(1.0, (0,), "conv1"),), ())
    costs = CostModel(only_first)
    is_open = torch.tensor([True] * 4 + [True, False, True, False, True])
    found = project_onto(costs, torch.linspace(1.0, 0.0, 9), is_open, {"params": 2})
    assert torch.equal(found[4:], is_open[4:])
    assert costs.n_open(found)[0] == 2


@pytest.mark.parametrize("keep", [0.7, 0.02])
def test_thousands_of_units_take_few_counts(keep: float, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = CostModel(chain([1500, 1800, 900, 1200]))
    assert costs.total > 2 * FIRST_LOOK
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(costs.total, generator=generator)
    is_open = torch.rand(costs.total, generator=generator) < 0.9
    calls = 0
    cuts = CostModel.cuts

    def counting(self: CostModel, n_open: NDArray[np.int64]) -> NDArray[np.int64]:
        nonlocal calls
        calls += 1
        return cuts(self, n_open)

    monkeypatch.setattr(CostModel, "cuts", counting)
    limit = int(keep * costs.dense.params)
    found = project_onto(costs, scores, is_open, {"params": limit})
    assert 0 < calls < 50
    params = costs.exact(found).params
    assert limit - 900 <= params <= limit


def test_wrong_vectors_are_refused() -> None:
    costs = CostModel(chain([4, 4]))
    ones = torch.ones(8, dtype=torch.bool)
    assert project_onto(costs, torch.zeros(8), ones, {"params": 16}).all()
    with pytest.raises(BudgetError, match=r"scores has shape \(7,\), expected \(8,\)"):
        project_onto(costs, torch.zeros(7), ones, {"params": 4})
    with pytest.raises(BudgetError, match=r"open has shape \(9,\), expected \(8,\)"):
        project_onto(costs, torch.zeros(8), torch.ones(9, dtype=torch.bool), {"params": 4})
    with pytest.raises(BudgetError, match="1 of 8 scores are NaN"):
        project_onto(costs, torch.tensor([torch.nan] + [0.0] * 7), ones, {"params": 4})
