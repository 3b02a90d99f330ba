"""Matrix products: a weight consumes what it is multiplied with; two activations freeze what they are summed over."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.law import Given, Row, alone, check_cut, given, hold, hold_in_a_model, in_models, linear_net, row, sizes
from torch import Tensor, nn


def weight(*shape: int) -> Given:
    """A parameter, each of whose dimensions has units."""
    return given(shape, *range(len(shape)), weight=True)


def chain(a: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """A product whose order torch chooses by sizes."""
    return torch.linalg.multi_dot([a, w, v])


X = given((3, 6), 1)
TOKENS = given((2, 3, 6), 2)
TWO = "is contracted in a product of two activations"
READS = "reads a dimension that cannot be cut"
IN, OUT = "abcdef", "ghij"

ROWS: dict[str, Row] = {
    "mm": row(lambda x, w: x @ w, X, weight(6, 4), IN, IN, OUT),
    "addmm": row(lambda x, w, b: torch.addmm(b, x, w), X, weight(6, 4), weight(4), IN, IN, OUT, OUT),
    "addmm without its addend": row(
        lambda x, w, b: torch.addmm(b, x, w, beta=0), X, weight(6, 4), weight(4), IN, IN, OUT, OUT
    ),
    "linear": row(F.linear, TOKENS, weight(4, 6), weight(4), IN, OUT, IN, OUT),
    "linear of the model's input": row(F.linear, given((2, 3, 6)), weight(4, 6), "abcd", "......", READS),
    "bmm": row(torch.bmm, TOKENS, weight(2, 6, 4), IN, "..", IN, OUT, "meets another tensor's"),
    "bmm with units in the batch": row(
        torch.bmm, given((2, 3, 6), 0, 2), weight(2, 6, 4), "ab", "cdefgh", "ab", "cdefgh", "ijkl"
    ),
    "baddbmm": row(
        torch.baddbmm, given((2, 3, 4), 2), TOKENS, given((2, 6, 4), 1, 2, weight=True),
        "abcd", "efghij", "efghij", "abcd",
    ),
    "matmul of four dimensions": row(torch.matmul, given((2, 3, 5, 6), 3), weight(6, 4), IN, IN, OUT),
    "matmul of heads": row(
        torch.matmul, given((2, 3, 5, 6), 1, 3), weight(3, 6, 4), "abc", "defghi", "abc", "defghi", "jklm"
    ),
    "two activations": row(
        lambda a, b: a @ b.mT, given((2, 3, 6), 1, 2), given((2, 5, 6), 1, 2), "abc", "......", "defgh", "......", TWO
    ),
    "with something fixed": row(torch.mm, X, given((6, 4)), "......", TWO),
    "mv": row(torch.mv, X, weight(6), IN, IN),
    "mv, weight first": row(torch.mv, weight(4, 6), given((6,), 0), "abcd", "efghij", "efghij"),
    "addmv": row(torch.addmv, weight(4), weight(4, 6), given((6,), 0), "abcd", "abcd", "efghij", "efghij"),
    "addr": row(torch.addr, given((4, 6), 0, 1), given((4,), 0), given((6,), 0), "abcd", "efghij", "abcd", "efghij"),
    "dot": row(torch.dot, given((6,), 0), weight(6), IN, IN),
    "dot of two activations": row(torch.dot, given((6,), 0), given((6,), 0), "......", "......", TWO),
    "inner": row(torch.inner, X, weight(5, 6), IN, "ghijk", IN),
    "outer": row(torch.outer, given((6,), 0), given((4,), 0), IN, OUT),
    "tensordot": row(
        lambda a, w: torch.tensordot(a, w, dims=([1], [0])), given((2, 6, 3), 1), weight(6, 4), IN, IN, OUT
    ),
    "chain": row(chain, given((1, 6), 1), weight(6, 4), weight(4, 5), IN, IN, OUT, OUT, "klmno"),
    "bilinear": row(
        F.bilinear, given((2, 6), 1), given((2, 4), 1), weight(5, 6, 4), IN, OUT, "klmno", IN, OUT
    ),
    "bilinear with activations as weight": row(
        F.bilinear, X, given((3, 4)), given((5, 6, 4), 0), "......", ".....", "with two other tensors"
    ),
    "einsum": row(lambda x, w: torch.einsum("btc,cd->btd", x, w), TOKENS, weight(6, 4), IN, IN, OUT),
    "einsum of three": row(
        lambda x, w, v: torch.einsum("bc,cd,de->be", x, w, v), X, weight(6, 4), weight(4, 5), IN, IN, OUT, OUT, "klmno"
    ),
    "einsum to heads": row(
        lambda x, w: torch.einsum("bte,ehd->bhtd", x, w), TOKENS, weight(6, 2, 4), IN, IN, "gh", "....",
        "is merged with another unit's dimension",
    ),
    "einsum from heads": row(
        lambda x, w: torch.einsum("bhtd,hde->bte", x, w), given((2, 3, 5, 4), 1, 3), weight(3, 4, 6),
        "abc", "....", "abc", "....", "defghi", "is merged with another unit's dimension",
    ),
    "einsum with stacked experts": row(
        lambda x, w, v: torch.einsum("nef,efd->ned", torch.einsum("nd,edf->nef", x, w).relu(), v).sum(1),
        X, weight(3, 6, 5), weight(3, 5, 4), IN, "...", IN, "ghijk", "...", "ghijk", "lmno", "which is cut instead",
    ),
    "einsum with stacked experts, all summed": row(
        lambda x, w, v: torch.einsum("nef,efd->nd", torch.einsum("nd,edf->nef", x, w).relu(), v),
        X, weight(3, 6, 5), weight(3, 5, 4), IN, "ghi", IN, ".....", "ghi", ".....", "jklm", "which is cut instead",
    ),
    "einsum with stacked experts and biases": row(
        lambda x, w, b, v: torch.einsum("nef,efd->ned", torch.einsum("nd,edf->nef", x, w) + b, v).sum(1),
        X, weight(3, 6, 5), weight(3, 5), weight(3, 5, 4),
        IN, "...", IN, "ghijk", "...", "ghijk", "...", "ghijk", "lmno", "which is cut instead",
    ),
    "einsum element by element": row(
        lambda a, w: torch.einsum("bct,c->bct", a, w), given((2, 6, 3), 1), weight(6), IN, IN
    ),
    "einsum as an outer product": row(
        lambda a, b: torch.einsum("bc,bd->bcd", a, b), X, given((3, 4), 1), IN, OUT
    ),
    "einsum as a sum": row(lambda a: torch.einsum("bct->bt", a), given((2, 6, 3), 1), "......", "is reduced over"),
    "einsum as a diagonal": row(
        lambda a: torch.einsum("bcc->bc", a), given((2, 6, 6), 1), "......", "is paired with another"
    ),
    "weight of two products": row(
        lambda x, a, b: x @ (a @ b), X, weight(6, 4), weight(4, 5), IN, IN, OUT, OUT, "klmno"
    ),
    "scaled outputs": row(
        lambda x, w, s: F.linear(x, w * s[:, None]), X, weight(4, 6), weight(4), IN, OUT, IN, OUT
    ),
    "scaled inputs": row(lambda x, w, s: F.linear(x, w * s), X, weight(4, 6), weight(6), IN, OUT, IN, IN),
    "two weights below each other": row(
        lambda x, v, w: F.linear(x, torch.cat([v, w])), X, weight(4, 6), weight(3, 6), IN, OUT, IN, "klm", IN
    ),
    "two weights stacked": row(
        lambda x, v, w: torch.einsum("bc,kdc->bkd", x, torch.stack([v, w])), X, weight(4, 6), weight(4, 6),
        IN, OUT, IN, OUT, IN,
    ),
    "halves of a weight": row(
        lambda x, w: F.linear(x, w.chunk(2)[0]) * F.linear(x, w.chunk(2)[1]), X, weight(8, 6), IN, "ghijghij", IN
    ),
    "forth and back by one weight": row(
        lambda x, w: F.linear(F.linear(x, w).relu(), w.t()), X, weight(4, 6), IN, OUT, IN
    ),
    "an expanded weight": row(lambda x, w: torch.bmm(x, w.expand(2, -1, -1)), TOKENS, weight(6, 4), IN, IN, OUT),
    "a sum of equal values": row(
        lambda w: torch.ones(3, w.shape[0]).double() @ w, weight(6, 4), "abcdef", "ghij"
    ),
}  # fmt: skip


@pytest.mark.parametrize("one", alone(ROWS))
def test_commutes_with_removal(one: Row) -> None:
    hold(one)


@pytest.mark.parametrize("one", in_models(ROWS))
def test_in_a_model(one: Row) -> None:
    hold_in_a_model(one)


def test_units_without_a_consumer_are_no_units() -> None:
    """The scores of two activations read them, and no weight does."""

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 6), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) @ self.k(x).mT

    structure = check_cut(Scores(), torch.randn(2, 3, 4))
    assert not structure.groups
    assert TWO in structure.why_frozen("q.weight")


def test_every_use_must_end_at_a_consumer() -> None:
    """One use at a weight is not enough where another one is a product of two activations."""

    def between(net: nn.Module, h: Tensor) -> Tensor:
        return h + (h * h.roll(1, 0)).sum(-1, keepdim=True)

    structure = check_cut(linear_net(between), torch.randn(3, 4))
    assert not structure.groups
    assert "is reduced over (sum)" in structure.why_frozen("a.weight")


def test_bare_parameters_and_einsum_need_no_registration() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 10))
            self.gate = nn.Parameter(torch.randn(10))
            self.down = nn.Parameter(torch.randn(3, 10))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bc,oc->bo", torch.einsum("bi,ic->bc", x, self.up).relu() * self.gate, self.down)

    structure = check_cut(Own(), torch.randn(2, 4))
    assert sizes(structure) == [10]
    assert structure.groups[0].name == "up"
    assert [m.tensor for m in structure.groups[0].consumers] == ["down"]


def test_a_mixture_of_experts_as_batched_products() -> None:
    """Experts stacked in one parameter lose the same hidden units."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 4, 6))
            self.down = nn.Parameter(torch.randn(3, 6, 5))

        def forward(self, x: Tensor) -> Tensor:
            return (torch.bmm(x.expand(3, -1, -1), self.up).relu() @ self.down).sum(0)

    structure = check_cut(Experts(), torch.randn(2, 4))
    assert 6 in sizes(structure)


def test_a_chain_whose_order_its_sizes_choose_keeps_the_units_that_choose_it() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.randn(*shape)) for shape in ((3, 6), (6, 4), (4, 5)))
            self.head = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(chain(x @ self.a, self.b, self.c))

    structure = check_cut(Chain(), torch.randn(3, 3))
    assert "does not come through" in structure.why_frozen("a")
    assert sizes(structure) == [4, 5]
