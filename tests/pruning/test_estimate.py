from __future__ import annotations

import copy
import itertools

import pytest
import torch
from tests.gated import DTYPE, ConvNet, conv_net, conv_structure, gate, images, mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secateur.errors import GateError
from secateur.gates import ARM, Gate, HardConcrete, Layout
from secateur.pruning.draws import GATES, gates_of, live_of
from secateur.pruning.estimate import task_loss
from secateur.pruning.gateset import GateSet, extended
from secateur.pruning.placement import maps_of, place
from secateur.structure.trace import trace

ESTIMATORS = ["arm", "ar", "pathwise"]
PASSES = {"arm": 2, "ar": 1, "pathwise": 1}


def method(estimator: str) -> ARM | HardConcrete:
    return HardConcrete(init_open=0.6) if estimator == "pathwise" else ARM(init_open=0.6, estimator=estimator)


class Counted:
    """A closure that counts its calls and keeps its losses."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        self.net, self.x = net, x
        self.losses: list[float] = []

    def __call__(self) -> Tensor:
        loss = self.net(self.x).square().mean()
        self.losses.append(loss.item())
        return loss


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_number_of_passes_and_what_they_leave_behind(estimator: str) -> None:
    net, gates = conv_net(method(estimator), dropout=0.5)
    plain = ConvNet(dropout=0.5).double()
    plain.load_state_dict({n: v for n, v in net.state_dict().items() if "bn" in n}, strict=False)
    plain.stem.load_state_dict(net.stem.state_dict())
    x = images()
    before = torch.get_rng_state()
    live = live_of(gates)
    closure = Counted(net, x)
    buffers = [id(b) for b in net.buffers()]
    loss = task_loss(net, closure)
    after = torch.get_rng_state()
    assert len(closure.losses) == PASSES[estimator]
    assert loss.item() == closure.losses[0]
    assert [id(b) for b in net.buffers()] == buffers
    assert net.bn1.num_batches_tracked == net.bn2.num_batches_tracked == 1
    # One pass with the first draw leaves the same running statistics and random state.
    torch.set_rng_state(before)
    plain.bn2.reset_running_stats()
    with torch.no_grad(), live.hold(live.draw):
        weights = {n: getattr(net, n).weight for n in ("inner", "outer", "fc1", "fc2")}
        for n, weight in weights.items():
            getattr(plain, n).weight.copy_(weight)
            getattr(plain, n).bias.copy_(getattr(net, n).bias)
        plain(x)
    assert torch.equal(torch.get_rng_state(), after)
    for n in ("bn1", "bn2"):
        torch.testing.assert_close(getattr(net, n).running_mean, getattr(plain, n).running_mean)
        torch.testing.assert_close(getattr(net, n).running_var, getattr(plain, n).running_var)


@pytest.mark.parametrize("estimator", ["arm", "ar", "pathwise"])
def test_several_draws_leave_behind_what_one_does(estimator: str) -> None:
    found = []
    for draws in (1, 3):
        torch.manual_seed(6)
        net, gates = conv_net(method(estimator), dropout=0.5)
        closure = Counted(net, images())
        task_loss(net, closure, draws).backward()
        assert len(closure.losses) == (1 if estimator == "pathwise" else draws * PASSES[estimator])
        weights = {n: p.grad for n, p in net.named_parameters() if GATES not in n}
        found.append((torch.get_rng_state(), weights, {n: b.clone() for n, b in net.named_buffers()}))
        assert gates.rules[0].tensors
    assert torch.equal(found[0][0], found[1][0])
    for first, second in zip(found[0][1:], found[1][1:], strict=True):
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    with pytest.raises(GateError, match="draws=0"):
        task_loss(net, closure, 0)


@pytest.mark.parametrize("estimator", ["arm", "ar"])
def test_several_draws_have_the_mean_of_one_and_a_share_of_its_variance(estimator: str) -> None:
    torch.manual_seed(3)
    net, gates = mlp(ARM(init_open=0.6, estimator=estimator))
    x, phi = torch.randn(4, 3, dtype=DTYPE), gates.rules[0].phi
    found = {}
    for draws, steps in ((1, 600), (4, 150)):
        gradients = []
        for _ in range(steps):
            phi.grad = None
            task_loss(net, lambda: 10 * net(x).square().mean(), draws).backward()
            gradients.append(phi.grad.clone())
        found[draws] = torch.stack(gradients)
    both = sum(value.var(0) / len(value) for value in found.values()).sqrt()
    assert (found[1].mean(0) - found[4].mean(0)).abs().le(4 * both).all()
    share = found[4].var(0).sum() / found[1].var(0).sum()
    assert 0.12 < share < 0.5  # a quarter


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


def deep(which: ARM | HardConcrete) -> tuple[Deep, GateSet, Tensor]:
    torch.manual_seed(0)
    net, x = Deep().to(DTYPE), torch.randn(4, 3, dtype=DTYPE)
    structure = trace(net, (x,))
    return net, gate(net, structure, which, list(structure.groups)), x


def test_credit_by_group_has_the_mean_of_enumeration_and_less_variance() -> None:
    net, gates, x = deep(ARM(init_open=0.6))
    phi = gates.rules[0].phi
    chance, exact = gates.prob_open(), 0.0
    for mask in torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=DTYPE):
        with torch.no_grad(), live_of(gates).overridden(extended(mask)):
            loss = 10 * net(x).square().mean()
        exact = exact + torch.where(mask > 0, chance, 1 - chance).prod() * loss
    (expected,) = torch.autograd.grad(exact, phi)
    found = {}
    for credit in ("all", "group"):
        gradients = []
        for _ in range(800):
            phi.grad = None
            task_loss(net, lambda: 10 * net(x).square().mean(), 1, credit).backward()
            gradients.append(phi.grad.clone())
        found[credit] = torch.stack(gradients)
        error = found[credit].std(0) / 800**0.5
        assert (found[credit].mean(0) - expected).abs().le(4 * error).all()
    assert found["group"].var(0).sum() < found["all"].var(0).sum()


def test_credit_by_group_takes_a_pass_for_each_group_that_differs() -> None:
    net, _, x = deep(ARM(init_open=0.5, k=0.1))
    for _ in range(20):
        closure = Counted(net, x)
        task_loss(net, closure, 1, "group").backward()
        assert len(closure.losses) <= 3
        if len(closure.losses) == 3:
            return
    pytest.fail("twenty draws never differed in both groups")


@pytest.mark.parametrize("which", [HardConcrete(), ARM(estimator="ar")])
def test_credit_by_group_is_refused_where_there_is_no_second_pass(which: ARM | HardConcrete) -> None:
    net, _, x = deep(which)
    with pytest.raises(GateError, match="credit='group' is for ARM"):
        task_loss(net, lambda: net(x).sum(), 1, "group")
    with pytest.raises(GateError, match="expected 'all' or 'group'"):
        task_loss(net, lambda: net(x).sum(), 1, "one")


def test_one_pass_where_both_masks_coincide() -> None:
    net, gates = conv_net(ARM(init_open=0.5))
    with torch.no_grad():
        gates.rules[0].phi.fill_(10.0)
    closure = Counted(net, images())
    loss = task_loss(net, closure)
    assert len(closure.losses) == 1
    loss.backward()
    assert not gates.rules[0].phi.grad.any()


def test_both_passes_see_the_same_dropout_and_the_same_state() -> None:
    net, _ = conv_net(ARM(init_open=0.5), dropout=0.5)
    net.register_buffer("calls", torch.zeros((), dtype=DTYPE))
    x, losses = images(), []

    def closure() -> Tensor:
        net(x)
        net.calls += 1  # in place, as running statistics are
        loss = net.drop(net.bn1(net.stem(x))).square().sum() * net.calls  # nothing that a gate reaches
        losses.append(loss.item())
        return loss

    task_loss(net, closure).backward()
    assert len(losses) == 2
    assert losses[0] == losses[1]
    assert net.calls == 1


class Normalised(nn.Module):
    """A BatchNorm behind the gates, where what one unit does changes what the others are."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.bn, self.fc3 = nn.Linear(2, 5), nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.bn(self.fc2(torch.sigmoid(self.fc1(x))))))


