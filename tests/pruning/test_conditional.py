from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from tests.gated import DTYPE, ConvNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import secateur as sc
from secateur.errors import GateError
from secateur.pruning import conditional
from secateur.pruning.conditional import paying
from secateur.structure.tensors import named_tensors

METHODS: dict[str, sc.Method] = {
    "arm": sc.ARM(init_open=0.5),
    "ar": sc.ARM(init_open=0.5, estimator="ar", control_variate=True),
    "hard concrete": sc.HardConcrete(init_open=0.5),
    "diffprune": sc.DiffPrune(mode="stochastic", init_open=0.6),
    "magnitude": sc.Magnitude(final_closed=0.6, steps=1),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    # A gradient of 0 but for rounding, such as that of a bias before BatchNorm, would become a step of a whole rate.
    "adam": partial(torch.optim.Adam, eps=1e-3),
}


class LeNet(nn.Module):
    """Convolutions, pooling, and a linear layer that reads runs of flattened positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 5, 3)
        self.conv2 = nn.Conv2d(5, 6, 3, padding=1)
        self.fc1 = nn.Linear(6 * 4, 9)
        self.fc2 = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv2(torch.sigmoid(self.conv1(x))))
        return self.fc2(F.relu(self.fc1(F.max_pool2d(h, 2).flatten(1))))


class Grouped(nn.Module):
    """A depthwise convolution, a GroupNorm with a group for each channel, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.GroupNorm(6, 6)
        self.out = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = h + F.silu(self.norm(self.depth(h)))
        return self.head(torch.sigmoid(self.out(h)).mean((2, 3)))


