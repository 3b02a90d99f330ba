from __future__ import annotations

import itertools

import pytest
import torch

from secateur.pruning.narrowed import Place, narrowed

ROWS, RUNS = torch.tensor([0, 3, 4]), torch.tensor([1, 2])


def weight(layout: str) -> torch.Tensor:
    tensor = torch.randn(5, 6, 2, 3, dtype=torch.float64)
    if layout == "channels_last":
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor.requires_grad_()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "places",
    [
        [Place(0, ROWS)],
        [Place(1, RUNS, run=2)],
        [Place(0, ROWS), Place(1, RUNS, run=2)],
        [Place(3, RUNS), Place(0, ROWS)],
    ],
    ids=["rows", "runs", "rows and runs", "last and first"],
)
def test_it_reads_and_scatters_as_index_select_does(layout, places):
    full = weight(layout)
    part = narrowed(full, places)
    expected = full
    for place in places:
        index = (place.index[:, None] * place.run + torch.arange(place.run)).flatten()
        expected = expected.index_select(place.dim, index)
    assert torch.equal(part, expected)
    if layout == "channels_last":
        assert part.is_contiguous(memory_format=torch.channels_last)
    outer = torch.randn_like(part)
    (grad,) = torch.autograd.grad(part, full, outer)
    assert torch.equal(grad, torch.autograd.grad(expected, full, outer)[0])
    assert grad.stride() == full.stride()


def test_its_gradient_has_a_gradient():
    places = [Place(0, ROWS), Place(1, RUNS, run=2)]
    assert torch.autograd.gradcheck(lambda w: narrowed(w, places).square(), weight("contiguous"))
    assert torch.autograd.gradgradcheck(lambda w: narrowed(w, places).square(), weight("contiguous"))


def test_it_records_nothing_where_nothing_is_recorded():
    for grad, tensor in itertools.product((True, False), (weight("contiguous"), weight("contiguous").detach())):
        with torch.set_grad_enabled(grad):
            assert narrowed(tensor, [Place(0, ROWS)]).requires_grad == (grad and tensor.requires_grad)