def test_a_control_variate_keeps_the_mean_and_takes_most_of_the_noise() -> None:
    torch.manual_seed(3)
    found = {}
    net, x = Normalised().double(), torch.randn(8, 2, dtype=DTYPE)
    structure = trace(net, (x,))
    groups = [group for group in structure.groups if group.name == "fc1"]
    for control_variate in (False, True):
        twin = copy.deepcopy(net)
        ar = ARM(init_open=0.6, estimator="ar", control_variate=control_variate)
        gates = gate(twin, structure, ar, groups)
        phi, draws = gates.rules[0].phi, []
        for _ in range(800):
            phi.grad = None
            task_loss(twin, lambda twin=twin: 30 + 30 * twin(x).square().mean()).backward()
            draws.append(phi.grad.clone())
        found[control_variate] = torch.stack(draws[1:])  # the first has no earlier loss to subtract
        assert (live_of(gates).mean_loss is not None) == control_variate
    error = {key: value.std(0) / len(value) ** 0.5 for key, value in found.items()}
    both = (error[False].square() + error[True].square()).sqrt()
    assert (found[True].mean(0) - found[False].mean(0)).abs().le(4 * both).all()
    assert error[True].le(0.6 * error[False]).all()


@pytest.mark.parametrize("estimator", ["arm", "ar"])
@pytest.mark.parametrize("link", ["sigmoid", "hard_sigmoid"])
def test_mean_gradient_is_that_of_the_enumerated_expectation(estimator: str, link: str) -> None:
    torch.manual_seed(3)
    net = Normalised().double()
    x = torch.randn(8, 2, dtype=DTYPE)
    structure = trace(net, (x,))
    groups = [group for group in structure.groups if group.name == "fc1"]
    gates = gate(net, structure, ARM(init_open=0.6, estimator=estimator, link=link), groups)
    phi = gates.rules[0].phi
    with torch.no_grad():
        phi.add_(torch.tensor([-0.1, 0.05, 0.1, -0.05, 0.0], dtype=DTYPE))

    def closure() -> Tensor:
        return 30 * net(x).square().mean()

    chance = gates.prob_open()
    exact = torch.zeros((), dtype=DTYPE)
    with torch.no_grad():
        masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5)), dtype=DTYPE)
        losses = []
        for mask in masks:
            with live_of(gates).overridden(extended(mask)):
                losses.append(closure())
    exact = (torch.where(masks > 0, chance, 1 - chance).prod(1) * torch.stack(losses)).sum()
    (expected,) = torch.autograd.grad(exact, phi)
    draws = []
    for _ in range(1500):
        phi.grad = None
        task_loss(net, closure).backward()
        draws.append(phi.grad.clone())
    found = torch.stack(draws)
    error = found.std(0) / len(draws) ** 0.5
    assert (found.mean(0) - expected).abs().le(4 * error).all()
    assert expected.abs().max() > 8 * error.max() or estimator == "ar"


