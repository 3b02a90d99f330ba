"""Reductions over groups equal a plain loop over groups."""

from __future__ import annotations

import copy

import pytest
import torch

from secateur.errors import GateError
from secateur.gates import Layout

SIZES = [(1,), (5,), (2, 3), (4, 1, 7, 2), (3, 3, 3)]


@pytest.fixture(params=SIZES, ids=str)
def layout(request):
    return Layout(request.param)


def test_offsets_and_segments_describe_the_same_units(layout):
    for group, part in enumerate(layout.slices):
        assert (layout.segment[part] == group).all()
        assert part.start == layout.offsets[group]
    assert layout.slices[-1].stop == layout.total == len(layout.segment)
    assert layout.counts.tolist() == list(layout.sizes)
    assert layout.n_groups == len(layout.sizes)


@pytest.mark.parametrize("draws", [(), (4,), (2, 3)])
def test_reductions_equal_a_loop(layout, draws):
    values = torch.randn(*draws, layout.total, dtype=torch.float64)
    parts = [values[..., part] for part in layout.slices]
    torch.testing.assert_close(layout.sum(values), torch.stack([part.sum(-1) for part in parts], -1))
    assert torch.equal(layout.amax(values), torch.stack([part.amax(-1) for part in parts], -1))
    back = layout.spread(layout.amax(values))
    for part in layout.slices:
        assert (back[..., part] == values[..., part].amax(-1, keepdim=True)).all()


def test_rank_is_the_position_in_the_sorted_group_and_ties_go_by_position(layout):
    values = torch.randn(layout.total).round()
    for part in layout.slices:
        expected = sorted(range(part.start, part.stop), key=lambda unit: (values[unit].item(), unit))
        assert [expected.index(unit) for unit in range(part.start, part.stop)] == layout.rank(values)[part].tolist()


def test_sum_and_spread_have_the_right_gradients(layout):
    values = torch.randn(layout.total, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layout.spread(layout.sum(x**2)) * x, (values,))


def test_layouts_are_values_whatever_their_device():
    assert Layout((2, 3)) == Layout((2, 3)).to("meta") == copy.deepcopy(Layout((2, 3)))
    assert hash(Layout((2, 3))) == hash(Layout((2, 3)).to("meta"))
    assert Layout((2, 3)) != Layout((3, 2))
    assert Layout(()).total == 0


@pytest.mark.parametrize("sizes", [(0,), (2, -1), (2.0,), (True,)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(GateError, match="expected whole numbers of at least 1"):
        Layout(sizes)
