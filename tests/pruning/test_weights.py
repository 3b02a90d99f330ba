from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from tests.gated import DTYPE, ConvNet, Mlp, conv_structure, images, mlp_structure
from torch import Tensor, nn

import secateur as sc
from secateur.pruning.choose import choose
from secateur.pruning.draws import live_of
from secateur.pruning.gateset import extended

METHODS = [sc.HardConcrete(init_open=0.6), sc.ARM(init_open=0.6), sc.DiffPrune(), sc.DifferentiableSparsification()]


def attached(net: nn.Module, x: Tensor, *rules: sc.Rule, **more: object) -> sc.Pruner:
    gates = list(rules) or [sc.Rule(units="weights", init_open=0.6)]
    return sc.attach(net, examples=(x,), gates=gates, **more)  # type: ignore[arg-type]


def spread(pruner: sc.Pruner, share: float, seed: int = 0) -> None:
    """Set hard concrete gates so that a share of them is open."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate, _ in pruner.gates:
            z = torch.rand(gate.layout.total, generator=generator, dtype=DTYPE)
            gate.tensors["log_alpha"].copy_(torch.where(z < share, z, -5.0))


def nonzeros(model: nn.Module) -> int:
    return sum(int(p.count_nonzero()) if p.dim() > 1 else p.numel() for p in model.parameters())


def names(rule: sc.Rule) -> list[str]:
    return [group.name for group in choose(ConvNet().double(), conv_structure(), [rule], None)[0].groups]


def test_a_unit_for_each_scalar_of_the_weights_that_multiply() -> None:
    groups = choose(ConvNet().double(), conv_structure(), [sc.Rule("weights")], None)[0].groups
    assert [(group.name, group.size) for group in groups] == [
        ("stem.weight", 72),
        ("inner.weight", 216),
        ("outer.weight", 24),
        ("fc1.weight", 180),
        ("fc2.weight", 15),
    ]
    assert {group.kind for group in groups} == {"weights"}


@pytest.mark.parametrize("where", ["fc*", "fc?.weight", nn.Linear, lambda group: group.name.startswith("fc")])
def test_where_and_exclude_name_tensors_or_layers(where: object) -> None:
    assert names(sc.Rule("weights", where=where)) == ["fc1.weight", "fc2.weight"]  # type: ignore[arg-type]
    rest = ["stem.weight", "inner.weight", "outer.weight"]
    assert names(sc.Rule("weights", exclude=where)) == rest  # type: ignore[arg-type]


def test_a_rule_that_finds_no_weight_names_those_that_there_are() -> None:
    with pytest.raises(sc.GateError, match=r"finds nothing; the weights are stem\.weight; inner\.weight"):
        names(sc.Rule("weights", where="nowhere"))
    with pytest.raises(sc.GateError, match=r"gated twice: 'fc1\.weight'"):
        choose(ConvNet(), conv_structure(), [sc.Rule("weights"), sc.Rule("weights", where="fc1")], None)


def test_tables_of_embeddings_are_no_weights_that_multiply() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)).double()
    pruner = attached(net, torch.tensor([[1, 2]]))
    assert [group.name for group in pruner.groups] == ["1.weight"]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_closed_weights_are_zero_where_they_act_and_so_is_their_gradient(method: sc.Method) -> None:
    net = ConvNet().double()
    attached(net, images(), sc.Rule("weights", method=method))
    gates = net.secateur_gates
    keep = torch.rand(gates.total) < 0.5
    values = extended(torch.where(keep, 0.7, 0.0).to(DTYPE))
    with live_of(gates).overridden(values):
        weight, original = net.fc1.weight, net.fc1.parametrizations.weight.original
        net(images()).square().sum().backward()
    closed = ~keep[312:492].view(5, 36)
    assert torch.all(weight[closed] == 0.0)
    assert torch.all(original.grad[closed] == 0.0)
    assert torch.any(original.grad[~closed] != 0.0)
    assert torch.equal(weight, original * values[312:492].view(5, 36))


def test_coarse_and_fine_gates_multiply() -> None:
    net = Mlp().double()
    pruner = attached(
        net, torch.randn(2, 3, dtype=DTYPE), sc.Rule(), sc.Rule("inputs", where="fc2"), sc.Rule("weights")
    )
    gates = net.secateur_gates
    assert [group.kind for group in pruner.groups] == ["structured", "inputs", "weights", "weights"]
    z = torch.rand(gates.total, dtype=DTYPE)
    with live_of(gates).overridden(extended(z)):
        expected = net.fc2.parametrizations.weight.original * z[:6] * z[6:12] * z[30:42].view(2, 6)
        torch.testing.assert_close(net.fc2.weight, expected, rtol=0, atol=1e-16)


def test_expected_count_by_enumeration() -> None:
    """All patterns of coarse and fine gates of a recurrent square weight, whose diagonal meets one unit twice."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(1, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            return self.c(h + torch.relu(self.b(h)))

    net = Square().double()
    pruner = attached(
        net, torch.randn(3, 1, dtype=DTYPE), sc.Rule(init_open=0.5), sc.Rule("weights", where="b", init_open=0.5)
    )
    units = pruner._units
    assert [group.size for group in pruner.groups] == [2, 4]
    chance = torch.rand(6, dtype=DTYPE)
    mean = torch.zeros((), dtype=DTYPE)
    for bits in itertools.product([0.0, 1.0], repeat=6):
        z = torch.tensor(bits, dtype=DTYPE)
        weight = torch.where(z == 1, chance, 1 - chance).prod()
        count = z[0:2].sum() * 2 + 1 + (z[2:].view(2, 2) * z[0:2, None] * z[None, 0:2]).sum()
        mean = mean + weight * count
    found = pruner.costs.expected(units.chances(chance), "params")
    torch.testing.assert_close(found, mean, rtol=1e-12, atol=0)


