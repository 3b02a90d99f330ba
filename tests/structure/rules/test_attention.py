"""Attention: heads go together, features of values pass, features of queries and keys are contracted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.law import Row, alone, check_cut, given, hold, hold_in_a_model, in_models, linear_net, row, sizes
from torch import Tensor, nn

Q = given((2, 4, 5, 6), 1, 3)
KV = given((2, 2, 5, 6), 1, 3)
D = "......"
VALUES = "efghij"
TWO = "is contracted in a product of two activations"
HEADS = ("abcd", D, "abcd", D, "abcd", VALUES)
sdpa = F.scaled_dot_product_attention

ROWS: dict[str, Row] = {
    "plain": row(sdpa, Q, Q, Q, *HEADS, TWO),
    "causal": row(lambda q, k, v: sdpa(q, k, v, is_causal=True), Q, Q, Q, *HEADS, TWO),
    "mask for all heads": row(sdpa, Q, Q, Q, given((1, 1, 5, 5)), *HEADS, TWO),
    "mask of times": row(sdpa, Q, Q, Q, given((5, 5)), *HEADS, TWO),
    "mask of each head": row(
        sdpa, Q, Q, Q, given((2, 4, 5, 5), 1), *HEADS, "abcd", TWO
    ),
    "fixed mask of each head": row(
        sdpa, Q, Q, Q, given((4, 5, 5)), "....", D, "....", D, "....", "abcdef",
        "meets another tensor's",
    ),
    "boolean mask, expanded over heads": row(
        lambda q, k, v, m: sdpa(q, k, v, (m > 0).expand(-1, q.shape[1], -1, -1)), Q, Q, Q, given((2, 1, 5, 5)),
        *HEADS, TWO,
    ),
    "grouped queries": row(
        lambda q, k, v: sdpa(q, k, v, enable_gqa=True), Q, KV, KV, "aabb", D, "ab", D, "ab", "cdefgh", TWO
    ),
    "grouped queries by repetition": row(
        lambda q, k, v: sdpa(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)), Q, KV, KV,
        "aabb", D, "ab", D, "ab", "cdefgh", TWO,
    ),
    "grouped queries by expansion": row(
        lambda q, k, v: sdpa(q, *(x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for x in (k, v))), Q, KV, KV,
        "aabb", D, "ab", D, "ab", "cdefgh", TWO,
    ),
    "one head without a dimension": row(
        sdpa, given((2, 5, 6), 2), given((2, 5, 6), 2), given((2, 5, 6), 2), D, D, "abcdef", TWO
    ),
    "wide values": row(sdpa, Q, Q, given((2, 4, 5, 7), 1, 3), "abcd", D, "abcd", D, "abcd", "efghijk", TWO),
    "with dropout": row(lambda q, k, v: sdpa(q, k, v, dropout_p=0.5) * 0, Q, Q, Q, *HEADS, TWO),
    "by hand": row(lambda q, k, v: ((q @ k.mT) / 6**0.5).softmax(-1) @ v, Q, Q, Q, *HEADS, TWO),
    "by einsum": row(
        lambda q, k, v: torch.einsum("bhts,bhsd->bhtd", torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1), v), Q, Q, Q,
        *HEADS, TWO,
    ),
    "linear attention": row(
        lambda q, k, v: q.softmax(2) @ (k.softmax(2).mT @ v), Q, Q, Q, *HEADS, TWO
    ),
    "as plain operators": row(
        lambda q, k, v: torch.ops.aten._scaled_dot_product_attention_math(q, k, v)[0], Q, Q, Q, *HEADS, TWO
    ),
}  # fmt: skip


@pytest.mark.parametrize("one", alone(ROWS))
def test_commutes_with_removal(one: Row) -> None:
    hold(one)


@pytest.mark.parametrize("one", in_models(ROWS))
def test_in_a_model(one: Row) -> None:
    hold_in_a_model(one)


class Attention(nn.Module):
    """Self-attention that computes its sizes from its weights, in several layouts.

    Args:
        heads: of the queries.
        groups: of the keys and values.
        size: features of a head.
        between: what happens to queries and keys before their product.
    """

    def __init__(self, heads: int = 4, groups: int = 4, size: int = 2, between: Callable[..., Tensor] | None = None):
        super().__init__()
        self.size, self.repeats = size, heads // groups
        self.q, self.k, self.v = (nn.Linear(8, n * size) for n in (heads, groups, groups))
        self.out = nn.Linear(heads * size, 8)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.between is not None:
            q, k = self.between(q), self.between(k)
        k, v = (x.repeat_interleave(self.repeats, 1) for x in (k, v))
        return self.out(sdpa(q, k, v).transpose(1, 2).flatten(2))


def rotary(x: Tensor) -> Tensor:
    """Rotary position embedding in the form that most language models have."""
    angle = torch.arange(x.shape[2]).double()[:, None] * torch.ones(x.shape[3]).double()
    left, right = x[..., : x.shape[3] // 2], x[..., x.shape[3] // 2 :]
    return (x * angle.cos() + torch.cat([-right, left], -1) * angle.sin()).to(x.dtype)


def test_heads_of_separate_projections() -> None:
    structure = check_cut(Attention(), torch.randn(2, 3, 8))
    (group,) = structure.groups
    assert group.size == 4
    assert {(m.tensor, m.dim) for m in group.members} == {
        *((f"{name}.{part}", 0) for name in "qkv" for part in ("weight", "bias")),
        ("out.weight", 1),
    }
    assert group.consumers[0].index.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_key_head_goes_with_its_query_heads() -> None:
    structure = check_cut(Attention(heads=6, groups=3), torch.randn(2, 3, 8))
    (group,) = structure.groups
    index = {m.tensor: m.index[1].tolist() for m in group.members}
    assert group.size == 3
    assert index["q.weight"] == [4, 5, 6, 7]
    assert index["k.weight"] == index["v.weight"] == [2, 3]


def test_rotary_embedding_leaves_heads() -> None:
    assert sizes(check_cut(Attention(size=4, between=rotary), torch.randn(2, 3, 8))) == [4]


def test_normalised_queries_and_keys_leave_heads() -> None:
    norm = nn.LayerNorm(4)
    assert sizes(check_cut(Attention(size=4, between=norm), torch.randn(2, 3, 8))) == [4]


@pytest.mark.parametrize("layout", ["three then heads", "heads then three"])
def test_heads_of_a_fused_projection(layout: str) -> None:
    def between(net: nn.Module, h: Tensor) -> Tensor:
        if layout == "three then heads":
            q, k, v = h.unflatten(-1, (3, -1, 2)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = h.unflatten(-1, (-1, 3, 2)).permute(3, 0, 2, 1, 4)
        return sdpa(q, k, v).transpose(1, 2).flatten(2)

    structure = check_cut(linear_net(between, width=24, reads=8), torch.randn(2, 3, 4))
    (group,) = structure.groups
    rows = {
        "three then heads": [[8 * part + 2 * head + d for part in range(3) for d in range(2)] for head in range(4)],
        "heads then three": [[6 * head + d for d in range(6)] for head in range(4)],
    }
    assert group.members[0].index.tolist() == rows[layout]


def test_a_position_bias_that_layers_share_couples_their_heads() -> None:
    """T5: one tensor is added to the scores of every layer."""

    class Layer(Attention):
        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return self.out(sdpa(q, k, v, bias).transpose(1, 2).flatten(2))

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])
            self.table = nn.Embedding(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            bias = self.table((torch.arange(3)[:, None] - torch.arange(3)) % 5).permute(2, 0, 1)
            for layer in self.layers:
                x = x + layer(x, bias)
            return x

    structure = check_cut(Biased(), torch.randn(2, 3, 8))
    (group,) = structure.groups
    assert group.size == 4
    assert {m.tensor for m in group.consumers} == {"layers.0.out.weight", "layers.1.out.weight"}


def test_features_of_one_head_are_tied_by_the_product_of_queries_and_keys() -> None:
    """Without a dimension of heads, queries and keys cannot be cut, and values can, one by one."""

    def between(net: nn.Module, h: Tensor) -> Tensor:
        return sdpa(net.q(h), net.k(h), net.v(h))

    parts = {name: nn.Linear(8, 6) for name in "qkv"}
    structure = check_cut(linear_net(between, reads=6, **parts), torch.randn(2, 3, 4))
    assert sizes(structure) == [6, 8]
    assert TWO in structure.why_frozen("q")
    assert "Nothing" in structure.why_frozen("v.bias")
