"""How long draws of gates at outputs live, with one draw for the batch and with one for each example."""

from __future__ import annotations

import copy
import itertools
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import secateur as sc
from secateur.pruning.draws import gates_of, live_of
from secateur.pruning.gateset import extended

DTYPE = torch.float64
PER_EXAMPLE = pytest.mark.parametrize("per_example", [False, True])
METHODS = [
    sc.HardConcrete(init_open=0.6),
    sc.DiffPrune(init_open=0.6),
    sc.DiffPrune(init_open=0.6, mode="stochastic"),
    sc.DifferentiableSparsification(),
    sc.StraightThrough(init_open=0.6),
    sc.ARM(init_open=0.6),
    sc.ARM(init_open=0.6, estimator="ar"),
]


class Mlp(nn.Module):
    """Two gated outputs, each in a region that may be recomputed."""

    dropout = 0.3

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.fc1, self.act1 = nn.Linear(3, 6), nn.Tanh()
        self.fc2, self.act2 = nn.Linear(6, 5), nn.SiLU()
        self.fc3 = nn.Linear(5, 2)
        self.use_reentrant = use_reentrant

    def lower(self, x: Tensor) -> Tensor:
        return self.act1(self.fc1(x))

    def upper(self, h: Tensor) -> Tensor:
        return self.fc3(self.act2(F.dropout(self.fc2(h), self.dropout, self.training)))

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.upper(self.lower(x))
        h = checkpoint(self.lower, x, use_reentrant=self.use_reentrant)
        return checkpoint(self.upper, h, use_reentrant=self.use_reentrant)


@cache
def structure() -> sc.Structure:
    with torch.random.fork_rng():
        return sc.trace(Mlp().double(), (torch.randn(7, 3, dtype=DTYPE),))


def made(
    method: sc.Method | None = None, per_example: bool = False, use_reentrant: bool | None = None
) -> tuple[Mlp, Tensor, sc.Pruner]:
    torch.manual_seed(1)
    net, x = Mlp(use_reentrant).double(), torch.randn(7, 3, dtype=DTYPE, requires_grad=True)
    rule = sc.Rule("activations", where=("act1", "act2"), per_example=per_example)
    method = sc.HardConcrete(init_open=0.6) if method is None else method
    return net, x, sc.attach(net, structure=structure(), gates=[rule], method=method)


def factors(net: Mlp, x: Tensor) -> list[Tensor]:
    """What both outputs are multiplied by, by dividing."""
    plain: list[Tensor] = []
    gated: list[Tensor] = []
    hooks = []
    for layer in (net.act1, net.act2):
        hooks.append(layer.register_forward_hook(lambda _, __, out: plain.append(out.detach()), prepend=True))
        hooks.append(layer.register_forward_hook(lambda _, __, out: gated.append(out.detach())))
    net(x)
    for hook in hooks:
        hook.remove()
    return [b / a for a, b in zip(plain, gated, strict=True)]


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-12, atol=1e-14)


@PER_EXAMPLE
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_one_draw_for_the_batch_or_one_for_each_example(method: sc.Method, per_example: bool) -> None:
    net, x, _ = made(method, per_example)
    net.dropout = 0.0
    alike = not per_example or method.noise(sc.gates.Layout((2,))) is None
    for z in factors(net, x):
        assert bool((z - z[:1]).abs().max() < 1e-12) == alike
    net.eval()
    for z in factors(net, x):
        assert (z - z[:1]).abs().max() < 1e-12


@PER_EXAMPLE
def test_closed_gates_are_exactly_zero_and_so_is_the_gradient_of_what_they_close(per_example: bool) -> None:
    net, x, _ = made(sc.ARM(init_open=0.5), per_example)
    net.dropout = 0.0
    seen: list[Tensor] = []
    net.act2.register_forward_hook(lambda _, __, out: seen.append(out), prepend=True)
    gated: list[Tensor] = []
    net.act2.register_forward_hook(lambda _, __, out: gated.append(out))
    h = net.upper(net.lower(x))
    (inner,) = torch.autograd.grad(h.square().sum(), seen[0])
    closed = gated[0] == 0
    assert 0 < closed.sum() < closed.numel()
    assert torch.all(inner[closed] == 0.0)
    assert torch.all(inner[~closed] != 0.0)


@PER_EXAMPLE
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_equals_plain(use_reentrant: bool, method: sc.Method, per_example: bool) -> None:
    found = []
    for mode in (None, use_reentrant):
        net, x, pruner = made(method, per_example, mode)
        torch.manual_seed(2)
        pruner.loss(lambda net=net, x=x: net(x).square().sum()).backward()
        found.append(gradients(net))
    same(*found)
    assert any("secateur_gates" in name and gradient.any() for name, gradient in found[0].items())


@PER_EXAMPLE
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_several_forwards_before_one_backward_each_repeat_their_own_draw(
    use_reentrant: bool, per_example: bool
) -> None:
    found = []
    for mode in (None, use_reentrant):
        net, x, _ = made(per_example=per_example, use_reentrant=mode)
        torch.manual_seed(2)
        first, second = net(x), net(-x)
        with torch.no_grad():
            net(x)
        other = net(x[:3])  # another number of examples
        ((first * second).sum() + first.square().sum() + other.sum()).backward()
        found.append(gradients(net))
    same(*found)