@pytest.mark.parametrize("estimator", ["arm", "ar"])
def test_weights_get_the_gradient_of_the_first_draw(estimator: str) -> None:
    net, gates = mlp(method(estimator))
    x = torch.randn(4, 3, dtype=DTYPE)
    closure = Counted(net, x)
    task_loss(net, closure).backward()
    found = {n: p.grad.clone() for n, p in net.named_parameters() if GATES not in n}
    net.zero_grad()
    with live_of(gates).overridden(live_of(gates).draw.values):
        closure().backward()
    assert all(torch.equal(found[n], p.grad) for n, p in net.named_parameters() if n in found)


def test_methods_side_by_side_share_the_pathwise_draw_of_both_passes() -> None:
    torch.manual_seed(0)
    net = ConvNet().double()
    groups = conv_structure().groups
    rules = [(groups[:1], HardConcrete(init_open=0.6)), (groups[1:2], ARM(init_open=0.5)), (groups[2:], method("ar"))]
    made = [Gate(m, Layout(tuple(g.size for g in part)), torch.Generator().manual_seed(0), DTYPE) for part, m in rules]
    gates = GateSet(made, [None] * 3)
    place(net, gates, maps_of([g for part, _ in rules for g in part], conv_structure().shapes))
    seen = []
    x = images()

    def closure() -> Tensor:
        loss = net(x).square().mean()
        seen.append(live_of(gates).draw.values)
        return loss

    task_loss(net, closure).backward()
    first, second = seen
    n = groups[0].size
    u = live_of(gates).draw.noise[1]
    assert torch.equal(first[:n], second[:n])
    assert torch.equal(second[n : n + groups[1].size], (u > 1 - gates.prob_open()[n : n + groups[1].size]).double())
    assert torch.equal(first[n + groups[1].size :], second[n + groups[1].size :])
    assert all(p.grad.any() for p in gates.parameters())


