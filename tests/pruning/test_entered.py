"""Gates of a wide linear layer that act on its input while they are drawn."""

from __future__ import annotations

import contextlib
import copy
import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import secateur as sc
from secateur.pruning import placement
from secateur.pruning.draws import live_of
from secateur.pruning.placement import ConsumerGate, gated_sites

N = 3


class Wide(nn.Module):
    """A head that is far wider than a batch is long, and weights that are read outside of their layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.fc1, self.fc2 = nn.Linear(6 * 16, 20), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(F.relu(self.conv(x)).flatten(1))))


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, 1, 6, 6, generator=generator).double(), torch.randint(4, (N,), generator=generator)


def made(method: sc.Method, **options: object) -> tuple[Wide, sc.Pruner]:
    torch.manual_seed(1)
    net = Wide().double()
    return net, sc.attach(net, examples=(batch()[0],), method=method, seed=2, **options)


def loss_of(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x), y)


def gate_of(net: Wide, name: str) -> ConsumerGate:
    return next(site.gate for site in gated_sites(net) if site.name == f"{name}.weight")


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the inputs that gates acted on."""
    seen: list[int] = []
    enter = ConsumerGate.enter

    def noted(gate: ConsumerGate, owner: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        found = enter(gate, owner, args)
        if found is not None:
            seen.append(args[0].numel())
        return found

    monkeypatch.setattr(ConsumerGate, "enter", noted)
    return seen


METHODS = {
    "hard concrete": sc.HardConcrete(init_open=0.6),
    "arm": sc.ARM(init_open=0.6),
    "ar": sc.ARM(init_open=0.6, estimator="ar"),
    "diffprune": sc.DiffPrune(),
    "diff-sparse": sc.DifferentiableSparsification(),
}


CASES = [(method, False) for method in METHODS] + [(method, True) for method in METHODS if "diff" not in method]


@pytest.mark.parametrize(("method", "conditional"), CASES)
def test_losses_and_gradients_are_those_of_gated_weights(
    method: str, conditional: bool, monkeypatch: pytest.MonkeyPatch, entered: list[int]
) -> None:
    results = []
    for less in (placement.LESS, 10**9):
        monkeypatch.setattr(placement, "LESS", less)
        net, pruner = made(METHODS[method], budget=sc.Budget(keep_params=0.5, steps=9), conditional=conditional)
        before = len(entered)
        losses = [pruner.backward(partial(loss_of, net, *batch(seed))) for seed in range(3)]
        assert (len(entered) > before) == (less == 2)
        results.append([*losses, *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 8
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-13)


def test_under_autocast_gates_keep_their_precision(monkeypatch: pytest.MonkeyPatch, entered: list[int]) -> None:
    results = []
    for less in (placement.LESS, 10**9):
        monkeypatch.setattr(placement, "LESS", less)
        net, pruner = made(METHODS["hard concrete"])
        x, y = batch()
        with torch.autocast("cpu", torch.bfloat16):
            pruner.backward(partial(loss_of, net.float(), x.float(), y))
        results.append([p.grad for p in pruner.gates.parameters()])
    assert entered == [N * 96]
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, plain, rtol=0.1, atol=2e-3)


def test_only_where_the_input_is_far_smaller_than_the_weight(entered: list[int]) -> None:
    net, _ = made(METHODS["hard concrete"])
    loss_of(net, *batch())
    assert entered == [N * 96]  # fc2's weight has 80 numbers, its input 60
    x = torch.randn(20, 1, 6, 6).double()
    net(x)
    assert entered == [N * 96]
    net.eval()
    net(batch()[0])
    assert entered == [N * 96]


@pytest.mark.parametrize("method", METHODS)
def test_cached_weights_serve_small_inputs_and_large_ones(method: str, entered: list[int]) -> None:
    found = []
    for cached in (contextlib.nullcontext, parametrize.cached):
        net, pruner = made(METHODS[method])
        body = net.forward
        small, large = batch()[0], torch.randn(40, 1, 6, 6, generator=torch.Generator().manual_seed(5)).double()
        net.forward = lambda x, body=body, other=large: torch.cat([body(x), body(other)])  # type: ignore[method-assign]
        for _ in range(2):
            with cached():
                pruner.backward(lambda net=net, x=small: net(x).square().mean())
        found.append([p.grad for p in net.parameters() if p.grad is not None])
        assert bool(entered) == (cached is contextlib.nullcontext)
        entered.clear()
    assert len(found[0]) > 6
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-13)


