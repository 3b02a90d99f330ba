from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.gated import DTYPE, ConvNet, Mlp, conv_structure, images, mlp_structure
from tests.pruning.test_placement import state_of
from torch import Tensor

import secateur as sc
from secateur.errors import GateError
from secateur.gates import (
    ARM,
    DifferentiableSparsification,
    DiffPrune,
    HardConcrete,
    Magnitude,
    Method,
    StraightThrough,
)
from secateur.pruning.attach import attach
from secateur.pruning.draws import GATES, gates_of, live_of
from secateur.pruning.pruner import Pruner
from secateur.pruning.rule import Rule

MIXED = [
    Rule(where="stem", method=HardConcrete(init_open=0.7)),
    Rule(where="inner", method=ARM(init_open=0.6)),
    Rule(where="fc1", method=Magnitude()),
    Rule(units="inputs", where="fc1", method=ARM(init_open=0.8, estimator="ar", control_variate=True)),
]


def batch(step: int, n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, 2, 6, 6, generator=generator, dtype=DTYPE), torch.randint(3, (n,), generator=generator)


def made(
    gates: list[Rule] | None = None, seed: int = 0, **pressure: object
) -> tuple[ConvNet, Pruner, torch.optim.Optimizer]:
    torch.manual_seed(5)
    net = ConvNet(dropout=0.3).double()
    pruner = attach(net, structure=conv_structure(), gates=gates, seed=seed, **pressure)
    return net, pruner, torch.optim.Adam(pruner.param_groups(lr=1e-2))


def train(net: ConvNet, pruner: Pruner, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x, y = batch(step)
        loss = pruner.loss(lambda x=x, y=y: F.cross_entropy(net(x), y))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
        losses.append(loss.item())
    return losses


def saved(net: ConvNet, pruner: Pruner, optimizer: torch.optim.Optimizer) -> io.BytesIO:
    """A file with all that a run needs to go on."""
    file = io.BytesIO()
    states = {"net": net.state_dict(), "pruner": pruner.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**states, "random": torch.get_rng_state()}, file)
    file.seek(0)
    return file


def resume(file: io.BytesIO, net: ConvNet, pruner: Pruner, optimizer: torch.optim.Optimizer) -> None:
    states = torch.load(file, weights_only=True)
    net.load_state_dict(states["net"])
    pruner.load_state_dict(states["pruner"])
    optimizer.load_state_dict(states["optimizer"])
    torch.set_rng_state(states["random"])


PRESSURES: dict[str, Callable[[], dict[str, object]]] = {
    "none": dict,
    "penalty": lambda: {"penalty": sc.Penalty(0.1, unit="density")},
    "budget": lambda: {"budget": sc.Budget(keep_params=0.5)},
}


@pytest.mark.parametrize(("pressure", "killed"), [("none", 3), ("penalty", 1), ("budget", 0), ("budget", 3)])
def test_a_run_that_is_killed_and_resumed_continues_bit_for_bit(pressure: str, killed: int) -> None:
    net, pruner, optimizer = made(MIXED, **PRESSURES[pressure]())
    train(net, pruner, optimizer, range(killed))
    file = saved(net, pruner, optimizer)
    expected = train(net, pruner, optimizer, range(killed, 6))
    final = {name: v.clone() for name, v in net.state_dict().items()}

    net, pruner, optimizer = made(MIXED, seed=99, **PRESSURES[pressure]())
    resume(file, net, pruner, optimizer)
    assert train(net, pruner, optimizer, range(killed, 6)) == expected
    assert all(torch.equal(v, final[name]) for name, v in net.state_dict().items())


def test_states_that_do_not_fit_are_refused() -> None:
    _, plain, _ = made()
    _, pressed, _ = made(penalty=sc.Penalty(0.1, unit="density"))
    with pytest.raises(GateError, match="version None, expected 3"):
        plain.load_state_dict({})
    with pytest.raises(GateError, match=r"saved with a budget .* attached without"):
        plain.load_state_dict(pressed.state_dict())
    with pytest.raises(GateError, match=r"saved without a budget .* attached with"):
        pressed.load_state_dict(plain.state_dict())