def test_several_forwards_in_a_closure_share_one_score_function_draw() -> None:
    net, gates = mlp(ARM(init_open=0.5))
    seen = []

    def closure() -> Tensor:
        total = torch.zeros((), dtype=DTYPE)
        for _ in range(2):
            total = total + net(torch.randn(4, 3, dtype=DTYPE)).square().mean()
            seen.append(live_of(gates).draw)
        return total

    task_loss(net, closure)
    assert seen[0] is seen[1]
    assert seen[2] is seen[3]
    assert live_of(gates).draw is seen[0]
    task_loss(net, closure)
    assert live_of(gates).draw is not seen[0]


def test_a_closure_that_never_calls_the_model_itself_gets_a_new_draw_each_time() -> None:
    net, gates = mlp()
    h = torch.rand(4, 6, dtype=DTYPE)
    draws = []
    for _ in range(2):
        task_loss(net, lambda: net.fc2(h).sum() + net.fc2(-h).square().sum()).backward()
        draws.append(live_of(gates).draw)
    assert draws[0] is not draws[1]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_equals_plain(estimator: str, use_reentrant: bool) -> None:
    found = []
    for recompute in (False, True):
        torch.manual_seed(4)
        net, _ = conv_net(method(estimator), dropout=0.5)
        x = images()

        def closure(net: ConvNet = net, x: Tensor = x, recompute: bool = recompute) -> Tensor:
            h = net.features(x)
            for part in (net.middle, net.head):
                h = checkpoint(part, h, use_reentrant=use_reentrant) if recompute else part(h)
            return h.square().mean()

        task_loss(net, closure).backward()
        found.append({n: p.grad for n, p in net.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-12, atol=1e-14)


BAD = {
    "nan": (lambda net, x: net(x).sum() * float("nan"), "nan, expected a finite number"),
    "inf": (lambda net, x: net(x).sum() + float("inf"), "inf, expected a finite number"),
    "vector": (lambda net, x: net(x).sum(1), r"shape \(4,\), expected one number"),
    "number": (lambda net, x: net(x).sum().item(), "a float, expected a tensor"),
    "integer": (lambda net, x: net(x).sum().long(), "torch.int64, expected a floating-point loss"),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("bad", BAD)
def test_a_refused_loss_changes_nothing(bad: str, estimator: str) -> None:
    net, gates = conv_net(method(estimator), dropout=0.5)
    live = live_of(gates)
    task_loss(net, Counted(net, images()))
    x = images()
    draw = live.draw
    state = {n: v.clone() for n, v in net.state_dict().items()}
    random = torch.get_rng_state(), live.generator.get_state()
    compute, message = BAD[bad]
    with pytest.raises(GateError, match=f"the closure returned .*{message}.* The step is refused"):
        task_loss(net, lambda: compute(net, x))
    assert live.draw is draw
    assert torch.equal(torch.get_rng_state(), random[0])
    assert torch.equal(live.generator.get_state(), random[1])
    assert all(torch.equal(v, state[n]) for n, v in net.state_dict().items())


def test_a_loss_that_only_the_second_pass_refuses_changes_nothing() -> None:
    net, gates = conv_net(ARM(init_open=0.5))
    state = {n: v.clone() for n, v in net.state_dict().items()}
    generator = live_of(gates).generator.get_state()
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        loss = net(images()).square().mean()
        return loss if len(calls) == 1 else loss * float("nan")

    with pytest.raises(GateError, match="nan"):
        task_loss(net, closure)
    assert len(calls) == 2
    assert all(torch.equal(v, state[n]) for n, v in net.state_dict().items())
    assert torch.equal(live_of(gates).generator.get_state(), generator)


def test_an_error_of_the_closure_comes_through_and_changes_nothing() -> None:
    net, _ = conv_net()
    mean = net.bn1.running_mean.clone()

    def closure() -> Tensor:
        net(images())
        raise KeyError("batch")

    with pytest.raises(KeyError, match="batch"):
        task_loss(net, closure)
    assert torch.equal(net.bn1.running_mean, mean)


def test_a_loss_of_one_element_is_a_scalar() -> None:
    net, _ = mlp()
    assert task_loss(net, lambda: net(torch.ones(1, 3, dtype=DTYPE)).sum(1, keepdim=True)).shape == ()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_evaluation_mode_has_no_estimator(estimator: str) -> None:
    net, gates = conv_net(method(estimator))
    net.eval()
    closure = Counted(net, images())
    loss = task_loss(net, closure)
    assert len(closure.losses) == 1
    loss.backward()
    assert all(p.grad is None for p in gates.parameters())
    assert gates_of(net) is gates
