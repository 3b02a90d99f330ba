from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))


class Net(nn.Module):
    """Parts by name, and how they are put together."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.head = nn.Linear(4, 2)
        self.way = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.way(self, x))


def twice(net: Net, x: Tensor) -> Tensor:
    x = x + net.f(x)
    return x + net.f(x)


def in_turn(net: Net, x: Tensor) -> Tensor:
    x = x + net.f(x, scale=2.0)
    return x + net.g(net.norm(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.out(F.scaled_dot_product_attention(self.q(x), x, x) * scale)


CASES = {
    "directly": (lambda n, x: x + n.f(x), {"f": mlp}, ("f",)),
    "on the left": (lambda n, x: n.f(x) + x, {"f": mlp}, ("f",)),
    "in place": (lambda n, x: n.f(x).add_(x), {"f": mlp}, ("f",)),
    "behind a norm": (lambda n, x: x + n.f(n.norm(x)), {"f": mlp, "norm": lambda: nn.LayerNorm(4)}, ("f",)),
    "behind two modules": (
        lambda n, x: x + n.f(n.drop(n.norm(x))),
        {"f": mlp, "norm": lambda: nn.LayerNorm(4), "drop": lambda: nn.Dropout(0.5)},
        ("f",),
    ),
    "through an identity": (lambda n, x: x + n.path(n.f(x)), {"f": mlp, "path": nn.Identity}, ("f",)),
    "one after the other": (
        in_turn,
        {"f": Attention, "g": mlp, "norm": lambda: nn.LayerNorm(4)},
        ("f", "g"),
    ),
    "side by side": (lambda n, x: x + n.f(x) + n.g(x), {"f": mlp, "g": mlp}, ("f", "g")),
    "no sum": (lambda n, x: n.f(x), {"f": mlp}, ()),
    "a product": (lambda n, x: x * n.f(x), {"f": mlp}, ()),
    "another layer between": (lambda n, x: x + n.f(n.g(x)), {"f": mlp, "g": mlp}, ()),
    "something else added": (lambda n, x: torch.tanh(x) + n.f(x), {"f": mlp}, ()),
    "called twice": (twice, {"f": mlp}, ()),
    "no weights": (lambda n, x: x + n.f(x), {"f": nn.ReLU}, ()),
    "another shape": (lambda n, x: x + n.f(x), {"f": lambda: nn.Linear(4, 1)}, ()),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_added_to_what_it_reads_is_a_branch(case: str) -> None:
    way, parts, expected = CASES[case]
    net = Net(way, **{name: build() for name, build in parts.items()})
    structure = sc.trace(net, (torch.randn(3, 5, 4),))
    assert structure.branches == expected
