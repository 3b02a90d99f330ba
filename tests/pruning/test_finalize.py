from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.gated import DTYPE, ConvNet, Mlp, conv_net, conv_structure, images, mlp_structure
from tests.pruning.test_placement import Tied, gated, group, state_of
from torch import Tensor, nn

from secateur.budgets.budget import Budget
from secateur.compaction.compact import cut_of
from secateur.errors import BudgetError, CompactionError, GateError
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
from secateur.pruning.draws import GATES, gates_of
from secateur.pruning.finalize import baked, differences, pin
from secateur.pruning.placement import gated_sites
from secateur.pruning.pruner import Pruner
from secateur.pruning.rule import Rule
from secateur.structure.cut import cut_
from secateur.structure.example import Example
from secateur.structure.select import select_input_

BOTH = [Rule(), Rule(units="inputs", where=("stem", "fc*"))]
SIMPLE = [HardConcrete(init_open=0.5), ARM(init_open=0.5), DiffPrune(init_open=0.5), StraightThrough(init_open=0.5)]
METHODS = [*SIMPLE, DifferentiableSparsification(), DifferentiableSparsification(form="independent"), Magnitude()]


def scatter(net: nn.Module, spread: float = 2.0) -> None:
    """Some gates of a trained model: open, closed, between; and running statistics that are no longer 0 and 1."""
    with torch.no_grad():
        for parameter in gates_of(net).parameters():
            parameter.add_(spread * torch.randn_like(parameter))
        net.train()
        net(images(16))
    net.zero_grad()


def pruned(
    method: Method | None = None, dtype: torch.dtype = DTYPE, gates: list[Rule] | None = None
) -> tuple[ConvNet, Pruner]:
    torch.manual_seed(1)
    net = ConvNet().to(dtype)
    x = images().to(dtype)
    pruner = attach(net, structure=conv_structure(), examples=(x,), method=method, gates=gates)
    if dtype == DTYPE:
        scatter(net)
    return net, pruner


