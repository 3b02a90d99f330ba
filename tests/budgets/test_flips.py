"""Flips: as few as bring the costs to their limits, in the order of the scores."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.polynomials import chain, drawn

from secateur.budgets.costs import CostModel
from secateur.budgets.flips import flips

WIDTHS = st.lists(st.integers(1, 9), min_size=2, max_size=5)
SHARES = st.floats(0.05, 1.0)


@settings(max_examples=60)
@given(widths=WIDTHS, share=SHARES, opening=SHARES, seed=st.integers(0, 999))
def test_closing_flips_the_fewest_lowest_scores(widths: list[int], share: float, opening: float, seed: int) -> None:
    costs = CostModel(chain(widths))
    scores, is_open = drawn(costs, seed, opening)
    limits = {"params": max(int(share * costs.dense.params), costs.least.params)}
    closed = flips(costs, scores, is_open, limits, limits, closing=True)
    assert is_open[torch.from_numpy(closed)].all()
    ordered = scores[torch.from_numpy(closed)]
    assert (ordered.diff() >= 0).all()
    costs_on_the_way = []
    pattern = is_open.clone()
    for unit in closed.tolist():
        costs_on_the_way.append(costs.exact(pattern).params)
        pattern[unit] = False
    assert all(cost > limits["params"] for cost in costs_on_the_way)
    assert costs.exact(pattern).params <= limits["params"] or not (costs.n_open(pattern) > 1).any()


def test_opening_flips_the_highest_scores_that_fit() -> None:
    costs = CostModel(chain([4, 4, 4]))
    scores = torch.tensor([0.9, 0.8, 0.1, 0.7, 0.9, 0.9, 0.9, 0.2, 0.9, 0.3, 0.9, 0.9])
    is_open = scores > 0.75
    # 2 * 3 + 3 * 3 parameters; unit 3 is the best of the closed ones and makes it 18, unit 9 would make it 21
    assert costs.exact(is_open).params == 15
    opened = flips(costs, scores, is_open, {"params": 19}, ["params"], closing=False)
    assert opened.tolist() == [3]
