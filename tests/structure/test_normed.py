"""RMSNorms in models: how they are called decides whether their width can be cut; masked then equals compact."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.law import check_cut
from tests.structure.test_norms import InTraining, Norm, OfThree, OverChannels, PlusOne, Remembers, ToFloat32
from torch import Tensor, nn

import secateur as sc

X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))


class Gated(Norm):
    """As Mamba's: a gate may come along."""

    def forward(self, hidden: Tensor, gate: Tensor | None = None, scale: float = 1.0) -> Tensor:
        if gate is not None:
            hidden = hidden * F.silu(gate)
        return self.normed(hidden) * self.weight * scale


class Skips(Norm):
    """Multiplies by its weight without normalising, where it is told to."""

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        return x * self.weight if plain else self.normed(x) * self.weight


class Net(nn.Module):
    """A layer, a norm that is called in some way, and a layer that reads it."""

    def __init__(self, norm: nn.Module, call: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.gate, self.norm, self.down = nn.Linear(4, 8), nn.Linear(4, 8), norm, nn.Linear(8, 3)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        self.x = x
        out = self.down(self.call(self, h))
        del self.x
        return out


def one(net: Net, h: Tensor) -> Tensor:
    return net.norm(h)


PRUNABLE: dict[str, tuple[Callable[[], nn.Module], Callable[[Net, Tensor], Tensor]]] = {
    "one tensor": (Norm, one),
    "by keyword": (Norm, lambda net, h: net.norm(x=h)),
    "by another keyword": (Gated, lambda net, h: net.norm(hidden=h)),
    "no gate": (Gated, lambda net, h: net.norm(h, None)),
    "no gate, by keyword": (Gated, lambda net, h: net.norm(hidden=h, gate=None, scale=1.0)),
    "its forward itself": (Norm, lambda net, h: net.norm.forward(h)),
    "only three dimensions": (OfThree, one),
    "an offset": (PlusOne, one),
    "torch's": (lambda: nn.RMSNorm(8, eps=1e-5), one),
    "torch's without eps": (lambda: nn.RMSNorm(8), one),
    "twice": (lambda: nn.RMSNorm(8), lambda net, h: net.norm(net.norm(h))),
    "four dimensions": (Norm, lambda net, h: net.norm(h[:, :, None]).squeeze(2)),
    "a float32 output": (ToFloat32, one),
}
FROZEN: dict[str, tuple[Callable[[], nn.Module], Callable[[Net, Tensor], Tensor], str]] = {
    "a gate": (Gated, lambda net, h: net.norm(h, net.gate(net.x)), r"reduced over \(mean\)"),
    "a gate by keyword": (Gated, lambda net, h: net.norm(h, gate=net.gate(net.x)), r"reduced over \(mean\)"),
    "another number": (Gated, lambda net, h: net.norm(h, None, 2.0), r"reduced over \(mean\)"),
    "dimension 1": (
        OverChannels,
        lambda net, h: net.norm(h.mT[..., None]).squeeze(-1).mT,
        r"reduced over \(mean\)",
    ),
    "in training only": (InTraining, one, r"reduced over \(mean\)"),
    "remembers": (Remembers, lambda net, h: net.norm(h) * net.norm.last, r"reduced over \(mean\)"),
    "both ways": (
        Skips,
        lambda net, h: net.norm(net.norm(h), plain=True),
        "is the weight of an RMSNorm, which a cut rescales, and is read in another way too .mul in norm.",
    ),
    "its weight beside it": (
        Norm,
        lambda net, h: net.norm(h) * net.norm.weight,
        "is the weight of an RMSNorm, which a cut rescales, and is read in another way too .mul.",
    ),
}


@pytest.mark.parametrize("name", PRUNABLE)
def test_masked_equals_compact_behind_a_norm(name: str) -> None:
    norm, call = PRUNABLE[name]
    net = Net(norm(), call).double() if name != "a float32 output" else Net(norm(), call)
    structure = sc.trace(net, (X.to(net.up.weight.dtype),))
    assert [group.name for group in structure.groups] == ["up"]
    if name != "a float32 output":  # which does not fit the layers in float64
        check_cut(net, X.double(), structure=structure)


@pytest.mark.parametrize("name", FROZEN)
def test_a_norm_that_is_called_otherwise_keeps_its_width_and_says_why(name: str) -> None:
    norm, call, why = FROZEN[name]
    net = Net(norm(), call).double()
    structure = check_cut(net, X.double())
    assert not structure.groups
    assert re.search(why, structure.why_frozen("norm"))


def test_convolutions_beside_a_norm_over_channels_are_cut_elsewhere() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), OverChannels(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)
    )
    structure = check_cut(net.double(), torch.randn(2, 3, 6, 8, dtype=torch.float64))
    assert [group.name for group in structure.groups] == ["2"]


def test_gated_norms_prune_where_they_are_called_without_a_gate() -> None:
    """The same class in two places: one call has a gate, the other none."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Net(Gated(), one), Net(Gated(), FROZEN["a gate"][1])

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x)

    structure = check_cut(Both().double(), X.double())
    assert [group.name for group in structure.groups] == ["first.up"]