def test_loss_is_task_and_pressure_and_scale_weighs_both() -> None:
    net, pruner, _ = made([Rule(method=DiffPrune())], penalty=sc.Penalty(2.0, unit="density"))
    net.drop.p = 0.0
    x, y = batch(0)

    def closure() -> Tensor:
        return F.cross_entropy(net(x), y)

    task, pressure = closure(), pruner.penalty()
    assert pressure > 0
    torch.testing.assert_close(pruner.loss(closure), task + pressure)
    torch.testing.assert_close(pruner.loss(closure, scale=0.25), (task + pressure) / 4)
    (task + pressure).backward()
    expected = {n: p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    value = pruner.backward(closure)
    assert not value.requires_grad
    for n, p in net.named_parameters():
        torch.testing.assert_close(p.grad, expected[n])


ALL = [
    HardConcrete(init_open=0.7),
    ARM(init_open=0.7),
    ARM(init_open=0.7, estimator="ar"),
    ARM(init_open=0.7, estimator="ar", control_variate=True, rao_blackwell=True),
    DiffPrune(init_open=0.7),
    DiffPrune(init_open=0.7, mode="stochastic"),
    DifferentiableSparsification(),
    DifferentiableSparsification(form="independent"),
    StraightThrough(init_open=0.7),
    Magnitude(),
]
EVERY_METHOD = pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)


