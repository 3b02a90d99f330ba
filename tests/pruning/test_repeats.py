"""Recomputation in a backward pass repeats the draw of the forward pass that it belongs to."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import secateur as sc
from secateur.pruning.draws import live_of

METHODS = {
    "hard concrete": sc.HardConcrete(init_open=0.6),
    "arm": sc.ARM(init_open=0.6),
    "diff-sparse": sc.DifferentiableSparsification(),
}
T = TypeVar("T")
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


class Net(nn.Module):
    """Two layers in the middle are recomputed, and what they return is kept for others to see.

    Args:
        reentrant: way of the recomputation; None for none.
        inner: the same of a part of that part.
    """

    def __init__(self, reentrant: bool | None, inner: bool | None = None) -> None:
        super().__init__()
        self.reentrant, self.inner = reentrant, inner
        self.a, self.b, self.c, self.d = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.keeps = False  # or the trace would find it
        self.feature = torch.zeros(())

    def part(self, h: Tensor) -> Tensor:
        return torch.relu(self.c(h))

    def middle(self, h: Tensor) -> Tensor:
        return maybe(self.inner, self.part, torch.tanh(self.b(h)))

    def forward(self, x: Tensor) -> Tensor:
        h = maybe(self.reentrant, self.middle, torch.tanh(self.a(x)))
        if self.keeps:
            self.feature = h
        return self.d(h)


def maybe(reentrant: bool | None, part: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    return part(h) if reentrant is None else checkpoint(part, h, use_reentrant=reentrant)


X = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(1)).double()


def earlier_feature(net: Net) -> Tensor:
    net(X[0])
    feature = net.feature
    return feature.square().mean() + net(X[1]).square().mean()


def earlier_feature_alone(net: Net) -> Tensor:
    net(X[0])
    feature = net.feature
    with torch.no_grad():
        net(X[1])
    return (feature.sum() - net.feature.sum()) ** 2


def later_feature(net: Net) -> Tensor:
    first = net(X[0])
    net(X[1])
    return (first.sum() - net.feature.sum()) ** 2


def features(net: Net) -> Tensor:
    net(X[0])
    first = net.feature
    net(X[1])
    return (first * net.feature).sum()


def outputs(net: Net) -> Tensor:
    return (net(X[0]) * net(X[1])).sum() + net(X[0]).square().sum()


LOSSES = [earlier_feature, earlier_feature_alone, later_feature, features, outputs]


def gradients(
    net: Net, method: str, loss: Callable[[Net], Tensor], run: Callable[[Callable[[], object]], None]
) -> list[Tensor]:
    torch.manual_seed(0)
    for layer in (net.a, net.b, net.c, net.d):
        layer.reset_parameters()
    pruner = sc.attach(net.double(), examples=(X[0],), method=METHODS[method], seed=2)
    net.keeps = True
    for _ in range(3):
        run(pruner.loss(lambda: loss(net)).backward)
    return [p.grad for p in net.parameters() if p.grad is not None]


def here(backward: Callable[[], object]) -> None:
    backward()


def in_thread(function: Callable[[], T]) -> T:
    """What a function returns in a thread of its own, which numbers nodes from 0."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def elsewhere(backward: Callable[[], object]) -> None:
    """In another thread, as on a GPU, whose numbers are as large as those here."""
    numbered = torch._C._autograd._get_sequence_nr()

    def run() -> None:
        one = torch.ones((), requires_grad=True)
        while (one * 1).grad_fn._sequence_nr() < numbered:  # type: ignore[union-attr]
            pass
        backward()

    in_thread(run)


@pytest.mark.parametrize("run", [here, elsewhere])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_plain_ones(
    method: str, loss: Callable[[Net], Tensor], run: Callable[[Callable[[], object]], None]
) -> None:
    plain = gradients(Net(None), method, loss, here)
    for inner in (None, False):
        ours = in_thread(partial(gradients, Net(False, inner), method, loss, run))
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("run", [here, elsewhere])
@pytest.mark.parametrize("inner", [None, False, True])
@pytest.mark.parametrize("method", METHODS)
def test_reentrant_gradients_are_the_plain_ones(
    method: str, inner: bool | None, run: Callable[[Callable[[], object]], None]
) -> None:
    plain = gradients(Net(None), method, outputs, here)
    ours = in_thread(partial(gradients, Net(True, inner), method, outputs, run))
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_whole_model_computed_again_in_every_step(reentrant: bool, parts: bool) -> None:
    def loss(net: Net, way: bool | None) -> Tensor:
        def by_parts(x: Tensor) -> Tensor:
            return net.d(net.middle(torch.tanh(net.a(x))))

        return maybe(way, by_parts if parts else net, X[0].clone().requires_grad_()).square().sum()

    plain, ours = (gradients(Net(None), "hard concrete", partial(loss, way=way), here) for way in (None, reentrant))
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", [earlier_feature, earlier_feature_alone])
def test_a_draw_that_is_gone_is_missed(loss: Callable[[Net], Tensor]) -> None:
    with pytest.raises(sc.GateError, match=r"computed again .* is gone: the model has run since"):
        gradients(Net(True), "hard concrete", loss, here)


def test_draws_go_with_their_graphs() -> None:
    net = Net(False).double()
    pruner = sc.attach(net, examples=(X[0],))
    net.keeps = True
    net(X[0])
    feature, draw = net.feature, weakref.ref(live_of(pruner.gates).draw)
    gc.collect()
    gc.disable()
    try:
        net(X[1])
        assert draw() is not None
        del feature
        assert draw() is None
    finally:
        gc.enable()
