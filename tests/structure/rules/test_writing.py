"""Writing by index and through views: both sides meet along the dimensions that no index touches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.law import Row, alone, check_cut, given, hold, hold_in_a_model, in_models, linear_net, row, sizes
from torch import Tensor, nn

H = given((3, 8), 1)
S = given((2, 8, 3), 1)
FREE = "abcdefgh"
NONE = "........"
BY_INDEX = "is indexed by position or data"
THROUGH = "is written through a view of another tensor"
I3 = torch.tensor([1, 0, 2])
COUNTS = "flows as a size into the numbers of"
MASK = torch.tensor([True, False, True])


def places(h: Tensor) -> Tensor:
    """One place for every unit, always the same."""
    return torch.zeros(h.shape[1], dtype=torch.int64)


def set_(target: Tensor, where: Any, value: Any) -> Tensor:
    """``target[where] = value``."""
    target[where] = value
    return target


def steps(h: Tensor) -> Tensor:
    out = h.new_zeros(3, 2, h.shape[1])
    for t in range(3):
        out[t] = h[:, :, t]
    return out


def two_parts(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_zeros(2, a.shape[1] + b.shape[1], 3)
    out[:, : a.shape[1]] = a
    out[:, a.shape[1] :] = b
    return out


def transposed(h: Tensor) -> Tensor:
    out = torch.empty(2, h.shape[1], 3, dtype=h.dtype)
    out.transpose(1, 2).copy_(h.transpose(1, 2))
    return out


def by_a_sibling(a: Tensor, b: Tensor) -> Tensor:
    """Two views that look alike but at other elements of the same storage."""
    out = a.new_zeros(2, 2 * a.shape[1], 3)
    left, right = out[:, : a.shape[1]], out[:, a.shape[1] :]
    left.copy_(a)
    return right + b


ROWS: dict[str, Row] = {
    "index_put": row(lambda a, s: set_(a.clone(), I3, s), H, H, FREE, FREE),
    "index_put into zeros": row(lambda s: set_(s.new_zeros(4, s.shape[1]), I3, s), H, FREE),
    "index_put by two indices": row(lambda s: set_(s.new_zeros(2, 4, s.shape[1]), (I3 % 2, I3), s), H, FREE),
    "index_put of the last dimension": row(
        lambda s: set_(s.new_zeros(s.shape[1], 4), (slice(None), I3), s.t()), H, FREE
    ),
    "index_put by a mask, one value": row(lambda s: set_(s.clone(), MASK, 0), H, FREE),
    "index_put by a mask, one row": row(
        lambda s, v: set_(s.clone(), MASK, v), H, given((8,), 0, weight=True), FREE, FREE
    ),
    "index_put along units": row(lambda s: set_(s.clone(), (slice(None), I3), 0.0), H, NONE, BY_INDEX),
    "index_put by a mask of all": row(lambda s: set_(s.clone(), s < 0, 0), H, FREE),
    "index_put by a mask of all, a tensor": row(lambda s: set_(s.clone(), s < 0, torch.ones(1).double()), H, FREE),
    "index_put by a mask of all, by another tensor": row(
        lambda a, s: set_(a.clone(), s > a, 0.5), H, H, FREE, FREE
    ),
    "index_put by a mask of all, by position": row(
        lambda m, s: set_(s.clone(), m, 0), given((3, 8), value=torch.eye(3, 8) > 0), H, NONE, "meets another"
    ),
    "index_put by a mask of all, many values": row(
        lambda s: set_(s.clone(), s < 0, s[s < 0]), H, NONE, "is used as an index"
    ),
    "index_put by a mask of all, added": row(
        lambda s: s.index_put((s < 0,), torch.ones(()).double(), accumulate=True), H, FREE
    ),
    "index_put of something fixed": row(lambda a, s: set_(a.clone(), I3, s), H, given((3, 8)), NONE, "meets another"),
    "index_put, added up": row(
        lambda s: s.new_zeros(4, s.shape[1]).index_put((I3,), s, accumulate=True), H, FREE
    ),
    "scatter": row(lambda a, s: a.scatter(0, I3[:, None].expand(3, a.shape[1]), s), H, H, FREE, FREE),
    "scatter a value along units": row(lambda a: a.scatter(1, I3[:, None], 1.0), H, NONE, BY_INDEX),
    "scatter to the first units only": row(lambda a: a.scatter(0, I3[:, None], 1.0), H, NONE, BY_INDEX),
    "scatter_add": row(
        lambda s: s.new_zeros(4, s.shape[1]).scatter_add(0, I3[:, None].expand(3, s.shape[1]), s), H, FREE
    ),
    "scatter_reduce": row(
        lambda s: s.new_zeros(4, s.shape[1]).scatter_reduce(0, I3[:, None].expand(3, s.shape[1]), s, "mean"), H, FREE
    ),
    "index_add": row(lambda s: s.new_zeros(4, s.shape[1]).index_add_(0, I3, s), H, FREE),
    "index_copy": row(lambda a, s: a.index_copy(0, I3, s), H, H, FREE, FREE),
    "index_reduce": row(lambda s: s.new_zeros(4, s.shape[1]).index_reduce(0, I3, s, "mean"), H, FREE),
    "index_fill": row(lambda a: a.index_fill(0, I3[:1], 0.0), H, FREE),
    "index_fill of units": row(lambda a: a.index_fill(1, I3[:1], 0.0), H, NONE, BY_INDEX),
    "select_scatter": row(lambda a, s: a.select_scatter(s, 0, 1), H, given((8,), 0), FREE, FREE),
    "slice_scatter": row(lambda a, s: a.slice_scatter(s, 0, 1), H, given((2, 8), 1), FREE, FREE),
    "index_put adds up ones": row(
        lambda h: h * h.new_zeros(2).index_put((places(h),), h.new_ones(1), accumulate=True)[0], H, NONE, COUNTS,
        trial=True,
    ),
    "scatter_add adds up ones": row(
        lambda h: h * h.new_zeros(2).scatter_add(0, places(h), h.new_ones(h.shape[1]))[0], H, NONE, COUNTS, trial=True
    ),
    "scatter_add adds up the first of many": row(
        lambda h: h * h.new_zeros(2).scatter_add(0, places(h), torch.arange(9.0, dtype=h.dtype))[0], H, NONE, COUNTS,
        trial=True,
    ),
    "scatter_reduce multiplies twos": row(
        lambda h: h * h.new_ones(2).scatter_reduce(0, places(h), h.new_full(h[0].shape, 2), "prod")[0], H, NONE, COUNTS,
        trial=True,
    ),
    "index_add adds up ones": row(
        lambda h: h * h.new_zeros(2).index_add(0, places(h), h.new_ones(h.shape[1]))[0], H, NONE, COUNTS, trial=True
    ),
    "bincount": row(lambda h: h * torch.bincount(places(h)).to(h.dtype), H, NONE, COUNTS, trial=True),
    "histc": row(lambda h: h * torch.histc(h.new_ones(h.shape[1]), 1), H, NONE, COUNTS, trial=True),
    "index_add adds up ones along other dimensions": row(
        lambda h: h * h.new_zeros(2).index_add(0, places(h.t()), h.new_ones(3))[0], H, FREE
    ),
    "masked_scatter": row(lambda a, s: a.masked_scatter(a > 0, s), H, H, NONE, NONE, BY_INDEX),
    "in place through a view": row(lambda a: (b := a.clone(), b[:, :, 0].mul_(2))[0], S, FREE),
    "in place through a view of heads": row(
        lambda a: (b := a.clone(), b.unflatten(1, (2, -1)).add_(1))[0], S, "abcdabcd"
    ),
    "into a part of zeros": row(lambda a: set_(a.new_zeros(2, a.shape[1], 5), (..., slice(1, 4)), a), S, FREE),
    "one step after another": row(steps, S, FREE),
    "through a transposed view": row(transposed, S, FREE),
    "two parts of one tensor": row(two_parts, S, given((2, 5, 3), 1), NONE, ".....", THROUGH),
    "beside a view that looks alike": row(by_a_sibling, S, S, NONE, NONE, THROUGH),
}  # fmt: skip


@pytest.mark.parametrize("one", alone(ROWS))
def test_commutes_with_removal(one: Row) -> None:
    hold(one)


@pytest.mark.parametrize("one", in_models(ROWS))
def test_in_a_model(one: Row) -> None:
    hold_in_a_model(one)


def test_a_fixed_value_written_beside_units_freezes_them() -> None:
    """What both views look at holds the model's input along the same dimension."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = x.new_zeros(2, 2, 4)
            out[:, 0] = x
            out[:, 1] = self.a(x)
            return self.b(out)

    structure = check_cut(Both(), torch.randn(2, 4))
    assert not structure.groups
    assert "meets another tensor's dimension" in structure.why_frozen("a.weight")


def test_messages_of_a_graph_are_added_up() -> None:
    """Graph networks gather rows by one index and add them by another."""
    source, target = torch.tensor([0, 1, 2, 2, 0]), torch.tensor([1, 2, 0, 1, 2])

    def between(net: nn.Module, h: Tensor) -> Tensor:
        messages = net.message(h[source]).relu()
        return h + torch.zeros_like(h).index_add_(0, target, net.back(messages))

    net = linear_net(between, message=nn.Linear(8, 6), back=nn.Linear(6, 8))
    assert sizes(check_cut(net, torch.randn(3, 4))) == [6, 8]


def test_a_weight_changed_in_place_still_consumes_if_zero_stays_zero() -> None:
    def between(net: nn.Module, h: Tensor, low: float = -1.0) -> Tensor:
        net.mid.weight.data.clamp_(low, 1)
        return net.mid(h)

    parts = {"reads": 6}
    clamped = check_cut(linear_net(between, mid=nn.Linear(8, 6), **parts), torch.randn(2, 4))
    lifted = check_cut(linear_net(lambda net, h: between(net, h, 0.5), mid=nn.Linear(8, 6), **parts), torch.randn(2, 4))
    assert sizes(clamped) == [6, 8]
    assert sizes(lifted) == [6]
