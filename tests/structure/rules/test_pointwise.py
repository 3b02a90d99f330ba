"""Element by element: units that meet are tied, what meets something fixed is frozen, zero stays zero in a weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.law import Row, alone, check_cut, given, hold, hold_in_a_model, in_models, law, linear_net, row, sizes
from torch import Tensor

from secateur.structure.rules import known_operators

H = given((2, 8, 3), 1)
IM = given((2, 8, 4, 4), 1)
FREE = "abcdefgh"
NONE = "........"
FIXED = "meets another tensor's dimension that cannot be cut"
W8 = given((8,), 0, weight=True)

#: Torch's own tag finds these; one row each would say the same.
TAGGED = (
    *("relu", "sigmoid", "tanh", "gelu", "silu", "exp", "softplus", "hardswish", "mish", "celu", "elu", "selu"),
    *("leaky_relu", "relu6", "hardtanh", "hardsigmoid", "softsign", "logsigmoid", "tanhshrink"),
    *("softshrink", "square", "rsqrt", "log1p", "sin", "floor", "isnan", "logical_not", "erf"),
    "nan_to_num",
)  # fmt: skip


def _all_tagged(h: Tensor) -> Tensor:
    results = [getattr(F, name, getattr(torch, name, None))(h) for name in TAGGED]
    return sum(result.double().nan_to_num() for result in results)


ROWS: dict[str, Row] = {
    "all of torch's tag": row(_all_tagged, H, FREE),
    "add": row(lambda a, b: a + b, H, H, FREE, FREE),
    "add broadcast": row(lambda a, b: a + b, H, given((8, 1), 0), FREE, FREE),
    "add a number": row(lambda a: a + 1, H, FREE),
    "add what is fixed": row(lambda a, b: a + b, H, given((8, 1)), NONE, FIXED),
    "add what is the same everywhere": row(lambda a: a + torch.ones(a.shape[1], 1).double(), H, FREE),
    "add an uneven constant": row(lambda a: a + torch.linspace(0, 1, 8).double()[:, None], H, NONE, FIXED),
    "add over other dimensions": row(lambda a, b: a[..., None] + b, given((2, 8), 1), given((5,), 0), FREE, "ijklm"),
    "three operands": row(lambda a, b: torch.addcmul(a, b, b) + torch.lerp(a, b, 0.5), H, H, FREE, FREE),
    "where": row(lambda a, b: torch.where(a > 0, a, b), H, H, FREE, FREE),
    "where, condition the same for all units": row(lambda c, a: torch.where(c > 0, a, 0.0), given((2, 1, 3)), H, FREE),
    "where, condition by position": row(
        lambda c, a: torch.where(c, a, 0.0), given((8, 1), value=torch.ones(8, 1, dtype=torch.bool)), H, NONE, FIXED
    ),
    "where with a number": row(lambda a: torch.where(a > 0, a, 8), H, FREE),
    "masked_fill": row(lambda a: a.masked_fill(a > 0, 1), H, FREE),
    "clamp by tensors": row(lambda a, b: a.clamp(b), H, H, FREE, FREE),
    "maximum": row(torch.max, H, H, FREE, FREE),
    "comparison": row(lambda a, b: (a > b).double(), H, H, FREE, FREE),
    "several results": row(lambda a: torch.frexp(a).mantissa, H, FREE),
    "isin": row(lambda a: torch.isin(a, torch.arange(3.0)).double(), H, FREE),
    "prelu": row(F.prelu, H, W8, FREE, FREE),
    "rrelu": row(F.rrelu, H, FREE),
    "copy": row(lambda a, b: a.clone().copy_(b), H, H, FREE, FREE),
    "copy into something empty": row(lambda a: torch.empty_like(a).copy_(a), H, FREE),
    "in place": row(lambda a: a.clone().relu_().mul_(2).add_(1), H, FREE),
    "fill": row(lambda a: a + a.clone().fill_(2), H, FREE),
    "zero": row(lambda a: a + a.clone().zero_(), H, FREE),
    "dropout": row(lambda h: F.dropout(h, 0.5, training=True) * 0, H, FREE),
    "dropout of channels": row(lambda h: F.dropout2d(h, 0.5, training=True) * 0, IM, FREE),
    "alpha dropout": row(lambda h: F.alpha_dropout(h, 0.5, training=True) * 0, H, FREE),
    "stochastic depth": row(lambda a: a * a.new_empty((2, 1, 1)).bernoulli_(0.5) * 0, H, FREE),
    "SE gate": row(
        lambda h, w: h * torch.sigmoid(F.linear(h.mean(2), w))[..., None],
        H,
        given((8, 8), 0, 1, weight=True),
        FREE,
        FREE,
        FREE,
    ),
    "spatial gate": row(lambda s, h: s.expand_as(h) * h, given((2, 1, 3)), H, FREE),
    "polar": row(lambda h: torch.polar(h.abs(), h).real, H, FREE),
}


@pytest.mark.parametrize("one", alone(ROWS))
def test_commutes_with_removal(one: Row) -> None:
    hold(one)


@pytest.mark.parametrize("one", in_models(ROWS))
def test_in_a_model(one: Row) -> None:
    hold_in_a_model(one)


def _bounded(w: Tensor) -> Tensor:
    return w / w.abs().amax(1, keepdim=True)


def _touched(zeros: Tensor) -> Tensor:
    zeros[0].fill_(1)
    return zeros


def _masked(w: Tensor, value: float) -> Tensor:
    w = w.clone()
    w[w < 0.1] = value
    return w


#: Ways from a parameter to the weight that a contraction reads, by whether 0 stays 0 in each element by itself.
WAYS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "itself": (lambda w: w, True),
    "cast": (lambda w: w.float().double(), True),
    "scaled": (lambda w: -w * 0.1 / 2, True),
    "transposed twice": (lambda w: w.t().contiguous().t(), True),
    "tanh": (lambda w: w.tanh(), True),
    "relu": (lambda w: w.relu(), True),
    "sign": (lambda w: w.sign(), True),
    "square": (lambda w: w**2, True),
    "rounded": (lambda w: (w * 8).round() / 8, True),
    "clamped around zero": (lambda w: w.clamp(-0.5, 0.5), True),
    "masked by itself": (lambda w: w * (w.abs() > 0.1), True),
    "masked_fill with zero": (lambda w: w.masked_fill(w < 0, 0.0), True),
    "zero where small": (lambda w: torch.where(w.abs() > 0.1, w, 0.0), True),
    "zero elsewhere": (lambda w: torch.where(w > 0.1, 0, w), True),
    "where, with a tensor of one zero": (lambda w: torch.where(w < 1, w, torch.tensor(0.0).double()), True),
    "where, with zeros like itself": (lambda w: torch.where(w < 1, w, torch.zeros_like(w)), True),
    "where, with a full tensor of zeros": (lambda w: torch.where(w < 1, w, w.new_full((1,), 0)), True),
    "where, both of itself": (lambda w: torch.where(w < 0, w * 0.1, w), True),
    "zeros written by a mask": (lambda w: _masked(w, 0), True),
    "ones written by a mask": (lambda w: _masked(w, 1), False),
    "where, one elsewhere": (lambda w: torch.where(w < 1, w, 1.0), False),
    "where, with zeros no more": (lambda w: torch.where(w < 0, w, torch.zeros_like(w).add_(1)), False),
    "where, with zeros written to": (lambda w: torch.where(w < 0, w, _touched(torch.zeros_like(w))), False),
    "minus a part of itself": (lambda w: w - w.detach() * 0.5, True),
    "straight through": (lambda w: w + (w.round() - w).detach(), True),
    "sum of both parts": (lambda w: w.tril() + w.triu(1), False),
    "clamped away from zero": (lambda w: w.clamp(0.5, 1), False),
    "softplus": (F.softplus, False),
    "one more": (lambda w: 1 + w, False),
    "exp": (lambda w: w.exp(), False),
    "to the power of 0": (lambda w: w**0, False),
    "reciprocal": (lambda w: 1 / w, False),
    "sigmoid gate": (lambda w: w.sigmoid(), False),
    "normalised": (lambda w: F.normalize(w, dim=1), False),
    "normalised by the largest": (_bounded, False),
    "standardised": (lambda w: (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True), False),
    "softmax": (lambda w: w.softmax(1), False),
    "shuffled": (lambda w: w.roll(1, 1), False),
}


@pytest.mark.parametrize("way", WAYS)
def test_only_a_way_that_keeps_zero_makes_a_consumer(way: str) -> None:
    change, consumes = WAYS[way]
    verdict = law(
        lambda x, w: F.linear(x, change(w)), given((2, 6), 1), given((4, 6), 0, 1, weight=True), seeds=range(2)
    )
    assert verdict.patterns()[0] == ("abcdef" if consumes else "......")
    if not consumes:
        assert verdict.reasons()


def test_a_product_with_data_is_no_weight() -> None:
    verdict = law(lambda x, w, s: F.linear(x, w * s), given((2, 6), 1), given((4, 6), 0, 1, weight=True), given((4, 1)))
    assert verdict.patterns()[0] == "......"


def test_a_low_rank_update_consumes_at_both_weights() -> None:
    """Closing an input of ``w + b a`` takes zeros in ``w`` and in ``a``."""

    def between(net: torch.nn.Module, h: Tensor) -> Tensor:
        return F.linear(h, net.w + net.up @ net.down)

    parts = {"w": torch.randn(6, 8), "up": torch.randn(6, 2), "down": torch.randn(2, 8)}
    structure = check_cut(linear_net(between, reads=6, **parts), torch.randn(2, 4))
    assert sizes(structure) == [2, 6, 8]
    group = next(group for group in structure.groups if group.size == 8)
    assert {(m.tensor, m.dim) for m in group.consumers} == {("w", 1), ("down", 1)}


def test_a_size_that_becomes_a_number_freezes() -> None:
    """The rules see no sizes; the trial does."""

    def check(between: Callable[..., Tensor]) -> str:
        structure = check_cut(linear_net(between), torch.randn(2, 4))
        assert not structure.groups
        return structure.why_frozen("a.weight")

    assert "flows as a size into the numbers of div" in check(lambda net, h: h / h.shape[-1] ** 0.5)
    assert "flows as a size" in check(lambda net, h: h * torch.tensor(h.shape[-1]))
    assert "flows as a size" in check(lambda net, h: h * torch.tensor([1.0, h.shape[-1]]).sum())
    assert "flows as a size" in check(lambda net, h: torch.where(h > 0, h, h.shape[-1]))
    assert "flows as a size" in check(lambda net, h: h + torch.full((1,), h.shape[-1]))
    assert "flows as a size" in check(lambda net, h: h / h.new_ones(h.shape).sum(-1, keepdim=True))
    assert "flows as a size" in check(lambda net, h: h * torch.ones(h.shape[-1], 3).norm())
    assert "flows as a size" in check(
        lambda net, h: h * (torch.ones(3, h.shape[-1]) @ torch.ones(h.shape[-1], 1)).sum()
    )


def test_the_number_of_ones_that_follow_units_is_a_reduction_of_these() -> None:
    verdict = law(lambda h: h / torch.ones_like(h).sum(1, keepdim=True), H)
    assert verdict.patterns() == (NONE,)
    assert verdict.reasons() == {"is reduced over (sum)"}


def test_every_rule_belongs_to_an_operator_of_torch() -> None:
    """A misspelt name would switch a rule off."""
    names = [name for name in known_operators() if "::" not in name]
    missing = [name for name in names if not hasattr(torch.ops.aten, name) and not hasattr(torch.ops.aten, f"{name}_")]
    assert missing == []
