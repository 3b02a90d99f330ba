from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc

DTYPE = torch.float64


class Block(nn.Module):
    """Attention with separate or fused projections, query groups or not, by torch or by hand; then a gated MLP."""

    def __init__(self, heads: int, shared: int, fused: bool, by_hand: bool) -> None:
        super().__init__()
        self.sizes = [16, 16 // shared, 16 // shared]
        self.d, self.by_hand, self.fused = 16 // heads, by_hand, fused
        if fused:
            self.qkv = nn.Linear(16, sum(self.sizes))
        else:
            self.q, self.k, self.v = (nn.Linear(16, size) for size in self.sizes)
        self.out, self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 40), nn.Linear(20, 16)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (-1, self.d)).transpose(1, 2) for part in parts)
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
        if self.by_hand:
            h = (q @ k.transpose(-1, -2) / self.d**0.5).softmax(-1) @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        a, b = self.up(x).chunk(2, -1)
        return x + self.down(F.silu(a) * b)


class Tied(nn.Module):
    """Channels that go together, and are no heads: GroupNorm behind two producers, grouped convolutions, flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(2, 8, 1), nn.GroupNorm(4, 8)
        self.c, self.d, self.e = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.e(self.d(self.c(F.relu(self.norm(self.a(x) + self.b(x))))))
        return self.fc(F.relu(h).flatten(1))


BLOCKS = [(4, 1, False, False), (4, 1, True, True), (4, 2, False, True), (8, 1, True, False)]


@pytest.mark.parametrize("how", BLOCKS, ids=str)
def test_heads_and_nothing_else_are_heads(how: tuple[int, int, bool, bool]) -> None:
    net, x = Block(*how), torch.randn(2, 5, 16)
    structure = sc.trace(net, examples=(x,))
    first = "qkv" if how[2] else "q"
    assert {group.name: (group.kind, group.size) for group in structure.groups} == {
        first: ("heads", how[0] // how[1]),
        "up": ("structured", 20),
    }


def test_channels_that_go_together_are_no_heads() -> None:
    structure = sc.trace(Tied(), examples=(torch.randn(2, 2, 4, 4),))
    assert any(min(m.index.shape[1] for m in group.members) > 1 for group in structure.groups)
    assert {group.kind for group in structure.groups} == {"structured"}


@pytest.mark.parametrize("how", BLOCKS, ids=str)
def test_heads_alone_are_gated_and_cut(how: tuple[int, int, bool, bool]) -> None:
    net, x = Block(*how).double(), torch.randn(2, 5, 16, dtype=DTYPE)
    pruner = sc.attach(net, examples=(x,), gates=[sc.Rule("heads")])
    (group,) = pruner.groups
    with torch.no_grad():
        pruner.gates.rules[0].log_alpha.fill_(1.0)
        pruner.gates.rules[0].log_alpha[0] = -5.0
    small, report = pruner.finalize()
    torch.testing.assert_close(small.eval()(x), net.eval()(x), rtol=0, atol=1e-12)
    assert report.widths[group.name] == (group.size - 1, group.size)
    assert report.widths["up"] == (20, 20)


def test_all_but_heads_and_both_with_methods_of_their_own() -> None:
    x = torch.randn(2, 5, 16)
    rest = sc.Rule(exclude=lambda group: group.kind == "heads")
    pruner = sc.attach(Block(4, 1, False, False), examples=(x,), gates=[rest])
    assert [group.name for group in pruner.groups] == ["up"]
    pruner = sc.attach(Block(4, 1, False, False), examples=(x,), gates=[rest, sc.Rule("heads", method=sc.ARM())])
    assert [group.name for group in pruner.groups] == ["up", "q"]
    with pytest.raises(sc.GateError, match="gated twice: 'q'"):
        sc.attach(Block(4, 1, False, False), examples=(x,), gates=[sc.Rule(), sc.Rule("heads")])


def test_a_model_without_heads_says_so() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(sc.GateError, match="the groups of attention heads are none, and all groups 0"):
        sc.attach(net, examples=(torch.zeros(2, 4),), gates=[sc.Rule("heads")])
