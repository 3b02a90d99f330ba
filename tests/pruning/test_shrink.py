from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from tests.gated import DTYPE, ConvNet, Mlp, mlp_structure
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import secateur as sc
from secateur.errors import GateError
from secateur.pruning.pruner import Pruner
from secateur.structure.cut import cut_
from secateur.structure.tensors import named_tensors

#: Closed for all practical purposes: an open chance of 1e-25.
SHUT = -60.0
#: A bias before BatchNorm has a gradient of 0 but for rounding, which a small eps would blow up.
EPS = 1e-3
METHODS: dict[str, sc.Method] = {
    "hard concrete": sc.HardConcrete(clamp=None),
    "arm": sc.ARM(),
    "straight-through": sc.StraightThrough(clamp=None),
    "diffprune": sc.DiffPrune(),
}


class Attention(nn.Module):
    """Heads, a LayerNorm and an embedding that is also the last layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 3 * 12)
        self.out = nn.Linear(12, 8)
        self.up = nn.Linear(8, 10)
        self.down = nn.Linear(10, 8)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in self.qkv(self.norm(h)).chunk(3, -1))
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = h + self.down(F.gelu(self.up(h)))
        return self.head(h).mean(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(torch.tanh(self.first(x)))[0][:, -1])


def conv_batch(step: int, n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, 2, 6, 6, generator=generator, dtype=DTYPE), torch.randint(3, (n,), generator=generator)


def word_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(7, (4, 5), generator=generator), torch.randint(7, (4,), generator=generator)


def series_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 5, 4, generator=generator, dtype=DTYPE), torch.randint(3, (4,), generator=generator)


#: A network, its batches, and rules: all kinds of units that go.
NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]], list[sc.Rule]]] = {
    "convolutions": (ConvNet, conv_batch, [sc.Rule(), sc.Rule(units="inputs", where=("fc1", "inner", "stem"))]),
    "weights": (ConvNet, conv_batch, [sc.Rule(), sc.Rule(units="weights", where=("inner", "fc1", "fc2"))]),
    "attention": (Attention, word_batch, [sc.Rule(), sc.Rule(units="inputs", where="up")]),
    "recurrent": (Recurrent, series_batch, [sc.Rule()]),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, eps=EPS),
    "adamw foreach": partial(torch.optim.AdamW, foreach=True, amsgrad=True, eps=EPS),
    "adamw fused": partial(torch.optim.AdamW, fused=True, eps=EPS),
    "rmsprop": partial(torch.optim.RMSprop, centered=True, momentum=0.5, eps=EPS),
    "adagrad": partial(torch.optim.Adagrad, eps=EPS),
}


def attached(kind: str, method: sc.Method | None = None, **options: object) -> tuple[nn.Module, Pruner]:
    build, _, rules = NETS[kind]
    torch.manual_seed(5)
    net = build().double()
    method = METHODS["hard concrete"] if method is None else method
    return net, sc.attach(net, structure=structure_of(kind), gates=rules, method=method, **options)  # type: ignore[arg-type]


@cache
def structure_of(kind: str) -> sc.Structure:
    build, batch, _ = NETS[kind]
    with torch.random.fork_rng():
        return sc.trace(build().double(), examples=batch(0)[:1])


def shut(pruner: Pruner, every: int = 2) -> None:
    """Close every second unit of each group for good, single weights excepted."""
    groups = iter(pruner.groups)
    with torch.no_grad():
        for gate, _ in pruner.gates:
            parameter = next(iter(gate.parameters()))
            for part in gate.layout.slices:
                if next(groups).kind != "weights":
                    parameter[part][1::every] = SHUT


def train(
    net: nn.Module,
    pruner: Pruner,
    optimizer: torch.optim.Optimizer,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    steps: range,
    ema: AveragedModel | None = None,
) -> list[float]:
    net.train()
    losses = []
    for step in steps:
        x, y = batch(step)
        loss = pruner.loss(lambda x=x, y=y: F.cross_entropy(net(x), y))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
        if ema is not None:
            ema.update_parameters(net)
        losses.append(loss.item())
    return losses


def plain(net: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace("parametrizations.", "").replace(".original", ""): tensor
        for name, tensor in named_tensors(net).items()
        if "secateur" not in name
    }


def assert_equal_where_left(whole: nn.Module, small: nn.Module, pruner: Pruner) -> None:
    """Every tensor of the smaller model is the whole one's at the positions that stayed."""
    plan = pruner._removal.plan
    assert plan is not None
    mine = plain(small)
    first = {id(tensor): name for name, tensor in reversed(mine.items())}
    n_cut = 0
    for name, tensor in plain(whole).items():
        left = tensor
        for dim, kept in plan.tensors.get(first[id(mine[name])], {}).items():
            left = left.index_select(dim, torch.tensor(kept))
            n_cut += 1
        torch.testing.assert_close(mine[name], left, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    assert n_cut


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [*((kind, "adam") for kind in NETS), *(("convolutions", one) for one in OPTIMIZERS if one != "adam")],
)
def test_what_is_left_trains_as_it_would_have_with_the_others_closed(kind: str, optimizer: str) -> None:
    batch = NETS[kind][1]
    made = [attached(kind, budget=sc.Budget(keep_params=0.1 if kind == "weights" else 0.4, steps=20)) for _ in range(2)]
    optimizers = []
    for _, pruner in made:
        shut(pruner)
        groups = pruner.param_groups(lr=1e-2, gate_lr=1e-2)
        optimizers.append(OPTIMIZERS[optimizer](groups))
    (whole, first), (small, second) = made
    losses = [train(net, p, o, batch, range(3)) for (net, p), o in zip(made, optimizers, strict=True)]
    assert losses[0] == losses[1]
    before = sum(p.numel() for p in small.parameters())
    done = second.shrink(optimizers[1], checks=1)
    assert done.removed
    assert sum(p.numel() for p in small.parameters()) < before
    losses = [train(net, p, o, batch, range(3, 8)) for (net, p), o in zip(made, optimizers, strict=True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert_equal_where_left(whole, small, second)
    assert first.exact == second.exact
    assert first.controller.prices == pytest.approx(second.controller.prices)
    assert first.controller.push == pytest.approx(second.controller.push)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_without_norms_shrinks(method: str) -> None:
    made = [attached("convolutions", METHODS[method]) for _ in range(2)]
    optimizers = []
    for _, pruner in made:
        shut(pruner)
        optimizers.append(torch.optim.Adam(pruner.param_groups(lr=1e-2, eps=EPS, gate_lr=1e-4)))
    (whole, _), (small, pruner) = made
    assert pruner.shrink(optimizers[1], checks=1).removed
    losses = [train(net, p, o, conv_batch, range(4)) for (net, p), o in zip(made, optimizers, strict=True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert_equal_where_left(whole, small, pruner)


@pytest.mark.parametrize("kind", NETS)
def test_the_end_is_the_same_with_and_without(kind: str) -> None:
    batch = NETS[kind][1]
    outputs, reports, files = [], [], []
    for shrinks in (False, True):
        net, pruner = attached(kind, penalty=sc.Penalty(0.1, unit="density"))
        shut(pruner)
        optimizer = torch.optim.Adam(pruner.param_groups(lr=1e-2, eps=EPS))
        train(net, pruner, optimizer, batch, range(3))
        if shrinks:
            assert pruner.shrink(optimizer, checks=1).removed
        train(net, pruner, optimizer, batch, range(3, 5))
        if shrinks:
            pruner.shrink(optimizer, checks=1)
        train(net, pruner, optimizer, batch, range(5, 7))
        small, report = pruner.finalize(examples=batch(0)[:1])
        outputs.append(small.eval()(batch(20)[0]))
        reports.append(report)
        files.append({name: tuple(tensor.shape) for name, tensor in small.state_dict().items()})
        assert report.difference_float64 < 1e-12
        assert report.proof is not None
        in_place, again = pruner.finalize(in_place=True)
        assert in_place is net
        assert again.compact == report.compact
        torch.testing.assert_close(in_place.eval()(batch(20)[0]), outputs[-1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-8, atol=1e-10)
    assert files[0] == files[1]
    assert reports[0].compact == reports[1].compact
    assert reports[0].widths == reports[1].widths


def test_units_go_once_they_were_closed_at_enough_checks_in_a_row() -> None:
    net, pruner = attached("convolutions")
    optimizer = torch.optim.SGD(pruner.param_groups(lr=0.0, gate_lr=0.0))
    shut(pruner)
    assert not pruner.shrink(optimizer, checks=3).removed
    assert not pruner.shrink(optimizer, checks=3).removed
    parameter = next(iter(next(iter(pruner.gates))[0].parameters()))
    with torch.no_grad():
        parameter[1] = 5.0  # open at this check, so it counts anew
    assert pruner.shrink(optimizer, checks=3).removed["stem"] == 1
    with torch.no_grad():
        parameter[1] = SHUT
    assert [bool(pruner.shrink(optimizer, checks=3).removed) for _ in range(3)] == [False, False, True]
    assert train(net, pruner, optimizer, conv_batch, range(2))


def test_a_unit_with_some_chance_stays() -> None:
    _, pruner = attached("convolutions")
    optimizer = torch.optim.SGD(pruner.param_groups(lr=0.1))
    parameter = next(iter(next(iter(pruner.gates))[0].parameters()))
    with torch.no_grad():
        parameter[0] = -3.0  # closed in evaluation, open at one draw in five
    assert not pruner.shrink(optimizer, checks=1, chance=0.19).removed
    assert pruner.shrink(optimizer, checks=1, chance=0.21).removed


def test_one_unit_of_each_group_stays_and_what_the_budget_asks_for() -> None:
    net, pruner = attached("convolutions")
    with torch.no_grad():
        for parameter in pruner.gates.parameters():
            parameter.fill_(SHUT)
    optimizer = torch.optim.SGD(pruner.param_groups(lr=0.1))
    done = pruner.shrink(optimizer, checks=1)
    assert done.cost == pruner.costs.least
    assert all(parameter.numel() for parameter in net.parameters())
    train(net, pruner, optimizer, conv_batch, range(2))

    _, pruner = attached("convolutions", budget=sc.Budget(keep_params=0.5))
    with torch.no_grad():
        for parameter in pruner.gates.parameters():
            parameter.fill_(SHUT)
    done = pruner.shrink(torch.optim.SGD(pruner.param_groups(lr=0.1)), checks=1)
    assert done.removed
    assert done.cost.params >= 0.5 * done.dense.params
    assert pruner.finalize()[1].compact.params <= 0.5 * done.dense.params


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)])
@pytest.mark.parametrize("buffers", [False, True])
def test_averages_of_the_model_shrink_with_it(average: Callable[..., None] | None, *, buffers: bool) -> None:
    averages, small = [], None
    for shrinks in (False, True):
        net, pruner = attached("convolutions")
        shut(pruner)
        ema = AveragedModel(net, multi_avg_fn=average, use_buffers=buffers and average is None)
        optimizer = torch.optim.Adam(pruner.param_groups(lr=1e-2, eps=EPS))
        train(net, pruner, optimizer, conv_batch, range(3), ema)
        if shrinks:
            assert pruner.shrink(optimizer, ema=ema, checks=1).removed
            small = pruner
        train(net, pruner, optimizer, conv_batch, range(3, 6), ema)
        averages.append(ema)
    assert small is not None
    assert_equal_where_left(averages[0].module, averages[1].module, small)
    x = conv_batch(20)[0]
    torch.testing.assert_close(averages[0].eval()(x), averages[1].eval()(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["convolutions", "attention"])
def test_a_run_resumes_from_what_was_saved_after_a_shrink(kind: str) -> None:
    batch = NETS[kind][1]
    net, pruner = attached(kind, budget=sc.Budget(keep_params=0.4, steps=6))
    shut(pruner)
    optimizer = torch.optim.Adam(pruner.param_groups(lr=1e-2, eps=EPS))
    train(net, pruner, optimizer, batch, range(2))
    pruner.shrink(optimizer, checks=1)
    train(net, pruner, optimizer, batch, range(2, 4))
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "pruner": pruner.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = train(net, pruner, optimizer, batch, range(4, 8))

    again, second = attached(kind, budget=sc.Budget(keep_params=0.4, steps=6))
    file.seek(0)
    states = torch.load(file, weights_only=True)
    with pytest.raises(GateError, match=r"shrinking took .* call pruner.load_state_dict"):
        again.load_state_dict(states["net"])
    second.load_state_dict(states["pruner"])
    again.load_state_dict(states["net"])
    optimizer = torch.optim.Adam(second.param_groups(lr=1e-2))
    optimizer.load_state_dict(states["optimizer"])
    assert train(again, second, optimizer, batch, range(4, 8)) == expected
    assert second.finalize()[1].compact == pruner.finalize()[1].compact


def test_a_state_is_not_loaded_under_an_optimizer_or_into_a_smaller_model() -> None:
    net, pruner = attached("convolutions")
    shut(pruner)
    dense = pruner.state_dict()
    optimizer = torch.optim.Adam(pruner.param_groups(lr=1e-2, eps=EPS))
    pruner.shrink(optimizer, checks=1)
    with pytest.raises(GateError, match="gone from this model that the saved run still had"):
        pruner.load_state_dict(dense)
    _, second = attached("convolutions")
    optimizer = torch.optim.Adam(second.param_groups(lr=1e-2))
    with pytest.raises(GateError, match="another Adam trains these parameters"):
        second.load_state_dict(pruner.state_dict())
    other, third = attached("attention")
    with pytest.raises(GateError, match="attach with the same arguments"):
        third.load_state_dict(pruner.state_dict())
    del net, other


def test_detach_leaves_a_plain_small_model_that_can_be_saved() -> None:
    net, pruner = attached("convolutions")
    shut(pruner)
    with torch.no_grad():
        for parameter in pruner.gates.parameters():
            parameter[parameter > 0] = 60.0  # open, so that taking the gates off changes nothing
    optimizer = torch.optim.Adam(pruner.param_groups(lr=1e-2, eps=EPS))
    pruner.shrink(optimizer, checks=1)
    x = conv_batch(3)[0]
    expected = net.eval()(x)
    assert pruner.detach() is net
    assert not [name for name, _ in net.named_parameters() if "secateur" in name or "original" in name]
    torch.testing.assert_close(net(x), expected)
    cut = sc.cut_of(net)
    assert cut is not None
    torch.manual_seed(0)
    fresh = ConvNet().double()
    cut_(fresh, cut)
    fresh.load_state_dict(net.state_dict())
    torch.testing.assert_close(fresh.eval()(x), expected)


def test_gradients_that_were_accumulated_are_cut_along() -> None:
    made = []
    for shrinks in (False, True):
        net, pruner = attached("convolutions")
        shut(pruner)
        optimizer = torch.optim.SGD(pruner.param_groups(lr=0.1))
        x, y = conv_batch(0)
        pruner.backward(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y))
        if shrinks:
            assert pruner.shrink(optimizer, checks=1).removed
        pruner.backward(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y))
        optimizer.step()
        made.append((net, pruner))
    assert_equal_where_left(made[0][0], made[1][0], made[1][1])


def test_copies_made_after_a_shrink_compute_the_same() -> None:
    net, pruner = attached("convolutions")
    shut(pruner)
    optimizer = torch.optim.Adam(pruner.param_groups(lr=1e-2, eps=EPS))
    pruner.shrink(optimizer, checks=1)
    twin = copy.deepcopy(net)
    x = conv_batch(3)[0]
    torch.testing.assert_close(twin.eval()(x), net.eval()(x))


def test_lists_of_tensors_go_along_with_the_parameters() -> None:
    net, pruner = attached("convolutions")
    shut(pruner)
    optimizer = torch.optim.Adam(pruner.param_groups(lr=1e-2))
    sums = [parameter.detach() * 2 for parameter in net.parameters()]
    with pytest.raises(GateError, match="one tensor for each"):
        pruner.shrink(optimizer, ema=[sums[1:]], checks=1)
    assert pruner.shrink(optimizer, ema=[sums], checks=1).removed
    for total, parameter in zip(sums, net.parameters(), strict=True):
        torch.testing.assert_close(total, parameter.detach() * 2)


def test_gates_on_outputs_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    pruner = sc.attach(net, examples=(torch.zeros(2, 4),), gates=[sc.Rule(units="activations", where="1")])
    with pytest.raises(GateError, match="gates act on outputs"):
        pruner.shrink(torch.optim.Adam(pruner.param_groups(lr=1e-2)))


def test_channels_last_stays() -> None:
    net, pruner = attached("convolutions")
    net.to(memory_format=torch.channels_last)
    shut(pruner)
    optimizer = torch.optim.Adam(pruner.param_groups(lr=1e-2, eps=EPS))
    train(net, pruner, optimizer, conv_batch, range(2))
    pruner.shrink(optimizer, checks=1)
    weight = net.inner.parametrizations.weight.original
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert optimizer.state[weight]["exp_avg"].is_contiguous(memory_format=torch.channels_last)


def test_a_compiled_model_follows() -> None:
    torch.manual_seed(0)
    net = Mlp().double().eval()
    pruner = sc.attach(net, structure=mlp_structure(), method=METHODS["hard concrete"])
    shut(pruner)
    compiled = torch.compile(net, backend="eager")
    x = torch.randn(4, 3, dtype=DTYPE)
    compiled(x)
    assert pruner.shrink(torch.optim.SGD(pruner.param_groups(lr=0.1)), checks=1).removed
    torch.testing.assert_close(compiled(x), net(x))
    compiled(x).sum().backward()
    assert net.fc2.parametrizations.weight.original.grad.any()
