from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.pruning.activations import candidates
from secateur.pruning.outputs import links
from secateur.structure.example import as_examples

DTYPE = torch.float64


class Net(nn.Module):
    """A gate may go behind anything: layers, a ReLU, a pooling, something curved, time steps, a computed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(16, 6)
        self.curved = nn.Sigmoid()
        self.fc2 = nn.Linear(6, 5)
        self.silu = nn.SiLU()
        self.fc3 = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv(x))).flatten(1)
        return self.fc3(self.silu(self.fc2(self.curved(self.fc1(x)))))


def given() -> Tensor:
    return torch.randn(4, 2, 4, 4, dtype=DTYPE)


def made(*rules: sc.Rule, **more: object) -> tuple[Net, Tensor, sc.Pruner]:
    net, x = Net().double(), given()
    return net, x, sc.attach(net, examples=(x,), gates=list(rules), **more)  # type: ignore[arg-type]


def close(pruner: sc.Pruner, every: int = 2) -> None:
    """Every second unit closed, the others open by different amounts."""
    with torch.no_grad():
        for gate in pruner.gates.rules:
            log_alpha = gate.log_alpha
            log_alpha.copy_(torch.linspace(-1.0, 4.0, len(log_alpha)))
            log_alpha[::every] = -4.0


@pytest.mark.parametrize(
    ("where", "cut"),
    [
        ("conv", ["conv"]),
        ("relu", ["conv"]),
        ("pool", ["conv"]),
        ("fc1", []),
        ("curved", ["fc1"]),
        ("fc2", ["fc2"]),
        ("silu", ["fc2"]),
    ],
)
def test_units_are_linked_where_zeros_reach_what_reads_them(where: str, cut: list[str]) -> None:
    net, x = Net().double(), given()
    structure = sc.trace(net, (x,))
    (group,) = sc.attach(net, structure=structure, gates=[sc.Rule("activations", where=where)]).groups
    net = Net().double()
    assert len(candidates(structure, [group])) == 1
    assert [link.group for link in links(net, structure, [group], as_examples((x,))).values()] == cut
    assert not links(net, structure, [group], ())  # without inputs nothing is tried


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("where", ["conv", "relu", "pool", "fc1", "curved", "fc2", "silu", ("pool", "silu", "fc1")])
@pytest.mark.parametrize("per_example", [False, True])
def test_the_small_model_computes_what_the_gated_one_does(where: object, per_example: bool, in_place: bool) -> None:
    net, x, pruner = made(sc.Rule("activations", where=where, per_example=per_example))  # type: ignore[arg-type]
    close(pruner)
    expected = net.eval()(x)
    exact = pruner.exact
    small, report = pruner.finalize(in_place=in_place)
    torch.testing.assert_close(small.eval()(x), expected, rtol=0, atol=1e-12)
    assert report.difference_float64 < 1e-12
    assert sum(parameter.numel() for parameter in small.parameters()) == report.compact.params == exact.params
    stays = where == "fc1" or isinstance(where, tuple)
    assert (report.compact.params == report.dense.params) == (where == "fc1")
    assert report.as_zeros == ({"fc1()": 3} if stays else {})
    folded = where in ("conv", "fc1", "fc2")
    assert ("still multiplied" in str(report)) == (not folded) == bool(report.multiplied)


def test_a_file_keeps_the_multipliers(tmp_path: object) -> None:
    _, x, pruner = made(sc.Rule("activations", where=("relu", "silu")), sc.Rule("activations", where="fc1"))
    close(pruner)
    small, _ = pruner.finalize()
    plan = sc.cut_of(small)
    assert plan is not None
    assert plan.scales == {"relu": (1, 2), "silu": (1, 2)}
    assert sc.CutPlan.from_json(plan.to_json()) == plan
    file = f"{tmp_path}/small.safetensors"
    sc.save(small, file)
    again = sc.load(file, Net())
    assert torch.equal(again(x), small.eval()(x) if not again.training else small.train()(x))
    # A second round of pruning cuts what the first one left, its multipliers too.
    rounds = sc.attach(small, examples=(x,), gates=[sc.Rule()])
    close(rounds)
    expected = small.eval()(x)
    smaller, _ = rounds.finalize()
    torch.testing.assert_close(smaller.eval()(x), expected, rtol=0, atol=1e-12)
    sc.save(smaller, file)
    assert torch.equal(sc.load(file, Net()).eval()(x), smaller(x))


def test_beside_gates_on_weights_both_multiply() -> None:
    net, x, pruner = made(sc.Rule(), sc.Rule("activations", where=("relu", "fc1")), sc.Rule("inputs", where="fc1"))
    close(pruner, every=3)
    expected = net.eval()(x)
    small, report = pruner.finalize()
    torch.testing.assert_close(small.eval()(x), expected, rtol=0, atol=1e-12)
    assert report.compact.params < report.dense.params
    assert report.as_zeros == {"relu()": 2, "fc1()": 2}


def test_a_budget_counts_the_units_that_go_and_leaves_the_others_alone() -> None:
    _, _, pruner = made(sc.Rule("activations", where=("relu", "fc1")), budget=sc.Budget(keep_params=0.7))
    with torch.no_grad():
        pruner.gates.rules[0].log_alpha.copy_(torch.linspace(2.0, 3.0, 10))
    _, report = pruner.finalize()
    assert report.compact.params <= 0.7 * report.dense.params
    assert report.widths["conv"] == (2, 4)
    assert report.widths["fc1()"] == (6, 6)
    assert report.flipped == 2


def test_groups_of_ones_own_over_any_dimension() -> None:
    net, x = Net().double(), given()
    rows = sc.output_group("conv", [[0, 1], [2, 3]])
    lines = sc.output_group("pool", np.arange(2)[:, None], dim=-1, name="columns")
    pruner = sc.attach(net, examples=(x,), gates=[sc.Rule(units=[rows, lines])])
    assert [(g.name, g.size, g.members[0].dim) for g in pruner.groups] == [("conv()", 2, 1), ("columns", 2, 3)]
    close(pruner)
    net.eval()
    seen: list[Tensor] = []
    for layer in (net.conv, net.pool):
        layer.register_forward_hook(lambda _, __, output: seen.append(output))
    expected = net(x)
    conv, pool = seen
    assert not conv[:, :2].any()
    assert conv[:, 2:].all()
    assert not pool[..., 0].any()
    small, report = pruner.finalize()
    torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-12)
    assert report.as_zeros == {"conv()": 1, "columns": 1}  # units of two channels are no units of the trace
    assert report.multiplied == ("pool",)


def test_custom_groups_of_the_trace_can_be_closed_at_an_output() -> None:
    net, x = Net().double(), given()
    structure = sc.trace(net, (x,))
    pairs = structure.custom("pairs", {"conv": [[0, 3], [1, 2]]})
    structure = structure.regrouped([pairs])
    rows = sc.output_group("relu", [[1, 2], [0, 3]])
    pruner = sc.attach(net, examples=(x,), structure=structure, gates=[sc.Rule(units=[rows])])
    close(pruner)
    expected = net.eval()(x)
    small, report = pruner.finalize()
    assert report.widths["pairs"] == (1, 2)
    assert report.keep["pairs"].tolist() == [0]
    assert small.conv.out_channels == 2
    torch.testing.assert_close(small.eval()(x), expected, rtol=0, atol=1e-12)


class Computed(nn.Module):
    """A weight that is computed before it is read, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 6))
        self.act = nn.ReLU()
        self.mid = nn.Linear(6, 6)
        self.fc2 = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc1(x))
        return self.fc2(h + self.mid(h))


