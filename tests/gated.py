"""Small networks with gates on them, for tests of everything that happens while a model is gated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.gates import Gate, HardConcrete, Layout, Method
from secateur.pruning.gateset import GateSet, Norms
from secateur.pruning.placement import gated_sites, maps_of, place
from secateur.structure.groups import Group
from secateur.structure.structure import Structure
from secateur.structure.trace import trace

DTYPE = torch.float64


class ConvNet(nn.Module):
    """Convolutions with biases and BatchNorm, a residual sum, flatten, and two linear layers."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.inner = nn.Conv2d(4, 6, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.outer = nn.Conv2d(6, 4, 1)
        self.drop = nn.Dropout(dropout)
        self.fc1 = nn.Linear(4 * 9, 5)
        self.fc2 = nn.Linear(5, 3)

    def features(self, x: Tensor) -> Tensor:
        return F.silu(self.bn1(self.stem(x)))

    def middle(self, h: Tensor) -> Tensor:
        return h + self.outer(F.relu(self.bn2(self.inner(h))))

    def head(self, h: Tensor) -> Tensor:
        h = F.max_pool2d(h, 2).flatten(1)
        return self.fc2(self.drop(torch.sigmoid(self.fc1(h))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.features(x)))


class Mlp(nn.Module):
    """Two linear layers with a nonlinearity that is not 0 at 0."""

    def __init__(self, n_in: int = 3, n_hidden: int = 6, n_out: int = 2) -> None:
        super().__init__()
        self.fc1 = nn.Linear(n_in, n_hidden)
        self.fc2 = nn.Linear(n_hidden, n_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.sigmoid(self.fc1(x)))


class Bare(nn.Module):
    """A module without submodules: its weights are its own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 3))
        self.b = nn.Parameter(torch.randn(5))
        self.v = nn.Parameter(torch.randn(2, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.w.T + self.b) @ self.v.T


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 2, 6, 6, dtype=DTYPE)


def gate(
    model: nn.Module,
    structure: Structure,
    method: Method | None = None,
    groups: Sequence[Group] | None = None,
    seed: int = 0,
) -> GateSet:
    """Gates on all groups of a structure, by placement alone."""
    chosen = tuple(structure.groups if groups is None else groups)
    method = HardConcrete(init_open=0.6) if method is None else method
    norms = Norms(chosen) if method.uses_norms else None
    start = None
    if norms is not None:
        tensors = dict(model.named_parameters())
        start = norms([tensors[name].detach() for name in norms.tensors], DTYPE)
    layout = Layout(tuple(group.size for group in chosen))
    gates = GateSet([Gate(method, layout, torch.Generator().manual_seed(seed), DTYPE, norms=start)], [norms], seed)
    place(model, gates, maps_of(chosen, structure.shapes))
    if norms is not None:
        chains = {site.name: site.chain for site in gated_sites(model)}
        norms.bind([chains[name] for name in norms.tensors])
    return gates


@cache
def conv_structure() -> Structure:
    with torch.random.fork_rng():
        return trace(ConvNet().double(), (images(),))


@cache
def mlp_structure() -> Structure:
    with torch.random.fork_rng():
        return trace(Mlp().double(), (torch.randn(4, 3, dtype=DTYPE),))


def conv_net(method: Method | None = None, dropout: float = 0.0) -> tuple[ConvNet, GateSet]:
    """A gated ConvNet in float64, in training mode."""
    net = ConvNet(dropout).double()
    return net, gate(net, conv_structure(), method)


def mlp(method: Method | None = None) -> tuple[Mlp, GateSet]:
    """A gated Mlp in float64, in training mode."""
    net = Mlp().double()
    return net, gate(net, mlp_structure(), method)