def grads(net: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def small(method: Method, dtype: torch.dtype = DTYPE) -> tuple[Mlp, Tensor, Pruner]:
    torch.manual_seed(0)
    net, x = Mlp().to(dtype), torch.randn(8, 3, dtype=dtype)
    penalty = sc.Penalty(2.0, unit="density")
    return net, x, attach(net, structure=mlp_structure(), method=method, penalty=penalty)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    net, x, pruner = small(DiffPrune())
    pruner.backward(lambda: net(x).square().mean())
    whole = grads(net)
    net.zero_grad()
    for part in x.chunk(4):
        pruner.backward(lambda part=part: net(part).square().mean(), scale=1 / 4)
    for name, gradient in grads(net).items():
        torch.testing.assert_close(gradient, whole[name])


@EVERY_METHOD
def test_accumulation_is_the_mean_over_minibatches_each_with_its_own_draw(method: Method) -> None:
    together, apart = [], []
    for found in (together, apart):
        net, x, pruner = small(method)
        for part in x.chunk(4):
            pruner.backward(lambda net=net, part=part: net(part).square().mean(), scale=1 / 4)
            if found is apart:
                found.append(grads(net))
                net.zero_grad()
        if found is together:
            found.append(grads(net))
    for name, gradient in together[0].items():
        torch.testing.assert_close(gradient, sum(one[name] for one in apart))


@EVERY_METHOD
def test_scaling_and_clipping_act_on_every_gradient_alike(method: Method) -> None:
    found = []
    for scaled in (False, True):
        net, x, pruner = small(method, torch.float32)
        optimizer = torch.optim.SGD(pruner.param_groups(lr=0.1))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        scaler.scale(pruner.loss(lambda net=net, x=x: net(x).square().mean())).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
        assert norm > 0.01
        clipped = torch.stack([gradient.square().sum() for gradient in grads(net).values()]).sum().sqrt()
        torch.testing.assert_close(clipped.item(), 0.01, rtol=1e-3, atol=0)
        scaler.step(optimizer)
        pruner.step()
        found.append({name: value.clone() for name, value in net.state_dict().items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-7)


@EVERY_METHOD
def test_autocast_scaler_and_clipping_work(method: Method) -> None:
    net = ConvNet()
    pruner = attach(net, structure=conv_structure(), method=method, budget=sc.Budget(keep_params=0.5))
    optimizer = torch.optim.SGD(pruner.param_groups(lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x, y = batch(0)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = pruner.loss(lambda: F.cross_entropy(net(x.float()), y))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        assert torch.isfinite(norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        pruner.step()
    changed = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    gate_names = {n for n in before if n.startswith(GATES)}
    # Of two trained tensors one may be at its bound; what has none has nothing to change.
    assert bool(changed & gate_names) == bool(gate_names)
    assert all(p.dtype == torch.float32 for p in pruner.gates.parameters())
    assert "fc1.parametrizations.weight.original" in changed


@EVERY_METHOD
def test_a_step_that_the_scaler_skips_leaves_gates_and_weights(method: Method) -> None:
    net, x, pruner = small(method, torch.float32)
    optimizer = torch.optim.SGD(pruner.param_groups(lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    loss = pruner.loss(lambda: 1e25 * net(x).square().mean())
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**60
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_penalty_alone_is_for_pathwise_methods() -> None:
    _, pruner, _ = made([Rule(method=ARM())])
    with pytest.raises(GateError, match=r"estimator arm .* pruner\.loss\(closure\)"):
        pruner.penalty()
    _, pruner, _ = made()
    assert pruner.penalty() == 0


def test_training_under_a_budget_comes_near_it_and_finalize_meets_it() -> None:
    net, pruner, optimizer = made([Rule(), Rule(units="inputs", where="fc1")], budget=sc.Budget(keep_params=0.4))
    start = pruner.expected.params
    train(net, pruner, optimizer, range(60))
    assert pruner.expected.params < start
    small, report = pruner.finalize()
    assert report.compact.params == sum(p.numel() for p in small.parameters()) <= 0.4 * report.dense.params
    x = images()
    torch.testing.assert_close(small.eval()(x), net.eval()(x), rtol=0, atol=1e-12)
    assert pruner.exact == report.compact


def test_the_projection_flips_and_says_so() -> None:
    net, pruner, _ = made([Rule(), Rule(units="inputs", where="fc1")], budget=sc.Budget(keep_params=0.3))
    small, report = pruner.finalize()
    assert report.flipped > 0
    assert report.gated.params > 0.3 * report.dense.params >= report.compact.params
    assert report.compact.params == sum(p.numel() for p in small.parameters())
    x = images()
    torch.testing.assert_close(small.eval()(x), net.eval()(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("keep", [0.25, 0.4, 0.6])
def test_the_projection_leaves_at_most_its_slack_or_what_no_unit_fits_in(keep: float) -> None:
    budget = sc.Budget(keep_params=keep)
    net, pruner, _ = made([Rule(), Rule(units="inputs", where="fc*")], budget=budget)
    with torch.no_grad():
        for parameter in pruner.gates.parameters():
            parameter.add_(2 * torch.randn_like(parameter) - 0.5)
    pruner.finalize()
    units, gates, dense = pruner._units, pruner.gates, pruner.costs.dense.params
    is_open = units.open(gates.fixed())
    scores = units.scores(gates.score(), is_open)
    now, limit = pruner.costs.exact(is_open).params, int(keep * dense)
    assert now <= limit
    closed = torch.nonzero(~is_open & scores.isfinite()).flatten()
    assert len(closed)
    for unit in closed.tolist():
        more = is_open.clone()
        more[unit] = True
        assert now >= limit - int(budget.slack * dense) or pruner.costs.exact(more).params > limit
    assert gates_of(net) is gates


def test_groups_for_an_optimizer() -> None:
    net, pruner, _ = made()
    weights, gates = pruner.param_groups(lr=0.1, weight_decay=0.5, momentum=0.9)
    assert gates["params"] == list(pruner.gates.parameters())
    assert {id(p) for group in (weights, gates) for p in group["params"]} == {id(p) for p in net.parameters()}
    assert (weights["weight_decay"], gates["weight_decay"], gates["lr"], gates["momentum"]) == (0.5, 0.0, 2.0, 0.9)
    torch.optim.SGD(pruner.param_groups(lr=0.1, gate_lr=0.3))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda net, pruner: torch.optim.AdamW(net.parameters()), "weight decay"),
        (lambda net, pruner: torch.optim.Adam(pruner.param_groups(0.1)[:1]), "leaves out"),
    ],
)
def test_the_first_step_finds_optimizers_that_mistreat_gates(build: object, message: str) -> None:
    net = Mlp().double()
    pruner = attach(net, structure=mlp_structure())
    optimizer = build(net, pruner)
    for _ in range(2):  # until it is another one
        with pytest.raises(GateError, match=message):
            pruner.step()
    with pytest.raises(GateError, match=message):
        pruner.check(optimizer)


def test_a_shared_group_is_warned_about_at_the_first_step() -> None:
    net = Mlp().double()
    pruner = attach(net, structure=mlp_structure())
    optimizer = torch.optim.Adam(net.parameters())
    with pytest.warns(UserWarning, match="share an optimizer group"):
        pruner.step()
    assert optimizer.param_groups


def test_step_brings_gates_back_into_their_range() -> None:
    _, pruner, _ = made([Rule(method=HardConcrete())])
    log_alpha = pruner.gates.rules[0].log_alpha
    with torch.no_grad():
        log_alpha.fill_(50.0)
    pruner.step()
    assert log_alpha.max() < 5


def test_draw_serves_loops_that_never_call_the_model() -> None:
    net, pruner, _ = made()
    h = torch.randn(2, 5, dtype=DTYPE)
    pruner.draw()
    first = net.fc2(h)
    assert torch.equal(net.fc2(h), first)
    pruner.draw()
    assert live_of(pruner.gates).draw is not None
    assert not torch.equal(net.fc2(h), first)


def test_progress_counts_chances_and_fixed_gates() -> None:
    _, pruner, _ = made([Rule(method=HardConcrete(init_open=0.5))])
    with torch.no_grad():
        pruner.gates.rules[0].log_alpha.fill_(4.0)
        pruner.gates.rules[0].log_alpha[4:10] = -4.0
    assert pruner.exact == pruner.structure.cost({"inner": torch.arange(1)})
    chances = pruner.gates.prob_open().detach()
    assert pruner.expected.params == round(pruner.costs.expected(chances, "params").item())


def test_detach_leaves_the_model_as_it_was_with_its_trained_weights() -> None:
    torch.manual_seed(5)
    net = ConvNet(dropout=0.3).double()
    before, keys = state_of(net), list(net.state_dict())
    pruner = attach(net, structure=conv_structure(), gates=MIXED)
    train(net, pruner, torch.optim.Adam(pruner.param_groups(lr=1e-2)), range(2))
    weights = {name: site.clone() for name, site in net.named_parameters() if "original" in name}
    assert pruner.detach() is net
    assert state_of(net) == before
    assert list(net.state_dict()) == keys
    for name, weight in weights.items():
        assert torch.equal(net.state_dict()[name.replace("parametrizations.weight.original", "weight")], weight)
    attach(net, structure=conv_structure())


@pytest.mark.parametrize(
    "use",
    [
        lambda p: p.loss(lambda: torch.zeros(())),
        lambda p: p.step(),
        lambda p: p.detach(),
        lambda p: p.finalize(),
        lambda p: p.expected,
        lambda p: p.param_groups(0.1),
        lambda p: p.state_dict(),
    ],
)
def test_a_detached_pruner_says_so(use: Callable[[Pruner], object]) -> None:
    _, pruner, _ = made()
    pruner.detach()
    with pytest.raises(GateError, match="the pruner is detached"):
        use(pruner)
    assert repr(pruner).startswith("Pruner(detached")


def test_a_copy_of_the_model_can_be_averaged_while_it_trains() -> None:
    net, pruner, optimizer = made()
    average = torch.optim.swa_utils.AveragedModel(net)
    for step in range(3):
        train(net, pruner, optimizer, range(step, step + 1))
        average.update_parameters(net)
    x = images()
    assert torch.equal(average.eval()(x), copy.deepcopy(average)(x))
    assert not torch.equal(average(x), net.eval()(x))
