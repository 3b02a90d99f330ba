from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from tests.gated import DTYPE, ConvNet, conv_net, conv_structure, gate, images, mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import secateur as sc
from secateur.errors import GateError
from secateur.gates import ARM, DifferentiableSparsification, DiffPrune, HardConcrete, Method
from secateur.pruning.draw import Draw
from secateur.pruning.draws import gates_of, live_of, values
from secateur.pruning.gateset import extended

METHODS = [
    HardConcrete(init_open=0.6),
    DiffPrune(init_open=0.6),
    DifferentiableSparsification(),
    DifferentiableSparsification(form="independent"),
    ARM(init_open=0.6),
]


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-12, atol=1e-14)


def test_each_training_forward_of_the_root_makes_one_draw_that_submodules_share() -> None:
    net, gates = conv_net()
    net(images())
    first = live_of(gates).draw
    seen = [layer.weight / layer.parametrizations.weight.original for layer in (net.inner, net.fc1, net.fc2)]
    assert live_of(gates).draw is first
    net(images())
    assert live_of(gates).draw is not first
    assert not torch.equal(live_of(gates).draw.values, first.values)
    # What the layers saw is what the draw says: the unit of each input position, 1 where there is none.
    torch.testing.assert_close(seen[2][0], first.values[-6:-1].detach())


def test_parts_called_before_any_root_forward_share_a_draw() -> None:
    net, gates = conv_net()
    h = net.features(images())
    assert live_of(gates).draw is None  # the stem reads no gated unit
    net.middle(h)
    draw = live_of(gates).draw
    net.head(net.middle(h))
    assert live_of(gates).draw is draw


@pytest.mark.parametrize("entry", [lambda net, x: net(x), lambda net, x: net.head(net.middle(net.features(x)))])
def test_evaluation_uses_fixed_gates_whatever_the_entry_point(entry: Callable[[ConvNet, Tensor], Tensor]) -> None:
    net, gates = conv_net()
    net(images())
    net.eval()
    x = images()
    expected = entry(net, x)
    torch.testing.assert_close(values(gates, training=False), extended(gates.fixed()), rtol=0, atol=0)
    assert torch.equal(entry(net, x), expected)
    # No stale values: a state dict, a write behind autograd's back and an in-place write all count at once.
    state = {name: v.clone() for name, v in net.state_dict().items()}
    gates.rules[0].log_alpha.data.fill_(-4.0)
    closed = entry(net, x)
    assert not torch.allclose(closed, expected)
    torch.testing.assert_close(closed, net.fc2.bias.expand_as(closed))
    net.load_state_dict(state)
    assert torch.equal(entry(net, x), expected)


def test_a_submodule_in_evaluation_mode_reads_fixed_gates() -> None:
    net, gates = conv_net()
    net.fc2.eval()
    net(images())
    torch.testing.assert_close(
        net.fc2.weight / net.fc2.parametrizations.weight.original, gates.fixed()[-5:].expand(3, 5)
    )


def test_gates_put_on_a_model_in_evaluation_mode_draw_nothing() -> None:
    net = ConvNet().double().eval()
    gates = gate(net, conv_structure())
    net(images())
    assert not gates.training
    assert live_of(gates).draw is None
    net.train()(images())
    assert live_of(gates).draw is not None


def test_an_interrupted_forward_leaves_no_stale_gates() -> None:
    net, gates = mlp()
    net.eval()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = net.fc1.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        net(torch.randn(2, 3, dtype=DTYPE))
    hook.remove()
    with torch.no_grad():
        gates.rules[0].log_alpha.fill_(-4.0)
    assert not net.fc2.weight.any()