@PER_EXAMPLE
def test_gradient_of_a_draw_is_that_of_the_method(per_example: bool) -> None:
    net, x, pruner = made(per_example=per_example)
    net.dropout = 0.0
    net(x).square().sum().backward()
    through_draw = gradients(net)
    draw = live_of(gates_of(net)).draw
    net.zero_grad()
    (rule,) = pruner.gates.rules
    z = rule.sample(draw.by_example[0, 7].noise[0] if per_example else draw.noise[0])
    h = torch.tanh(net.fc1(x)) * z[..., :6]
    net.fc3(F.silu(net.fc2(h)) * z[..., 6:]).square().sum().backward()
    same(through_draw, gradients(net))


@PER_EXAMPLE
def test_copies_have_gates_and_draws_of_their_own(per_example: bool) -> None:
    net, x, pruner = made(per_example=per_example)
    net(x)
    twin = copy.deepcopy(net)
    own = gates_of(twin)
    assert [hook.gates is own for hook in twin.act1._forward_hooks.values()] == [True]
    net.eval(), twin.eval()
    assert torch.equal(net(x), twin(x))
    with torch.no_grad():
        own.rules[0].log_alpha.fill_(-4.0)
    torch.testing.assert_close(twin(x), twin.fc3.bias.expand(7, 2))
    assert not torch.equal(net(x), twin(x))
    before = live_of(pruner.gates).generator.get_state()
    twin.train()(x).sum().backward()
    assert torch.equal(live_of(pruner.gates).generator.get_state(), before)
    dense = Mlp().double()
    net.load_state_dict(dense.state_dict())
    assert torch.equal(net.fc1.weight, dense.fc1.weight)


@PER_EXAMPLE
def test_a_run_that_is_resumed_continues_bit_for_bit(per_example: bool) -> None:
    def step(net: Mlp, x: Tensor, pruner: sc.Pruner, optimizer: torch.optim.Optimizer) -> float:
        loss = pruner.backward(lambda: net(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
        return loss.item()

    def start() -> tuple[Mlp, Tensor, sc.Pruner, torch.optim.Optimizer]:
        net, x, pruner = made(per_example=per_example)
        return net, x, pruner, torch.optim.Adam(pruner.param_groups(lr=1e-2))

    whole = start()
    losses = [step(*whole) for _ in range(2)]
    states = copy.deepcopy([part.state_dict() for part in (whole[0], whole[2], whole[3])])
    random = torch.get_rng_state()
    losses = [step(*whole) for _ in range(3)]
    again = start()
    for part, state in zip((again[0], again[2], again[3]), states, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(random)
    assert [step(*again) for _ in range(3)] == losses


@pytest.mark.parametrize("estimator", ["arm", "ar"])
def test_mean_gradient_with_a_draw_for_each_example_is_that_of_the_enumerated_expectation(estimator: str) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.randn(2, 2, dtype=DTYPE)
    rule = sc.Rule("activations", where="1", per_example=True, method=sc.ARM(init_open=0.6, estimator=estimator))
    pruner = sc.attach(net, examples=(x,), gates=[rule])
    phi = pruner.gates.rules[0].phi
    with torch.no_grad():
        phi.add_(torch.tensor([-0.1, 0.0, 0.1], dtype=DTYPE))
    h, weight, bias = torch.tanh(net[0](x)).detach(), net[2].weight.detach(), net[2].bias.detach()
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=DTYPE).view(-1, 2, 3)
    chance = pruner.gates.prob_open()
    losses = (10 * ((h * masks) @ weight.T + bias).square()).mean((1, 2))
    exact = (torch.where(masks > 0, chance, 1 - chance).prod(2).prod(1) * losses).sum()
    (expected,) = torch.autograd.grad(exact, phi)
    draws = []
    for _ in range(800):
        phi.grad = None
        pruner.loss(lambda: 10 * net(x).square().mean()).backward()
        draws.append(phi.grad.clone())
    found = torch.stack(draws)
    error = found.std(0) / len(draws) ** 0.5
    assert (found.mean(0) - expected).abs().le(4 * error).all()
    assert expected.abs().max() > 4 * error.max() or estimator == "ar"


def test_both_passes_of_arm_differ_in_nothing_but_the_mask_of_each_example() -> None:
    net, x, pruner = made(sc.ARM(init_open=0.5), per_example=True)
    passes = []

    def closure() -> Tensor:
        loss = net(x).square().mean()
        passes.append(live_of(pruner.gates).draw)
        return loss

    pruner.loss(closure)
    first, second = passes
    u = first.by_example[0, 7].noise[0]
    assert u.shape == (7, 11)
    chance = pruner.gates.prob_open()
    assert torch.equal(first.by_example[0, 7].values, extended((u < chance).double()))
    assert torch.equal(second.by_example[0, 7].values, extended((u > 1 - chance).double()))
    with torch.no_grad():
        pruner.gates.rules[0].phi.fill_(9.0)
    passes.clear()
    pruner.loss(closure)
    assert len(passes) == 1  # both masks are all ones


@PER_EXAMPLE
def test_autocast_leaves_gates_in_their_precision(per_example: bool) -> None:
    net, x, pruner = made(per_example=per_example)
    net.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pruner.loss(lambda: net(x.float()).float().square().mean())
    loss.backward()
    gradient = pruner.gates.rules[0].log_alpha.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.any()