class Transformer(nn.Module):
    """Attention that keeps its number of heads as an attribute, and an MLP, on an embedding that is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 8)
        self.inner = nn.Linear(2, 8)
        self.heads = 3
        self.qkv = nn.Linear(8, 3 * 12)
        self.out = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 10)
        self.down = nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x.flatten(2).transpose(1, 2))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(h)).chunk(3, -1))
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = h + self.down(F.gelu(self.up(self.norm(h))))
        return h.mean(1) @ self.embed.weight.T


NETS: dict[str, Callable[[], nn.Module]] = {
    "lenet": LeNet,
    "residual": ConvNet,
    "grouped": Grouped,
    "transformer": Transformer,
    "dropout": partial(ConvNet, dropout=0.4),
}


def batch(step: int, n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, 2, 6, 6, generator=generator, dtype=DTYPE), torch.randint(3, (n,), generator=generator)


@cache
def structure_of(kind: str) -> sc.Structure:
    with torch.random.fork_rng():
        return sc.trace(NETS[kind]().double(), examples=batch(0)[:1])


def attached(kind: str, method: sc.Method, **options: object) -> tuple[nn.Module, sc.Pruner]:
    torch.manual_seed(5)
    net = NETS[kind]().double()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return net, sc.attach(net, structure=structure_of(kind), method=method, **options)  # type: ignore[arg-type]


def loss_of(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x), y)


class Twins:
    """The same training, with all units computed and with the open ones alone."""

    def __init__(
        self, kind: str, method: sc.Method, optimizer: str = "sgd", when: object = True, **options: object
    ) -> None:
        self.sides = []
        for conditional_ in (False, when):
            net, pruner = attached(kind, method, conditional=conditional_, **options)
            self.sides.append((net, pruner, OPTIMIZERS[optimizer](pruner.param_groups(lr=1e-2))))
            pruner.check(self.sides[-1][2])

    @property
    def conditional(self) -> conditional.Conditional:
        return self.sides[1][1].conditional

    def step(self, number: int, **options: object) -> None:
        """One step of both; everything that it gives and leaves must agree."""
        x, y = batch(number)
        seen = []
        for net, pruner, optimizer in self.sides:
            torch.manual_seed(number)
            loss = pruner.loss(partial(loss_of, net, x, y), **options)  # type: ignore[arg-type]
            loss.backward()
            grads = {name: parameter.grad for name, parameter in net.named_parameters()}
            seen.append((loss.detach(), grads, dict(net.named_buffers()), torch.get_rng_state()))
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
        full, part = seen
        assert torch.equal(full[3], part[3])
        for one, other in zip(full[:3], part[:3], strict=True):
            torch.testing.assert_close(other, one, atol=1e-12, rtol=1e-9)
        weights = [dict(net.named_parameters()) for net, _, _ in self.sides]
        torch.testing.assert_close(weights[1], weights[0], atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize(
    ("kind", "method", "optimizer"),
    [
        *itertools.product(NETS, METHODS, ["sgd"]),
        *itertools.product(["lenet", "residual", "transformer"], ["arm", "ar", "hard concrete"], ["adam"]),
    ],
)
def test_training_is_that_of_full_passes(kind, method, optimizer):
    twins = Twins(kind, METHODS[method], optimizer, budget=sc.Budget(keep_params=0.4, steps=20), seed=2)
    for step in range(3):
        twins.step(step)
    assert twins.conditional.passes >= 3 + 2 * (method == "arm")
    assert twins.conditional.share < 1


@pytest.mark.parametrize("kind", NETS)
def test_units_are_left_out_whole_but_for_state_and_random_numbers(kind):
    twins = Twins(kind, METHODS["hard concrete"])
    twins.step(0)
    shapes = structure_of(kind).shapes
    read = weights_read(*twins.sides[1][:2])
    absent = {name.removesuffix(".weight") for name, weight in read.items() if len(weight) < shapes[name][0]}
    unread = {name.removesuffix(".weight") for name, weight in read.items() if weight.shape[1] < shapes[name][1]}
    assert (absent, unread) == {
        "lenet": ({"conv1", "conv2", "fc1"}, {"conv2", "fc1", "fc2"}),
        "residual": ({"fc1"}, {"inner", "outer", "fc1", "fc2"}),
        "grouped": ({"stem", "depth", "out"}, {"out", "head"}),
        "transformer": ({"qkv", "up"}, {"out", "down"}),
        "dropout": (set(), {"inner", "outer", "fc1", "fc2"}),
    }[kind]


def weights_read(net: nn.Module, pruner: sc.Pruner) -> dict[str, Tensor]:
    """Weights as a pass reads them."""
    x, y = batch(9)
    found: dict[str, Tensor] = {}

    def note(module: nn.Module, *_: object, name: str) -> None:
        found[name] = module.weight.detach()  # type: ignore[union-attr, operator]

    layers = [(path, module) for path, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    hooks = [module.register_forward_hook(partial(note, name=f"{path}.weight")) for path, module in layers]
    pruner.loss(partial(loss_of, net, x, y))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("kind", ["lenet", "residual", "transformer"])
@pytest.mark.parametrize("method", ["arm", "hard concrete"])
def test_a_group_that_closes_altogether_leaves_nothing_of_it(kind, method):
    twins = Twins(kind, METHODS[method])
    for _, pruner, _ in twins.sides:
        with torch.no_grad():
            parameter = next(pruner.gates.parameters())
            parameter[: pruner.groups[0].size] = -60.0
            parameter[-pruner.groups[-1].size :] = -60.0
    for step in range(2):
        twins.step(step)
    assert twins.conditional.passes > 1


@pytest.mark.parametrize("options", [{"draws": 3}, {"credit": "group"}], ids=["draws", "credit"])
def test_further_passes_of_arm_leave_out_what_their_own_draw_closes(options):
    twins = Twins("lenet", METHODS["arm"])
    for step in range(2):
        twins.step(step, **options)
    assert twins.conditional.passes > 4


@pytest.mark.parametrize("method", ["ar", "hard concrete"])
def test_single_inputs_are_left_out_where_they_are_read(method):
    rules = [sc.Rule(), sc.Rule(units="inputs", where=("fc1", "conv1"))]
    twins = Twins("lenet", METHODS[method], gates=rules)
    for step in range(3):
        twins.step(step)
    assert not twins.conditional.why


def test_other_gates_on_the_same_weights_go_on_acting():
    rules = [sc.Rule(where=("conv1", "fc1")), sc.Rule(where="conv2", method=sc.StraightThrough(init_open=0.5))]
    twins = Twins("lenet", METHODS["arm"], gates=rules)
    for step in range(3):
        twins.step(step)
    assert list(twins.conditional.why) == ["conv2"]
    single = [sc.Rule(), sc.Rule(units="weights", where="fc1", method=sc.HardConcrete())]
    twins = Twins("lenet", METHODS["arm"], gates=single)
    for step in range(2):
        twins.step(step)
    assert "its units are computed" in twins.conditional.why["conv2"] or twins.conditional.share < 1


def test_dropout_that_is_switched_on_later_stays_that_of_full_passes():
    torch.manual_seed(0)
    twins = Twins("grouped", METHODS["hard concrete"])
    twins.step(0)
    for net, _, _ in twins.sides:
        net.out.register_forward_pre_hook(lambda _, args: F.dropout(args[0], 0.4))
    twins.step(1)
    twins.step(2)
    assert twins.conditional.passes > 1


@pytest.mark.parametrize("kind", ["lenet", "residual"])
def test_it_follows_a_shrink(kind):
    twins = Twins(kind, sc.HardConcrete(init_open=0.6, clamp=None), "adam")
    for _, pruner, _ in twins.sides:
        with torch.no_grad():
            next(pruner.gates.parameters())[::3] = -60.0
    twins.step(0)
    removed = [pruner.shrink(optimizer, checks=1).removed for _, pruner, optimizer in twins.sides]
    assert removed[0] == removed[1]
    assert removed[0]
    for step in range(1, 4):
        twins.step(step)
    assert twins.conditional.passes > 1


def hooks_of(model: nn.Module) -> list[list[object]]:
    return [[*module._forward_pre_hooks.values(), *module._forward_hooks.values()] for module in model.modules()]


def test_afterwards_everything_is_where_it_was():
    net, pruner = attached("transformer", METHODS["hard concrete"], conditional=True)
    before = {name: id(tensor) for name, tensor in named_tensors(net).items()}
    numbers = [(k, v) for module in net.modules() for k, v in vars(module).items() if isinstance(v, int)]
    hooks = hooks_of(net)
    x, y = batch(0)
    pruner.loss(partial(loss_of, net, x, y))

    def failing() -> Tensor:
        net(x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "gelu", lambda _: 1 / 0)
            return F.cross_entropy(net(x), y)

    with pytest.raises(ZeroDivisionError):
        pruner.loss(failing)
    assert {name: id(tensor) for name, tensor in named_tensors(net).items()} == before
    assert [(k, v) for module in net.modules() for k, v in vars(module).items() if isinstance(v, int)] == numbers
    assert hooks_of(net) == hooks
    assert pruner.conditional.passes > 1
    plain = pruner.detach()
    assert not any(hooks_of(plain))


def test_methods_whose_closed_gates_hear_the_task_are_refused():
    x, y = batch(0)
    for method in (sc.StraightThrough(), sc.DiffPrune(), sc.DifferentiableSparsification()):
        net, strict = attached("lenet", method, conditional=True)
        with pytest.raises(GateError, match=f"{type(method).__name__} gives gates at 0 a gradient"):
            strict.loss(partial(loss_of, net, x, y))
        net, pruner = attached("lenet", method, conditional="auto")
        pruner.loss(partial(loss_of, net, x, y))
        assert "gives gates at 0 a gradient" in pruner.conditional.off


def test_a_misspelt_setting_is_refused():
    with pytest.raises(GateError, match="conditional is 'always'"):
        attached("lenet", METHODS["arm"], conditional="always")


class Recomputed(LeNet):
    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda x: self.conv2(torch.sigmoid(self.conv1(x))), x, use_reentrant=False)
        return self.fc2(F.relu(self.fc1(F.max_pool2d(F.relu(h), 2).flatten(1))))


class Functional(ConvNet):
    """Reads a weight past the module that holds it."""

    def head(self, h: Tensor) -> Tensor:
        h = F.max_pool2d(h, 2).flatten(1)
        return F.linear(torch.sigmoid(F.linear(h, self.fc1.weight, self.fc1.bias)), self.fc2.weight, self.fc2.bias)


class Writing(LeNet):
    """Holds its weights down as it runs."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.conv1.weight.clamp_(-1.0, 1.0)
        return super().forward(x)