class Checkpointed(ConvNet):
    """A ConvNet of which two regions, both with gates, are recomputed."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__(dropout=0.3)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        if self.use_reentrant is None:
            return self.head(self.middle(h))
        h = checkpoint(self.middle, h, use_reentrant=self.use_reentrant)
        return checkpoint(self.head, h, use_reentrant=self.use_reentrant)


def checkpointed(use_reentrant: bool | None, method: Method) -> tuple[Checkpointed, Tensor]:
    torch.manual_seed(1)
    net = Checkpointed(use_reentrant).double()
    gate(net, conv_structure(), method)
    return net, images()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{type(method).__name__}")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_equals_plain(use_reentrant: bool, method: Method) -> None:
    found = []
    for mode in (None, use_reentrant):
        net, x = checkpointed(mode, method)
        torch.manual_seed(2)
        net(x).square().sum().backward()
        found.append(gradients(net))
    same(*found)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_root_repeats_its_draw(use_reentrant: bool) -> None:
    found = []
    for wrapped in (False, True):
        net, x = checkpointed(None, HardConcrete(init_open=0.6))
        torch.manual_seed(2)
        y = checkpoint(net, x.requires_grad_(), use_reentrant=use_reentrant) if wrapped else net(x)
        y.square().sum().backward()
        found.append(gradients(net))
    same(*found)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_several_forwards_before_one_backward_each_repeat_their_own_draw(use_reentrant: bool) -> None:
    found = []
    for mode in (None, use_reentrant):
        net, x = checkpointed(mode, HardConcrete(init_open=0.6))
        torch.manual_seed(2)
        first, second = net(x), net(-x)
        with torch.no_grad():
            net(x)  # a training forward that no backward belongs to
        net.eval()
        net(x)
        net.train()
        ((first * second).sum() + first.square().sum()).backward()
        found.append(gradients(net))
    same(*found)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_backwards_in_another_order_repeat_the_right_draws(use_reentrant: bool) -> None:
    found = []
    for mode in (None, use_reentrant):
        net, x = checkpointed(mode, HardConcrete(init_open=0.6))
        torch.manual_seed(2)
        first, second = net(x), net(-x)
        first.square().sum().backward()
        second.square().sum().backward()
        found.append(gradients(net))
    same(*found)


def test_a_step_that_was_skipped_does_not_confuse_the_next() -> None:
    net, x = checkpointed(False, HardConcrete(init_open=0.6))
    net(x)
    net(x).square().sum().backward()
    assert all(torch.isfinite(g).all() for g in gradients(net).values())


def test_two_losses_of_one_forward_need_no_retained_graph() -> None:
    net, gates = mlp()
    x = torch.randn(4, 3, dtype=DTYPE)
    both, apart = [], []
    for found in (both, apart):
        net.zero_grad()
        live_of(gates).generator.manual_seed(5)
        y = net(x)
        z = net.fc2(x @ torch.ones(3, 6, dtype=DTYPE))  # shares the draw, nothing else
        if found is both:
            (y.sum() + z.sum()).backward()
        else:
            y.sum().backward()
            z.sum().backward()
        found.append(gradients(net))
    same(both[0], apart[0])


@pytest.mark.parametrize("method", METHODS[:4], ids=lambda method: f"{type(method).__name__}")
def test_gradient_of_a_draw_is_that_of_the_method(method: Method) -> None:
    net, gates = mlp(method)
    x = torch.randn(4, 3, dtype=DTYPE)
    net(x).square().sum().backward()
    through_draw = gradients(net)
    draw = live_of(gates).draw
    net.zero_grad()
    rule, norms = next(iter(gates))
    z = rule.sample(draw.noise[0], None if norms is None else norms(norms.weights, DTYPE))
    h = torch.sigmoid(net.fc1(x)) * z
    (h @ net.fc2.parametrizations.weight.original.T + net.fc2.bias).square().sum().backward()
    same(through_draw, gradients(net))


def test_copies_have_gates_and_draws_of_their_own() -> None:
    net, gates = conv_net()
    x = images()
    net(x).sum()
    twin = copy.deepcopy(net)
    own = gates_of(twin)
    assert own is not gates
    assert twin.fc2.parametrizations.weight[0]._gates[0] is own
    assert live_of(own).draw is None
    net.eval(), twin.eval()
    assert torch.equal(net(x), twin(x))
    with torch.no_grad():
        own.rules[0].log_alpha.fill_(-4.0)
    torch.testing.assert_close(twin(x), twin.fc2.bias.expand(4, 3))
    assert not torch.equal(net(x), twin(x))
    before = live_of(gates).generator.get_state()
    twin.train()
    twin(x).sum().backward()
    assert torch.equal(live_of(gates).generator.get_state(), before)
    assert net.fc1.bias.grad is None


def test_averaged_model_follows_and_evaluates() -> None:
    net, gates = conv_net()
    averaged = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(net)
    with torch.no_grad():
        gates.rules[0].log_alpha.sub_(1.0)
    averaged.update_parameters(net)
    torch.testing.assert_close(gates_of(averaged.module).rules[0].log_alpha, gates.rules[0].log_alpha + 0.5)
    averaged.eval(), net.eval()
    x = images()
    assert not torch.equal(averaged(x), net(x))


def test_draws_lie_outside_modules_and_die_with_them() -> None:
    net, gates = mlp()
    net(torch.randn(4, 3, dtype=DTYPE)).sum().backward()
    draw = weakref.ref(live_of(gates).draw)
    tensors = [t for m in net.modules() for v in vars(m).values() if isinstance(v, dict) for t in v.values()]
    assert not any(t is draw().values for t in tensors)
    assert not any("draw" in key for m in net.modules() for key in vars(m))
    dead = weakref.ref(gates)
    del net, gates, tensors
    gc.collect()
    assert dead() is None
    assert draw() is None


def test_compiled_layers_do_not_depend_on_other_models() -> None:
    def live_model():
        net, gates = mlp()
        live_of(gates)
        return net

    others = [live_model() for _ in range(3)]
    net = live_model()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        others.clear()  # while it compiles, as a collector of garbage would
        gc.collect()
        return graph

    torch._dynamo.reset()
    net.fc2.compile(backend=backend)
    x = torch.randn(4, 3, dtype=DTYPE)
    net(x).sum().backward()
    compiled = len(graphs)
    assert compiled
    others += [live_model() for _ in range(3)]
    net(x).sum().backward()
    others.clear()
    gc.collect()
    net(x).sum().backward()
    assert len(graphs) == compiled


def test_no_gradient_is_recorded_where_none_is_wanted() -> None:
    net, gates = mlp()
    x = torch.randn(4, 3, dtype=DTYPE)
    with torch.no_grad():
        assert not net(x).requires_grad
    with torch.inference_mode():
        net(x)
    net(x).sum().backward()  # the draw made in inference mode is gone
    assert gates.rules[0].log_alpha.grad is not None
    gates.requires_grad_(False)
    net.zero_grad()
    net(x).sum().backward()
    assert gates.rules[0].log_alpha.grad is None


def test_a_draw_made_in_inference_mode_serves_training() -> None:
    net, _ = mlp()
    x = torch.randn(4, 6, dtype=DTYPE)
    with torch.inference_mode():
        net.fc2(x)
    net.fc2(x).sum().backward()
    assert gates_of(net).rules[0].log_alpha.grad is not None


def test_antithetic_draws_exchange_arm_gates_only() -> None:
    _, gates = mlp(ARM(init_open=0.5))
    draw = Draw.make(gates, torch.Generator().manual_seed(3))
    second = draw.antithetic(gates)
    u = draw.noise[0]
    chance = gates.prob_open()
    assert torch.equal(draw.values[:-1], (u < chance).double())
    assert torch.equal(second.values[:-1], (u > 1 - chance).double())
    assert draw.values[-1] == second.values[-1] == 1
    _, pathwise = mlp(HardConcrete(init_open=0.5))
    draw = Draw.make(pathwise, torch.Generator().manual_seed(3))
    assert torch.equal(draw.antithetic(pathwise).values, draw.values)


def test_second_derivatives_through_gates_are_refused() -> None:
    net, gates = mlp()
    (grad,) = torch.autograd.grad(
        net(torch.randn(4, 3, dtype=DTYPE)).square().sum(), gates.rules[0].log_alpha, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


class Mapped(nn.Module):
    """Two layers that see one example after the other."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.layers)(x)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_layers_that_are_mapped_over_examples_train_as_layers_that_are_not(method: Method) -> None:
    layers = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    x = torch.randn(5, 3, dtype=DTYPE, generator=torch.Generator().manual_seed(0))
    found = []
    for net in (Mapped(copy.deepcopy(layers)), copy.deepcopy(layers)):
        pruner = sc.attach(net, examples=(x,), method=method, seed=1)
        pruner.loss(lambda net=net: net(x).square().mean()).backward()
        found.append([p.grad for p in net.parameters() if p.grad is not None])
    assert len(found[0]) > 4
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_model_whose_gates_are_drawn_is_not_transformed_itself() -> None:
    net, _ = mlp()
    x = torch.randn(4, 3, dtype=DTYPE)
    with pytest.raises(GateError, match="map layers inside the model's forward, or bring it to evaluation mode"):
        torch.vmap(net)(x)
    with pytest.raises(GateError, match="map layers inside"):
        torch.func.jacrev(net)(x)
    assert net(x).requires_grad
    net.eval()
    torch.testing.assert_close(torch.vmap(net)(x), net(x))
