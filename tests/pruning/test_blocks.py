from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.pruning.draws import live_of
from secateur.structure.cut import CutPlan
from secateur.structure.zeros import Zeros

DTYPE = torch.float64


class Branch(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.norm = nn.LayerNorm(6) if norm else nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down(torch.sigmoid(self.up(x))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.branches = nn.ModuleList(Branch(norm) for norm in (False, True, False))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.head(x)


def made(*rules: sc.Rule, **more: object) -> tuple[Residual, Tensor, sc.Pruner]:
    net, x = Residual().double(), torch.randn(5, 3, dtype=DTYPE)
    gates = [sc.Rule("blocks", where=Branch), *rules]
    return net, x, sc.attach(net, examples=(x,), gates=gates, **more)  # type: ignore[arg-type]


def close(pruner: sc.Pruner, *closed: int) -> None:
    with torch.no_grad():
        log_alpha = pruner.gates.rules[0].log_alpha
        log_alpha.fill_(0.3)
        log_alpha[list(closed)] = -5.0


def test_a_unit_for_each_branch_at_all_that_makes_its_output() -> None:
    _, _, pruner = made()
    assert [(group.name, group.kind, group.size) for group in pruner.groups] == [
        (f"branches.{number}.block", "blocks", 1) for number in range(3)
    ]
    assert [[member.tensor for member in group.members] for group in pruner.groups[:2]] == [
        ["branches.0.down.weight", "branches.0.down.bias"],
        ["branches.1.norm.weight", "branches.1.norm.bias"],
    ]


def test_the_gate_multiplies_the_output_and_closed_ones_are_zero_with_their_gradient() -> None:
    net, x, _ = made()
    h = torch.randn(4, 6, dtype=DTYPE)
    z = torch.tensor([0.0, 0.5, 1.0, 1.0], dtype=DTYPE)
    net.eval()
    with live_of(net.secateur_gates).overridden(torch.ones(4, dtype=DTYPE)):
        plain = [branch(h) for branch in net.branches]
    with live_of(net.secateur_gates).overridden(z):
        for factor, branch, expected in zip(z, net.branches, plain, strict=False):
            torch.testing.assert_close(branch(h), factor * expected, rtol=0, atol=1e-14)
        assert torch.all(net.branches[0](h) == 0.0)
        net(x).square().sum().backward()
    for name, parameter in net.branches[0].named_parameters():
        assert torch.all(parameter.grad == 0.0), name


@pytest.mark.parametrize(
    "rules", [(), (sc.Rule(),), (sc.Rule(), sc.Rule("inputs", where="branches.0.*")), (sc.Rule("weights"),)]
)
@pytest.mark.parametrize("closed", [(0,), (1, 2), (0, 1, 2), ()])
def test_closed_branches_are_gone_and_the_rest_computes_the_same(
    rules: tuple[sc.Rule, ...], closed: tuple[int, ...], tmp_path: Path
) -> None:
    net, x, pruner = made(*rules)
    close(pruner, *closed)
    expected = net.eval()(x)
    exact = pruner.exact
    small, report = pruner.finalize()
    small.eval()
    torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-12)
    assert [isinstance(branch, Zeros) for branch in small.branches] == [number in closed for number in range(3)]
    assert report.difference_float64 < 1e-12
    assert sum(parameter.numel() for parameter in small.parameters()) == report.compact.params == exact.params
    assert report.compact.macs == exact.macs == sc.trace(small, (x,)).cost().macs
    assert sc.cut_of(small) == CutPlan.from_json(sc.cut_of(small).to_json())  # type: ignore[union-attr]
    sc.save(small, tmp_path / "small.safetensors")
    again = sc.load(tmp_path / "small.safetensors", Residual())
    assert torch.equal(again(x), small(x))


def test_a_budget_closes_branches() -> None:
    _, _, pruner = made(budget=sc.Budget(keep_params=0.5))
    close(pruner)
    small, report = pruner.finalize()
    assert report.compact.params <= 0.5 * report.dense.params
    assert report.flipped == sum(isinstance(branch, Zeros) for branch in small.branches) == 2


def test_expected_cost_is_that_of_independent_branches() -> None:
    _, _, pruner = made()
    chances = torch.tensor([0.2, 0.5, 0.9], dtype=DTYPE)
    own = [136.0, 148.0, 136.0]
    expected = 24 + 14 + sum(chance * size for chance, size in zip(chances, own, strict=True))
    found = pruner.costs.expected(pruner._units.chances(chances), "params")
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=DTYPE))


class Wrong(nn.Module):
    """Modules that are no branches."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Linear(6, 8))
        self.early = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid())
        self.bare = nn.Sequential(nn.ReLU())
        self.table = nn.Sequential(nn.Embedding(6, 6))
        self.one, self.other = nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 6))
        self.other[0].weight = self.one[0].weight

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.bare(x) + self.early(x) + self.one(x) + self.other(x)
        return self.wide(x + self.table(torch.zeros(1, dtype=torch.long)))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nowhere", "finds no module"),
        ("bare", "bare: it has no parameters"),
        ("table", r"table\.0, is a Embedding"),
        ("one", "are one tensor"),
        ("wide", "wide: does not return one tensor of the shape"),
        ("early", "early: with its gate at 0 its output is not zero"),
    ],
)
def test_modules_that_are_no_branches_are_refused(where: str | None, message: str) -> None:
    net, x = Wrong(), torch.randn(2, 6)
    before = list(net.state_dict())
    with pytest.raises(sc.GateError, match=message):
        sc.attach(net, examples=(x,), gates=[sc.Rule("blocks", where=where)])
    assert list(net.state_dict()) == before


def test_branches_that_the_trace_finds_need_no_name() -> None:
    net, x = Residual().double(), torch.randn(5, 3, dtype=DTYPE)
    pruner = sc.attach(net, examples=(x,), gates=[sc.Rule("blocks")])
    assert [group.name for group in pruner.groups] == [f"branches.{number}.block" for number in range(3)]
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(sc.GateError, match="found no module whose output is added"):
        sc.attach(plain, examples=(torch.randn(2, 3),), gates=[sc.Rule("blocks")])