@pytest.mark.parametrize(("build", "like"), [(Recomputed, "lenet"), (Writing, "lenet"), (Functional, "residual")])
def test_models_that_it_does_not_fit_are_trained_by_full_passes(build, like):
    torch.manual_seed(0)
    net = build().double()
    other = copy.deepcopy(net)
    x, y = batch(0)
    structure = structure_of(like)
    pruners = [
        sc.attach(one, structure=structure, method=METHODS["ar"], conditional=when)
        for one, when in ((net, False), (other, "auto"))
    ]
    pruners[1].conditional._due = True
    losses = [pruner.loss(partial(loss_of, one, x, y)) for one, pruner in zip((net, other), pruners, strict=True)]
    assert "fails with" in pruners[1].conditional.off
    for loss in losses:
        loss.backward()
    assert torch.equal(*(loss.detach() for loss in losses))
    third = sc.attach(build().double(), structure=structure, method=METHODS["ar"], conditional=True)
    with pytest.raises(GateError, match="conditional=True: a pass without closed units fails with"):
        third.loss(partial(loss_of, third.model, x, y))


class Chaotic(LeNet):
    """Blows rounding up by a factor of a million."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(1e6 * super().forward(x))


class Off(LeNet):
    """Computes something else where its second convolution has other than its dense width."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.001 if self.conv2.out_channels == 6 else 1.0)