def outputs(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(net).eval()(x)


@pytest.mark.parametrize("rules", [None, BOTH], ids=["structured", "with inputs"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{type(method).__name__}")
def test_the_small_model_computes_what_the_gated_one_does(method: Method, rules: list[Rule] | None) -> None:
    net, pruner = pruned(method, gates=rules)
    x = images(5)
    before = outputs(net, x)
    small, report = pruner.finalize()
    assert type(small) is ConvNet
    assert not any(GATES in name or "parametrizations" in name for name, _ in small.named_modules())
    torch.testing.assert_close(outputs(small, x), before, rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs(net, x), before, rtol=0, atol=0)
    assert report.difference_float64 <= 1e-12
    assert sum(p.numel() for p in small.parameters()) == report.compact.params == pruner.exact.params
    assert report.flipped == 0
    assert report.gated == report.compact


def test_single_precision_differs_by_rounding_and_doubled_copies_by_less() -> None:
    torch.manual_seed(0)
    net = ConvNet()
    x = images(64).float()
    pruner = attach(net, structure=conv_structure(), examples=(x,), gates=BOTH)
    with torch.no_grad():
        for parameter in pruner.gates.parameters():
            parameter.add_(torch.randn_like(parameter))
    small, report = pruner.finalize()
    assert report.difference_float32 <= 1e-5
    assert report.difference_float64 <= 1e-12
    # What anybody finds who converts both models, not only the report: nothing is rounded anew.
    doubles = [copy.deepcopy(model).double().eval()(x.double()) for model in (net, small)]
    assert (doubles[0] - doubles[1]).abs().max() <= 1e-12
    assert pruner.gates.pinned is not None


def test_low_precision_models() -> None:
    net = ConvNet().to(torch.bfloat16)
    pruner = attach(
        net, structure=conv_structure(), examples=(images().bfloat16(),), method=HardConcrete(init_open=0.5)
    )
    with torch.no_grad():
        pruner.gates.rules[0].log_alpha.sub_(torch.linspace(-2, 4, 15))
    small, report = pruner.finalize()
    assert small.fc1.weight.dtype == torch.bfloat16
    assert report.difference_float64 <= 1e-12


def test_units_whose_consumers_are_all_closed_go_as_a_whole() -> None:
    _, pruner = pruned(gates=BOTH)
    with torch.no_grad():
        for rule in pruner.gates.rules:
            rule.log_alpha.fill_(4.0)
        pruner.gates.rules[1].log_alpha[2 + 36 : 2 + 36 + 3] = -4.0  # three of the five inputs of fc2
    small, report = pruner.finalize()
    assert small.fc1.out_features == 2
    assert type(small.fc2) is nn.Linear  # nothing is left to select there
    assert report.keep["fc1"].tolist() == [3, 4]
    assert report.widths["fc2.inputs"] == (2, 5)


def test_inputs_finer_than_their_unit_become_a_selection() -> None:
    net, pruner = pruned(gates=[Rule(units="inputs", where="fc1"), Rule()])
    keep = torch.tensor([0, 5, 9, 17, 30])
    with torch.no_grad():
        pruner.gates.rules[1].log_alpha.fill_(4.0)
        pruner.gates.rules[1].log_alpha[2] = -4.0  # the third channel, inputs 18 to 26
        pruner.gates.rules[0].log_alpha.fill_(-4.0)
        pruner.gates.rules[0].log_alpha[[*keep.tolist(), 20]] = 4.0
    x = images()
    expected = outputs(net, x)
    small, report = pruner.finalize()
    assert small.fc1.in_features == 5
    assert small.stem.out_channels == 3
    assert small.fc1.selected.tolist() == [0, 5, 9, 17, 21]  # of the 27 inputs that three channels make
    torch.testing.assert_close(outputs(small, x), expected, rtol=0, atol=1e-12)
    assert report.widths["fc1.inputs"] == (5, 36)
    # The plan alone rebuilds the same shapes from a fresh dense model.
    fresh = ConvNet().double()
    cut_(fresh, cut_of(small))
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(outputs(fresh, x), outputs(small, x))


def test_selections_of_inputs_are_part_of_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    _, pruner = pruned(gates=BOTH)
    small, report = pruner.finalize()
    assert report.proof is not None
    assert report.proof.relative <= 1e-12
    assert small.fc1.selected.numel() < report.widths["fc1.inputs"][1]

    def one_off(layer: nn.Module, selected: Tensor) -> None:
        select_input_(layer, (selected + 1) % (selected.max() + 1))

    monkeypatch.setattr("secateur.structure.cut.select_input_", one_off)
    with pytest.raises(CompactionError, match="differs by"):
        pruner.finalize()


class TestRounding:
    """Widths at multiples of four: closed units stay as zeros, and the report says the real sizes."""

    @pytest.mark.parametrize("rules", [None, BOTH], ids=["structured", "with inputs"])
    @pytest.mark.parametrize("in_place", [False, True])
    def test_the_function_is_the_same_and_the_counts_are_real(self, rules: list[Rule] | None, in_place: bool) -> None:
        torch.manual_seed(3)
        net = Wide().double()
        x = torch.randn(5, 6, dtype=DTYPE)
        pruner = attach(net, examples=(x,), method=HardConcrete(init_open=0.5), gates=rules)
        scatter_only(net)
        expected = outputs(net, x)
        n_open = pruner.exact.params
        small, report = pruner.finalize(round_to=4, in_place=in_place)
        torch.testing.assert_close(outputs(small, x), expected, rtol=0, atol=1e-12)
        assert report.difference_float64 <= 1e-12
        assert report.proof is not None
        assert report.compact.params == sum(p.numel() for p in small.parameters()) > n_open
        assert (small.fc1.out_features, small.fc2.out_features) == (report.widths["fc1"][0], report.widths["fc2"][0])
        assert all(layer.weight.shape[0] % 4 == 0 for layer in (small.fc1, small.fc2))
        assert all(layer.in_features % 4 == 0 for layer in (small.fc2, small.fc3))
        assert len(report.keep["fc1"]) == small.fc1.out_features
        assert report.flipped == 0

    @pytest.mark.parametrize("more", [["blocks"], ["weights"], ["blocks", "inputs"]], ids="+".join)
    @pytest.mark.parametrize("budget", [None, Budget(keep_params=0.6)], ids=["free", "budget"])
    def test_beside_other_kinds_of_units(self, more: list[str], budget: Budget | None) -> None:
        torch.manual_seed(2)
        net = Branched().double()
        x = torch.randn(5, 6, dtype=DTYPE)
        rules = [Rule(), *(Rule(units=kind, where="b?" if kind == "blocks" else None) for kind in more)]
        pruner = attach(net, examples=(x,), gates=rules, method=HardConcrete(init_open=0.5), budget=budget)
        scatter_only(net)
        small, report = pruner.finalize(round_to=4)
        torch.testing.assert_close(outputs(small, x), outputs(net, x), rtol=0, atol=1e-12)
        assert report.proof is not None
        assert budget is None or report.compact.params <= 0.6 * report.dense.params
        assert small.first.out_features % 4 == 0
        if "weights" not in more:
            assert report.compact.params == sum(p.numel() for p in small.parameters())

    def test_a_budget_is_met_with_rounded_widths(self) -> None:
        torch.manual_seed(0)
        net = Wide().double()
        x = torch.randn(5, 6, dtype=DTYPE)
        pruner = attach(net, examples=(x,), budget=Budget(keep_params=0.3))
        scatter_only(net)
        small, report = pruner.finalize(round_to=4)
        assert report.compact.params <= 0.3 * report.dense.params
        assert all(layer.weight.shape[0] % 4 == 0 for layer in (small.fc1, small.fc2))
        assert report.difference_float64 <= 1e-12
        _, plain = pruner.finalize()
        assert plain.compact.params > 0.28 * plain.dense.params
        with pytest.raises(BudgetError, match=r"round_to=16: with widths rounded up.* raise the budget"):
            pruner.finalize(round_to=16)
        pruner.finalize()  # nothing is broken by that


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 20), nn.Linear(20, 32), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.sigmoid(self.fc2(torch.sigmoid(self.fc1(x)))))


class Branched(nn.Module):
    """A residual stream with two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 20), nn.Linear(20, 3)
        self.b1, self.b2 = (nn.Sequential(nn.Linear(20, 30), nn.Sigmoid(), nn.Linear(30, 20)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.b1(x)
        return self.last(x + self.b2(x))


def scatter_only(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in gates_of(net).parameters():
            parameter.add_(3.0 * torch.randn_like(parameter))


@pytest.mark.parametrize("rules", [None, BOTH], ids=["structured", "with inputs"])
def test_everything_closed_leaves_one_unit_each_that_feeds_nothing(rules: list[Rule] | None) -> None:
    net, pruner = pruned(gates=rules)
    with torch.no_grad():
        for rule in pruner.gates.rules:
            rule.log_alpha.fill_(-4.0)
    x = images()
    expected = outputs(net, x)
    small, report = pruner.finalize()
    torch.testing.assert_close(outputs(small, x), expected, rtol=0, atol=1e-14)
    assert (small.fc1.out_features, small.inner.out_channels, small.stem.out_channels) == (1, 1, 1)
    assert report.compact.params == sum(p.numel() for p in small.parameters()) == pruner.costs.least.params
    assert all(kept.tolist() == [0] for kept in report.keep.values())


def test_in_place_cuts_the_model_itself() -> None:
    net, pruner = pruned(gates=BOTH)
    x = images()
    expected = outputs(net, x)
    small, report = pruner.finalize(in_place=True)
    assert small is net
    assert not gated_sites(net)
    torch.testing.assert_close(outputs(net, x), expected, rtol=0, atol=1e-12)
    assert sum(p.numel() for p in net.parameters()) == report.compact.params
    assert cut_of(net) is not None
    assert not net._forward_pre_hooks


def test_marks_of_parameters_stay() -> None:
    net = ConvNet().to(DTYPE)
    for name, parameter in net.named_parameters():
        parameter.named = name  # type: ignore[attr-defined]
    pruner = attach(net, structure=conv_structure(), examples=(images(),), gates=BOTH)
    scatter(net)
    small, _ = pruner.finalize()
    assert all(getattr(parameter, "named", "") == name for name, parameter in small.named_parameters())


def test_finalizing_twice_and_after_more_training() -> None:
    net, pruner = pruned()
    x = images()
    first, _ = pruner.finalize()
    again, _ = pruner.finalize()
    assert torch.equal(outputs(first, x), outputs(again, x))
    with torch.no_grad():
        pruner.gates.rules[0].log_alpha.add_(1.0)
    assert torch.equal(outputs(net, x), outputs(net, x))
    torch.testing.assert_close(outputs(net, x), outputs(first, x), rtol=0, atol=1e-12)  # still what was cut
    pruner.step()  # training goes on
    assert not torch.allclose(outputs(net, x), outputs(first, x))
    third, _ = pruner.finalize()
    torch.testing.assert_close(outputs(net, x), outputs(third, x), rtol=0, atol=1e-12)


def test_mode_and_examples_of_the_small_model() -> None:
    net, pruner = pruned()
    net.eval()
    net.bn1.train()
    small, _ = pruner.finalize()
    assert [m.training for m in (small, small.bn1, small.bn2)] == [False, True, False]


def test_without_examples_the_first_training_batch_proves() -> None:
    torch.manual_seed(0)
    net = ConvNet().double()
    pruner = attach(net, structure=conv_structure())
    _, report = pruner.finalize()
    assert math.isnan(report.difference_float32)
    assert report.proof is None
    assert "not measured" in str(report)
    net.eval()(images())
    assert math.isnan(pruner.finalize()[1].difference_float32)
    net.train()(images(6))
    _, report = pruner.finalize()
    assert report.difference_float64 <= 1e-12
    assert report.proof is not None
    _, report = pruner.finalize(examples=(images(3),))
    assert report.difference_float64 <= 1e-12


@pytest.mark.parametrize("shape", [(3,), (7, 3), (5, 7, 3)])
def test_inputs_whose_rows_are_no_examples_prove_as_a_whole(shape: tuple[int, ...]) -> None:
    net = Mlp()
    pruner = attach(net, structure=mlp_structure())
    x = torch.randn(shape)
    net(x)
    x.zero_()  # what was noted is a copy
    _, report = pruner.finalize()
    assert report.proof is not None
    assert report.difference_float64 <= 1e-12
    (used,) = pruner._proof_examples(None)
    assert used.args[0].any()
    assert used.args[0].shape == (shape if len(shape) == 1 else (2, *shape[1:]))


def test_noted_inputs_that_prove_nothing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.pruning.draws.NOTED_BYTES", 8)  # so that of large ones the first rows are left
    net = Mlp()
    pruner = attach(net, structure=mlp_structure())
    net(torch.randn(3))
    with pytest.raises(GateError, match=r"first training forward, \(float32 \(2,\)\): RuntimeError.*examples="):
        pruner.finalize()
    assert pruner.gates.pinned is None
    assert pruner.finalize(examples=(torch.randn(3),))[1].proof is not None


class OwnPrecision(Mlp):
    """Computes in float32 whatever it is converted to."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def test_a_model_that_does_not_run_in_float64_is_reported_as_not_measured() -> None:
    net = OwnPrecision()
    x = torch.randn(4, 3)
    pruner = attach(net, structure=mlp_structure(), examples=(x,))
    small, report = pruner.finalize()
    assert report.difference_float32 <= 1e-6
    assert math.isnan(report.difference_float64)
    assert isinstance(small, OwnPrecision)


def test_tied_weights_are_folded_once_and_stay_tied() -> None:
    net = Tied().double()
    gates = gated(net, [group("units", ("embed.weight", 1, [[0], [1], [2], [3]]))])
    pin(net, torch.tensor([0.5, 0.0, 1.0, 0.25], dtype=DTYPE))
    plain = baked(net)
    assert plain.embed.weight is plain.decode.weight
    assert torch.equal(plain.embed.weight, net.embed.parametrizations.weight.original * gates.pinned)
    tokens = torch.arange(7)
    assert torch.equal(plain.eval()(tokens), net.eval()(tokens))


def test_baking_leaves_the_gated_model_alone() -> None:
    net, gates = conv_net()
    before = state_of(net)
    plain = baked(net)
    assert state_of(net) == before
    assert gates_of(net) is gates
    assert [type(m) for m in plain.modules()] == [type(m) for m in ConvNet().modules()]
    assert not plain._forward_pre_hooks
    assert not any(m._load_state_dict_pre_hooks for m in plain.modules())


def test_differences_are_found() -> None:
    torch.manual_seed(0)
    net = Mlp()
    x = torch.randn(4, 3)
    pruner = attach(net, structure=mlp_structure(), examples=(x,))
    units, is_open, calls = pruner._units, torch.ones(6, dtype=torch.bool), [Example((x,))]
    pin(net, torch.ones(6))
    small = baked(net)
    assert differences(net, small, units, is_open, calls) == (0.0, 0.0)
    with torch.no_grad():
        small.fc2.bias.add_(torch.tensor([0.0, 0.5]))
    assert differences(net, small, units, is_open, calls) == pytest.approx((0.5, 0.0))
    is_open[0] = False  # a unit that is not closed
    net.eval()
    wrong = abs(net.fc2.weight[:, 0] * torch.sigmoid(net.fc1(x))[:, :1]).max().item()
    with pytest.raises(CompactionError, match=rf"gated model and what was cut .* differs by {wrong:.3g} from"):
        differences(net, small, units, is_open, calls)
    assert all(math.isnan(value) for value in differences(net, small, units, is_open, ()))


class Masked(Mlp):
    """Logits of which one is masked."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.tensor([0.0, -math.inf], dtype=x.dtype)


def test_a_masked_logit_hides_no_difference() -> None:
    torch.manual_seed(0)
    net, x = Masked(), torch.randn(4, 3)
    pruner = attach(net, structure=mlp_structure(), examples=(x,))
    calls = [Example((x,))]
    pin(net, torch.ones(6))
    small = baked(net)
    is_open = torch.ones(6, dtype=torch.bool)
    assert differences(net, small, pruner._units, is_open, calls) == (0.0, 0.0)
    with torch.no_grad():
        small.fc2.bias[0] += 0.5
    assert differences(net, small, pruner._units, is_open, calls) == pytest.approx((0.5, 0.0))
    with torch.no_grad():
        small.fc2.bias[0] = math.nan
    assert differences(net, small, pruner._units, is_open, calls) == (math.inf, 0.0)


class Stream(nn.Module):
    """A residual stream that two RMSNorms average over: units must be closed where they arise."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Linear(3, 6), nn.RMSNorm(6, eps=1e-6)
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6)
        self.last, self.out = nn.RMSNorm(6, eps=1e-6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.down(torch.sigmoid(self.up(self.first(h))))
        return self.out(self.last(h))


def test_rescaled_norms_are_exact_in_the_precision_they_are_cut_in() -> None:
    torch.manual_seed(0)
    net = Stream()
    x = torch.randn(4, 3)
    pruner = attach(net, examples=(x,), method=HardConcrete(init_open=0.5))
    assert {group.name for group in pruner.groups} == {"embed", "up"}
    with torch.no_grad():
        pruner.gates.rules[0].log_alpha.copy_(torch.tensor([-4.0, 4.0, 0.0, 1.0, -4.0, 2.0, 4.0, 4.0, -4.0, 0.5, 1.0]))
    small, report = pruner.finalize()
    assert (small.embed.out_features, small.up.out_features) == (4, 4)
    assert report.difference_float32 <= 1e-6
    assert report.difference_float64 <= 1e-14


def test_a_failed_proof_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    net, pruner = pruned()
    x = images()
    expected = outputs(net, x)

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("secateur.pruning.pruner.proved", fail)
    with pytest.raises(ZeroDivisionError):
        pruner.finalize(in_place=True)
    assert pruner.gates.pinned is None
    assert torch.equal(outputs(net, x), expected)


@pytest.mark.parametrize("in_place", [False, True])
def test_gates_that_are_folded_wrongly_are_found(monkeypatch: pytest.MonkeyPatch, in_place: bool) -> None:
    torch.manual_seed(0)
    net, x = Mlp(), torch.randn(4, 3)
    pruner = attach(net, structure=mlp_structure(), examples=(x,), gates=[Rule("activations", where="fc1")])
    expected = outputs(net, x)
    monkeypatch.setattr("secateur.pruning.finalize.fold_", lambda plain, gated: None)  # and so to the proof, too
    with pytest.raises(CompactionError, match="gated model and what was cut from it are not the same"):
        pruner.finalize(in_place=in_place)
    assert pruner.gates.pinned is None
    assert torch.equal(outputs(net, x), expected)


def test_the_report_is_one_table() -> None:
    _, pruner = pruned(gates=BOTH)
    _, report = pruner.finalize()
    lines = str(report).splitlines()
    assert lines[0].split() == ["parameters", "share", "MACs", "share"]
    assert [line.split()[0] for line in lines[1:4]] == ["dense", "gated", "compact"]
    assert f"{report.dense.params:,}" in lines[1]
    assert "100.00%" in lines[1]
    assert lines[-1].startswith("units kept: stem ")
    with pytest.raises(AttributeError):
        report.flipped = 3


def test_a_model_that_was_converted_after_attach_is_proven_on_converted_examples() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    pruner = attach(net, examples=(torch.randn(2, 4),))
    net.to(torch.bfloat16)
    small, report = pruner.finalize()
    assert next(small.parameters()).dtype == torch.bfloat16
    assert report.proof is not None


def test_a_report_says_where_gates_had_not_come_to_the_budget() -> None:
    net = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 3))
    pruner = attach(net, examples=(torch.randn(2, 4),), budget=Budget(keep_params=0.5))
    _, report = pruner.finalize()
    assert report.flipped
    assert "points of the dense cost away from the budget" in str(report)