@pytest.mark.parametrize("where", ["act", "mid", "fc1"])
def test_weights_that_are_computed(where: str) -> None:
    net, x = Computed().double(), torch.randn(5, 3, dtype=DTYPE)
    pruner = sc.attach(net, examples=(x,), gates=[sc.Rule("activations", where=where)])
    close(pruner)
    expected = net.eval()(x)
    small, report = pruner.finalize()
    torch.testing.assert_close(small.eval()(x), expected, rtol=0, atol=1e-12)
    assert report.as_zeros == {f"{where}()": 3}
    with pytest.raises(sc.GateError, match="has parametrizations"):
        sc.attach(Computed(), examples=(x.float(),), gates=[sc.Rule("activations", where="act"), sc.Rule()])


def test_what_goes_round_the_module_keeps_the_units() -> None:
    net, x = Computed().double(), torch.randn(5, 3, dtype=DTYPE)
    torch.nn.utils.parametrize.remove_parametrizations(net.fc1, "weight")
    pruner = sc.attach(net, examples=(x,), gates=[sc.Rule("activations", where="mid")])
    close(pruner)
    expected = net.eval()(x)
    small, report = pruner.finalize()
    assert report.as_zeros == {"mid()": 3}
    torch.testing.assert_close(small.eval()(x), expected, rtol=0, atol=1e-12)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.both = nn.Identity()
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(self.fc(self.lstm(x)[0]))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda: sc.Rule("activations"), "needs where="),
        (lambda: sc.Rule("activations", where="nowhere"), "finds no module"),
        (lambda: sc.Rule("activations", where="lstm"), "lstm: the trace saw it return no single tensor"),
        (lambda: sc.Rule("activations", where="unused"), "unused: the trace saw it return no single tensor"),
        (lambda: sc.Rule("activations", where="fc", dim=0), "dimension 0 is the batch"),
        (lambda: sc.Rule("activations", where="fc", dim=3), r"expected one in \[1, 3\)"),
        (lambda: sc.Rule(units=[sc.output_group("fc", [[0, 1], [1, 2]])]), "named twice"),
        (lambda: sc.Rule(units=[sc.output_group("fc", [[0, 9]], dim=2)]), "names position 9"),
        (lambda: sc.Rule(units=[sc.output_group("fc", [0, 1])]), "expected integers"),
        (lambda: sc.Rule(units=[sc.output_group("fc", [[0, 1], [2]])]), "expected integers"),
        (lambda: sc.Rule("weights", per_example=True), "act on weights, which all examples"),
        (lambda: sc.Rule("activations", where="fc", method="magnitude"), "looks at the norms of weights"),
    ],
)
def test_what_does_not_fit_is_refused(rule: object, message: str) -> None:
    net, x = Pair(), torch.randn(2, 3, 4)
    before = list(net.state_dict())
    with pytest.raises(sc.GateError, match=message):
        sc.attach(net, examples=(x,), gates=[rule()])  # type: ignore[operator]
    assert list(net.state_dict()) == before
    assert not net.fc._forward_hooks