def test_rounding_that_a_network_blows_up_is_told_from_a_difference():
    x, y = (part if part.dtype == torch.int64 else part.float() for part in batch(0))
    torch.manual_seed(0)
    net = Chaotic()
    pruner = sc.attach(net, structure=structure_of("lenet"), method=METHODS["ar"], conditional=True)
    pruner.loss(partial(loss_of, net, x, y))
    assert pruner.conditional.passes > 0
    net = Off().double()
    pruner = sc.attach(net, structure=structure_of("lenet"), method=METHODS["ar"], conditional=True)
    with pytest.raises(GateError, match="gives other loss"):
        pruner.loss(partial(loss_of, net, *batch(0)))


def times(ratio: Callable[[float], float]) -> Callable[[Callable[[], object]], float]:
    """A clock by which a full pass takes 1 and a narrowed one what a function of its share says."""

    def timed(call: Callable[[], object]) -> float:
        call()
        narrowing, limit = call.args[0], call.args[2]  # type: ignore[attr-defined]
        return 1.0 if limit < 0 else ratio(narrowing.share)

    return timed


def test_auto_leaves_out_where_it_was_measured_to_pay(monkeypatch):
    monkeypatch.setattr(conditional, "_timed", times(lambda share: 0.48 + share))
    twins = Twins("lenet", sc.ARM(init_open=0.9), when="auto")
    twins.step(0)
    assert twins.conditional.pays_from is None
    for _, pruner, _ in twins.sides:
        with torch.no_grad():
            next(pruner.gates.parameters()).fill_(0.0)
    for step in range(1, 22):
        twins.step(step)
    assert twins.conditional.pays_from == pytest.approx(0.5)
    assert twins.conditional.passes > 5
    assert twins.conditional.share < 1


def test_auto_changes_no_bit_where_it_never_pays(monkeypatch):
    monkeypatch.setattr(conditional, "_timed", times(lambda share: 1.0 + share))
    twins = Twins("dropout", METHODS["hard concrete"], "adam", when="auto")
    for step in range(4):
        twins.step(step)
    assert twins.conditional.pays_from == 0.0
    assert all(torch.equal(*two) for two in zip(*(net.parameters() for net, _, _ in twins.sides), strict=True))
    assert all(torch.equal(*two) for two in zip(*(net.buffers() for net, _, _ in twins.sides), strict=True))


def test_the_share_from_which_it_pays():
    assert paying([0.8, 0.4], [0.5, 0.3]) == 1.0
    assert paying([0.8, 0.4], [0.9, 0.5]) == pytest.approx(0.88)
    assert paying([0.8, 0.6, 0.2], [1.2, 1.1, 0.5]) == pytest.approx(0.52)
    assert paying([0.8, 0.2], [1.2, 0.99]) == 0.0


def test_it_goes_with_autocast_and_several_passes_in_one_closure():
    torch.manual_seed(0)
    net = LeNet()
    pruner = sc.attach(net, structure=structure_of("lenet"), method=METHODS["hard concrete"], conditional=True)
    x, y = (part if part.dtype == torch.int64 else part.float() for part in batch(0))

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            first, second = net(x), net(x)
        return F.cross_entropy(first.float(), y) + F.mse_loss(first.float(), second.float())

    pruner.backward(closure)
    assert pruner.conditional.passes >= 3
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_closure_that_gives_no_loss_is_refused_as_ever():
    net, pruner = attached("lenet", METHODS["arm"], conditional=True)
    x, _ = batch(0)
    with pytest.raises(GateError, match="expected one number"):
        pruner.loss(lambda: net(x))


def test_wrapped_and_compiled_models_are_full(monkeypatch):
    x, y = batch(0)
    net, pruner = attached("lenet", METHODS["arm"], conditional="auto")
    net.fc2.compile(backend="eager")
    pruner.loss(partial(loss_of, net, x, y))
    assert "compiled in place" in pruner.conditional.off
    net, pruner = attached("lenet", METHODS["arm"], conditional=True)
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        pruner.backward(partial(loss_of, net, x, y))
    assert pruner.conditional.passes == 0
    net, pruner = attached("lenet", METHODS["arm"], conditional=True)
    monkeypatch.setattr(conditional, "_is_wrapped", lambda _: True)
    with pytest.raises(GateError, match="wrapped or sharded"):
        pruner.loss(partial(loss_of, net, x, y))


def test_evaluation_and_parts_of_the_model_are_full():
    net, pruner = attached("residual", METHODS["arm"], conditional=True)
    x, y = batch(0)
    pruner.loss(partial(loss_of, net, x, y))
    passes = pruner.conditional.passes
    pruner.loss(lambda: F.cross_entropy(net.head(net.middle(net.features(x))), y))
    net.fc1.eval()
    pruner.loss(partial(loss_of, net, x, y))
    net.eval()
    with torch.no_grad():
        pruner.loss(partial(loss_of, net, x, y))
    assert pruner.conditional.passes == passes
