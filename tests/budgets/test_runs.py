from __future__ import annotations

import numpy as np
import pytest
import torch

from secateur.budgets.runs import Runs, on_host


@pytest.mark.parametrize("sizes", [(3, 1, 4), (700, 2, 300), (2, 0, 3), (700, 0, 300)], ids=str)
def test_runs_reduce_and_spread_like_a_scatter(sizes: tuple[int, ...]) -> None:
    segment = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    runs = Runs(sizes)
    values, of_groups = torch.rand(sum(sizes)), torch.rand(len(sizes))
    sums = torch.zeros(len(sizes), dtype=torch.float64).index_add(0, segment, values.double())
    torch.testing.assert_close(torch.from_numpy(runs.sum(values.numpy())), sums)
    flags = values > 0.5
    assert runs.count(flags.numpy()).tolist() == torch.bincount(segment[flags], minlength=len(sizes)).tolist()
    assert np.array_equal(runs.spread(of_groups.numpy()), of_groups[segment].numpy())
    assert np.array_equal(runs.segment, segment.numpy())


def test_what_numpy_lacks_is_widened_and_all_else_is_shared() -> None:
    half, single = torch.rand(3, dtype=torch.bfloat16), torch.rand(3, requires_grad=True)
    assert on_host(half).dtype == np.float32
    assert torch.equal(torch.from_numpy(on_host(half)).bfloat16(), half)
    assert on_host(single).ctypes.data == single.data_ptr()
    assert on_host(on_host(single)).ctypes.data == single.data_ptr()