@pytest.mark.parametrize("share", [0.03, 0.1, 0.5])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_compact_computes_what_gated_does_and_has_as_many_nonzeros_as_counted(
    share: float, coarse: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    net, x = ConvNet().double(), images()
    rules = [sc.Rule(), sc.Rule("inputs", where="fc1"), sc.Rule("weights")] if coarse else [sc.Rule("weights")]
    pruner = attached(net, x, *rules)
    spread(pruner, share if not coarse else share**0.5, seed)
    net.eval()
    expected = net(x)
    exact = pruner.exact
    small, report = pruner.finalize()
    torch.testing.assert_close(small.eval()(x), expected, rtol=0, atol=1e-12)
    assert report.proof is not None
    assert report.difference_float64 < 1e-12
    assert report.compact.params == nonzeros(small) == exact.params
    assert report.compact.macs == exact.macs == sc.trace(small, (x,)).cost().macs
    assert net(x).equal(expected)


def test_units_inputs_and_layers_that_nothing_reads_go_one_after_the_other() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.Sigmoid(), nn.Linear(8, 6), nn.Sigmoid(), nn.Linear(6, 2)).double()
    x = torch.randn(4, 5, dtype=DTYPE)
    pruner = attached(net, x)
    with torch.no_grad():
        log_alpha = pruner.gates.rules[0].log_alpha
        log_alpha.fill_(5.0)
        first, second, third = log_alpha[:40].view(8, 5), log_alpha[40:88].view(6, 8), log_alpha[88:].view(2, 6)
        third[:, 2:] = -5.0  # units 2 to 5 of the second layer are unread
        second[:2, 3:] = -5.0  # and units 3 to 7 of the first are read by these alone
        first[:3, 1] = -5.0  # as is input 1
    small, report = pruner.finalize()
    assert report.widths["0"] == (3, 8)
    assert report.widths["2"] == (2, 6)
    assert report.widths["0.inputs"] == (4, 5)
    assert [tuple(small[at].weight.shape) for at in (0, 2, 4)] == [(3, 4), (2, 3), (2, 2)]
    torch.testing.assert_close(small.eval()(x), net.eval()(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("keep", [0.1, 0.3])
def test_budget_counts_nonzeros(keep: float, round_to: int) -> None:
    net, x = Mlp(8, 32, 4).double(), torch.randn(4, 8, dtype=DTYPE)
    pruner = attached(net, x, budget=sc.Budget(keep_params=keep))
    spread(pruner, 0.6)
    net.eval()
    small, report = pruner.finalize(round_to=round_to)
    limit = int(keep * 420)
    assert 0.8 * limit <= report.compact.params <= limit
    assert report.compact.params == nonzeros(small)
    torch.testing.assert_close(small.eval()(x), net(x), rtol=0, atol=1e-12)


def test_in_place_is_the_same_model() -> None:
    x = torch.randn(4, 3, dtype=DTYPE)
    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        net = Mlp().double()
        pruner = attached(net, x)
        spread(pruner, 0.3)
        small, _ = pruner.finalize(in_place=in_place)
        assert (small is net) == in_place
        found.append(dict(small.state_dict()))
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_detach_gives_the_model_back() -> None:
    net = ConvNet().double()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    attached(net, images()).detach()
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_tied_and_fused_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 8)
            self.down = nn.Linear(8, 6)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.up = nn.Linear(6, 8)
            self.head = nn.Linear(8, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            h = torch.tanh(self.down(self.table(tokens)))
            h = h + self.attention(h, h, h, need_weights=False)[0]
            return self.head(F.gelu(self.up(h)))

    net, tokens = Tied().double(), torch.randint(7, (2, 5))
    pruner = sc.attach(net, examples=(tokens,), gates=[sc.Rule("weights")])
    assert "attention.in_proj_weight" in {group.name for group in pruner.groups}
    spread(pruner, 0.3)
    expected = net.eval()(tokens)
    small, report = pruner.finalize()
    torch.testing.assert_close(small.eval()(tokens), expected, rtol=0, atol=1e-12)
    assert small.head.weight is small.table.weight
    assert report.compact.params == pruner.exact.params


def test_training_reaches_the_budget_and_keeps_what_is_needed() -> None:
    """A teacher that reads 4 of 16 inputs by one weight each."""
    torch.manual_seed(0)
    net = nn.Linear(16, 2, bias=False).double()
    teacher = torch.zeros(2, 16, dtype=DTYPE)
    teacher[0, 3], teacher[0, 7], teacher[1, 3], teacher[1, 12] = 1.0, -2.0, 1.5, 1.0
    pruner = attached(net, torch.randn(2, 16, dtype=DTYPE), sc.Rule("weights"), budget=sc.Budget(keep_params=4 / 32))
    optimizer = torch.optim.Adam(pruner.param_groups(lr=1e-2, gate_lr=0.1))
    for _ in range(400):
        x = torch.randn(64, 16, dtype=DTYPE)
        pruner.loss(lambda x=x: F.mse_loss(net(x), x @ teacher.T)).backward()  # type: ignore[misc]
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    small, report = pruner.finalize()
    assert report.compact.params == 4
    assert tuple(small.weight.shape) == (2, 3)
    x = torch.randn(64, 16, dtype=DTYPE)
    assert F.mse_loss(small(x), x @ teacher.T) < 0.05


def test_recurrent_weights_after_a_forward_with_gradient() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 6, batch_first=True)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    net, x = Recurrent().double(), torch.randn(2, 5, 4, dtype=DTYPE)
    pruner = attached(net, x)
    assert [group.size for group in pruner.groups] == [96, 144, 12]
    spread(pruner, 0.3)
    expected = net.eval()(x)
    small, report = pruner.finalize()
    torch.testing.assert_close(small.eval()(x), expected, rtol=0, atol=1e-12)
    assert report.compact.params == pruner.exact.params == nonzeros(small)


def test_weights_of_a_tensor_that_gave_units_their_name_have_another() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 6, batch_first=True)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    net = Net().double()
    x = torch.randn(3, 5, 4, dtype=DTYPE)
    pruner = attached(net, x, sc.Rule(init_open=0.6), sc.Rule("weights", init_open=0.6))
    found = [group.name for group in pruner.groups]
    assert found == ["rnn.weight_ih_l0", "rnn.weight_ih_l0.weights", "rnn.weight_hh_l0", "head.weight"]
    spread(pruner, 0.7)
    coarse, fine = (gate.fixed() for gate, _ in pruner.gates)
    original = net.head.parametrizations.weight.original  # type: ignore[union-attr, operator]
    net.eval()
    torch.testing.assert_close(net.head.weight, original * coarse * fine[-18:].view(3, 6))
    small, report = pruner.finalize()
    torch.testing.assert_close(small(x), net(x))
    assert report.compact.params == nonzeros(small)
    with pytest.raises(sc.GateError, match=r"gated twice: 'rnn\.weight_ih_l0\.weights' by gates\[0\] and gates\[1\]"):
        choose(Net().double(), pruner.structure, [sc.Rule("weights"), sc.Rule("weights", where="rnn")], None)


def test_structure_and_masks_know_no_single_weights() -> None:
    assert all(group.kind != "weights" for group in mlp_structure().groups)