def test_cached_weights_are_those_of_the_draw_of_their_forward_and_of_evaluation() -> None:
    net, _ = made(METHODS["hard concrete"])
    x = batch()[0]
    with parametrize.cached():
        assert not torch.equal(net(x), net(x))
        found = net.eval()(x)
        weight = net.fc1.weight
        assert net.fc1.weight is weight
    assert torch.equal(found, net(x))


def test_weights_read_beside_their_layer_are_gated(entered: list[int]) -> None:
    net, _ = made(METHODS["arm"])
    net(batch()[0])
    gates = live_of(gates_of_model(net)).draw
    assert gates is not None
    site = next(site for site in gated_sites(net) if site.name == "fc1.weight")
    expected = site.gate.product(site.chain.original, gates.values)
    assert entered
    torch.testing.assert_close(net.fc1.weight, expected)


def gates_of_model(net: nn.Module) -> torch.nn.Module:
    return next(module for module in net.modules() if type(module).__name__ == "GateSet")


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward"])
def test_hooks_of_others_see_the_input_without_gates(kind: str, entered: list[int]) -> None:
    net, pruner = made(METHODS["hard concrete"])
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], *_: object) -> None:
        seen.append(args[0])

    handle = getattr(net.fc1, f"register_{kind}_hook")(hook)
    pruner.backward(lambda: loss_of(net, *batch()))
    assert seen
    assert not entered
    handle.remove()
    pruner.backward(lambda: loss_of(net, *batch()))
    assert entered


@pytest.mark.parametrize(("method", "enters"), [("hard concrete", False), ("ar", True)])
def test_an_input_without_gradient_is_left_alone_where_gates_need_one(
    method: str, enters: bool, entered: list[int]
) -> None:
    net = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 3)).double()
    x, y = torch.randn(2, 30).double(), torch.tensor([0, 2])
    pruner = sc.attach(net, examples=(x,), gates=[sc.Rule("inputs", where="0", method=METHODS[method])])
    pruner.backward(lambda: F.cross_entropy(net(x), y))
    assert bool(entered) == enters


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    net, _ = made(METHODS["hard concrete"])
    x = torch.randn(2, 95).double().requires_grad_()
    net(batch()[0])
    with pytest.raises(RuntimeError):
        net.fc1(x)
    assert not gate_of(net, "fc1").entered


def test_copies_and_plain_models_have_their_own_hooks_or_none(entered: list[int]) -> None:
    net, pruner = made(METHODS["ar"])
    twin = copy.deepcopy(net)
    twin(batch()[0])
    assert entered
    assert next(iter(twin.fc1._forward_pre_hooks.values())).__self__ is gate_of(twin, "fc1")
    plain = pruner.detach()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in plain.modules())
    assert twin.fc1._forward_pre_hooks
    torch.save(plain, io.BytesIO())


def test_layers_that_compute_otherwise_are_left_alone() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net = nn.Sequential(nn.Linear(3, 40), Doubled(40, 30)).double()
    sc.attach(net, examples=(torch.randn(1, 3).double(),))
    assert not net[1]._forward_pre_hooks


def test_it_goes_on_after_units_are_removed(entered: list[int]) -> None:
    net, pruner = made(sc.HardConcrete(init_open=0.6, clamp=None))
    optimizer = torch.optim.Adam(pruner.param_groups(lr=1e-3))
    with torch.no_grad():
        for parameter in pruner.gates.parameters():
            parameter[:3] = -60.0
    pruner.shrink(optimizer, checks=1)
    pruner.backward(lambda: loss_of(net, *batch()))
    assert entered == [N * net.fc1.in_features]
    assert net.fc1.in_features < 96
    pruner.step()
    small, _ = pruner.finalize()
    assert not any(module._forward_pre_hooks for module in small.modules())