def test_gates_along_two_dimensions_of_one_output_are_refused() -> None:
    net, x = Pair(), torch.randn(2, 3, 4)
    rules = [sc.Rule("activations", where="fc", dim=dim) for dim in (1, 2)]
    with pytest.raises(sc.GateError, match="along dimensions 1 and 2 of one output"):
        sc.attach(net, examples=(x,), gates=rules)
    assert not hasattr(net, "secateur_gates")


def test_an_output_of_another_shape_is_refused_where_it_comes() -> None:
    net, x = Pair(), torch.randn(2, 3, 4)
    sc.attach(net, examples=(x,), gates=[sc.Rule("activations", where="fc", dim=1)])
    net(torch.randn(7, 3, 4))
    with pytest.raises(sc.GateError, match=r"fc: returns \(2, 5, 4\), expected .* 3 positions along dimension 1"):
        net(torch.randn(2, 5, 4))


def test_detaching_leaves_the_model_as_it_was() -> None:
    net, _, pruner = made(sc.Rule("activations", where=("relu", "fc1")))
    assert net.relu._forward_hooks
    pruner.detach()
    assert not any(module._forward_hooks or module._buffers for module in net.modules())


class Shared(nn.Module):
    """One activation behind two layers."""

    def __init__(self, width: int = 8, residual: bool = False) -> None:
        super().__init__()
        self.inner, self.act, self.hidden = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, width)
        self.out, self.residual = nn.Linear(width, 3), residual

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.inner(x))
        return self.out(self.act(h + self.hidden(h) if self.residual else self.hidden(h)))


ACT = sc.Rule("activations", where="act")


@pytest.mark.parametrize(
    "rules",
    [
        [ACT, sc.Rule()],
        [sc.Rule(where="hidden"), ACT],
        [ACT, sc.Rule("inputs")],  # which take units with them that nothing reads any more
        [ACT, sc.Rule("weights")],
    ],
)
def test_calls_that_a_cut_would_leave_different_units_are_refused(rules: list[sc.Rule]) -> None:
    net, x = Shared().double(), torch.randn(5, 4, dtype=DTYPE)
    before = list(net.state_dict()), len(net.act._forward_hooks)
    with pytest.raises(
        sc.GateError, match=r"called several times .*: act: .* at one call and .* at another. Give each"
    ):
        sc.attach(net, examples=(x,), gates=rules)
    assert (list(net.state_dict()), len(net.act._forward_hooks)) == before


@pytest.mark.parametrize(
    ("residual", "rules"),
    [
        (False, [ACT]),  # nothing else is cut
        (True, [ACT, sc.Rule()]),  # both calls have the same units
        (False, [sc.Rule("activations", where="hidden"), sc.Rule(where="inner")]),  # one call
    ],
)
def test_a_module_that_is_called_twice_is_exact_where_it_is_not_refused(residual: bool, rules: list[sc.Rule]) -> None:
    torch.manual_seed(0)
    net, x = Shared(residual=residual).double(), torch.randn(5, 4, dtype=DTYPE)
    pruner = sc.attach(net, examples=(x[:2],), gates=rules)
    close(pruner, every=3)
    small, report = pruner.finalize()
    torch.testing.assert_close(small.eval()(x), net.eval()(x), rtol=0, atol=1e-12)
    assert report.difference_float64 < 1e-12


def test_calls_of_other_sizes_are_refused() -> None:
    net, x = Shared(width=6).double(), torch.randn(5, 4, dtype=DTYPE)
    with pytest.raises(sc.GateError, match="act: returns"):
        sc.attach(net, examples=(x,), gates=[ACT])
    assert not net.act._forward_hooks
