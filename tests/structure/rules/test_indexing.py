"""Reading by index: the indexed dimension is frozen, the others pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.law import Row, alone, check_cut, given, hold, hold_in_a_model, in_models, linear_net, row, sizes
from torch import nn

H = given((3, 8), 1)
FREE = "abcdefgh"
NONE = "........"
BY_INDEX = "is indexed by position or data"
I3 = torch.tensor([1, 0, 2])
I8 = torch.tensor([1, 0, 2, 5, 4, 3, 7, 6])
TABLE = given((5, 6), 0, 1, weight=True)

ROWS: dict[str, Row] = {
    "index": row(lambda a: a[I3], H, FREE),
    "index of units": row(lambda a: a[:, I8], H, NONE, BY_INDEX),
    "two indices around the units": row(lambda a: a[I3, :, I3], given((3, 8, 3), 1), FREE),
    "two indices side by side": row(lambda a: a[I3, I3], given((3, 3, 8), 2), FREE),
    "index of two dimensions": row(lambda a: a[I3.view(3, 1).expand(3, 2)], H, FREE),
    "indices apart": row(lambda a: a[I3[:2]][:, :, :, I3], given((3, 3, 8, 3), 2), FREE),
    "mask": row(lambda a: a[torch.tensor([True, False, True])], H, FREE),
    "mask of two dimensions": row(lambda a: a[torch.ones(3, 3, dtype=torch.bool)], given((3, 3, 8), 2), FREE),
    "index of a part of the units": row(lambda a: a.unflatten(1, (2, -1))[:, I3[:2]], H, "abcdabcd"),
    "index_select": row(lambda a: a.index_select(0, I3), H, FREE),
    "index_select of units": row(lambda a: a.index_select(1, I8), H, NONE, BY_INDEX),
    "gather": row(lambda a: a.gather(0, I3[:, None].expand(3, a.shape[1])), H, FREE),
    "gather along units": row(lambda a: a.gather(1, I3[:, None]), H, NONE, BY_INDEX),
    "gather by an index for each unit": row(
        lambda a, i: a.gather(0, i), H, given((3, 8), value=torch.randint(0, 3, (3, 8))), NONE, "meets another tensor's"
    ),
    "gather by an order of its own": row(lambda a: a.gather(0, a.argsort(0)), H, FREE),
    "take_along_dim": row(lambda a, b: torch.take_along_dim(a, b.argsort(0), 0), H, H, FREE, FREE),
    "take": row(lambda a: a.take(I3), H, NONE, BY_INDEX),
    "as an index": row(lambda a: torch.arange(9.0)[(a > 0).long()], H, NONE, "is used as an index"),
    "embedding": row(lambda w: F.embedding(I3.view(3, 1), w), TABLE, ".....", "abcdef", "is a vocabulary"),
    "embedding_bag": row(
        lambda w: F.embedding_bag(I3.view(1, 3), w, mode="sum"), TABLE, ".....", "abcdef", "is a vocabulary"
    ),
    "embedding_bag, largest": row(
        lambda w: F.embedding_bag(I3.view(1, 3), w, mode="max"), TABLE, ".....", "abcdef", "is a vocabulary"
    ),
    "embedding_bag with weights": row(
        lambda w, s: F.embedding_bag(I3.view(1, 3), w, mode="sum", per_sample_weights=s),
        TABLE, given((1, 3)), ".....", "abcdef", "is a vocabulary",
    ),
    "embedding by one-hot product": row(
        lambda w: F.one_hot(I3, 5).double() @ w, TABLE, ".....", "abcdef", "reads a dimension that cannot be cut"
    ),
    "embedding with a largest norm": row(
        lambda w: F.embedding(I3, w.clone(), max_norm=1.0), TABLE, ".....", "......",
        "embedding_renorm, which has no rule",
    ),
}  # fmt: skip


@pytest.mark.parametrize("one", alone(ROWS))
def test_commutes_with_removal(one: Row) -> None:
    hold(one)


@pytest.mark.parametrize("one", in_models(ROWS))
def test_in_a_model(one: Row) -> None:
    hold_in_a_model(one)


def test_a_bias_table_read_by_index_loses_heads() -> None:
    """Swin: a table of (places, heads), read by a constant index, added to scores of (heads, T, T)."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(7, 4))
            self.register_buffer("places", torch.arange(16).view(4, 4) % 7)
            self.scores = nn.Conv2d(1, 4, 1)
            self.read = nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bias = self.table[self.places.view(-1)].view(4, 4, -1).permute(2, 0, 1)
            return self.read((self.scores(x) + bias).softmax(-1))

    structure = check_cut(Biased(), torch.randn(2, 1, 4, 4))
    assert sizes(structure) == [4]
    assert ("table", 1) in {(m.tensor, m.dim) for m in structure.groups[0].members}
    assert "indexed by position or data" in structure.why_frozen("table")


def test_tied_embedding_and_head() -> None:
    """One tensor carries the units in and consumes them at the end; it stays one tensor."""

    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.mid = nn.Linear(8, 6)
            self.out = nn.Linear(6, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            h = self.embed(ids)
            return self.head(h + self.out(self.mid(h).relu()))

    model = Language()
    structure = check_cut(model, torch.arange(5))
    assert sizes(structure) == [6, 8]
    stream = next(group for group in structure.groups if group.size == 8)
    member = next(m for m in stream.members if m.tensor == "embed.weight")
    assert member.consumer
    assert structure.aliases == {"head.weight": "embed.weight"}


def test_a_position_embedding_is_cut_with_the_stream() -> None:
    net = linear_net(lambda net, h: h + net.where(torch.arange(3)), where=nn.Embedding(3, 8))
    assert sizes(check_cut(net, torch.randn(2, 3, 4))) == [8]
