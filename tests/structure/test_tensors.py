"""Names, sharing, shapes and layout of a module's tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.structure.tensors import (
    dimension_order,
    first_names,
    in_order,
    in_place_of,
    listed,
    misfits,
    named_tensors,
    shapes_of,
)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.block = nn.Linear(4, 5)
        self.block.weight = self.embed.weight
        self.again = self.block


def test_every_name_is_known_and_leads_to_the_first():
    net = Tied()
    assert first_names(net) == {
        "embed.weight": "embed.weight",
        "block.weight": "embed.weight",
        "block.bias": "block.bias",
        "again.weight": "embed.weight",
        "again.bias": "block.bias",
    }
    assert named_tensors(net)["again.weight"] is net.embed.weight
    assert shapes_of(net) == {"embed.weight": (5, 4), "block.bias": (5,)}
    assert [name for name, _ in net.named_parameters()] == list(shapes_of(net))


@pytest.mark.parametrize("shape", [(4, 6, 3, 3), (4, 1, 3, 3), (1, 6, 3, 3), (4, 6, 1, 1), (1, 1, 3, 3), (4, 1, 1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_order_in_memory_is_recovered_with_dimensions_of_size_one(shape, layout):
    tensor = torch.randn(shape).to(memory_format=layout)
    again = in_order(tensor.clone(memory_format=torch.contiguous_format), dimension_order(tensor))
    assert again.stride() == tensor.stride()
    assert torch.equal(again, tensor)


def test_misfits_lists_missing_different_and_unexpected_tensors():
    net = nn.Linear(4, 3)
    assert misfits(net, {"weight": (3, 4), "bias": (3,)}) == []
    assert misfits(net, {"weight": (4, 4), "scale": (3,)}) == [
        "weight: shape (3, 4), expected (4, 4)",
        "scale: missing, expected shape (3,)",
        "bias: not expected",
    ]


def test_misfits_takes_any_name_of_a_tied_tensor():
    assert misfits(Tied(), {"again.weight": (5, 4), "block.bias": (5,)}) == []


def test_what_takes_the_place_of_a_parameter_is_like_it():
    class Marked(nn.Parameter):
        pass

    old = Marked(torch.zeros(3), requires_grad=False)
    old.no_decay = True
    new = in_place_of(old, torch.ones(2))
    assert type(new) is Marked
    assert new.no_decay
    assert not new.requires_grad
    assert in_place_of(nn.Parameter(torch.zeros(3)), torch.ones(2)).requires_grad
    assert not in_place_of(nn.Parameter(torch.zeros(3)), torch.ones(2, dtype=torch.int8)).requires_grad
    assert not isinstance(in_place_of(torch.zeros(3), torch.ones(2)), nn.Parameter)


def test_long_lists_are_counted():
    assert listed(["a", "b"]) == "a; b"
    assert listed([str(i) for i in range(11)]).endswith("7; and 3 more")
