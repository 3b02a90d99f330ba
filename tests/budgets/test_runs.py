from __future__ import annotations

import pytest
import torch

from secateur.budgets.runs import Runs


@pytest.mark.parametrize("sizes", [(3, 1, 4), (700, 2, 300)], ids=["short", "long"])
def test_runs_reduce_and_spread_like_a_scatter(sizes: tuple[int, ...]) -> None:
    segment = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    runs = Runs(sizes, segment)
    values, of_groups = torch.rand(sum(sizes)), torch.rand(len(sizes))
    sums = torch.zeros(len(sizes), dtype=torch.float64).index_add(0, segment, values.double())
    torch.testing.assert_close(runs.sum(values), sums)
    assert runs.count(values > 0.5).tolist() == torch.bincount(segment[values > 0.5], minlength=len(sizes)).tolist()
    assert torch.equal(runs.spread(of_groups), of_groups[segment])
