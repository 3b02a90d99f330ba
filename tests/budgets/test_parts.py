"""Sizes of parts: what is counted, that each part and the whole end where they were asked to, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.polynomials import chain, convolutional
from torch import nn

import secateur as sc
from secateur.budgets.budget import Budget, project
from secateur.budgets.costs import CostModel
from secateur.budgets.parts import Part
from secateur.errors import BudgetError

MACS, PARAMS, UNITS = Part("conv2", "macs"), Part("conv1", "params"), Part("conv2", "units")


def counted(*parts: Part) -> CostModel:
    return CostModel(convolutional(), parts)


def test_parts_are_counted_beside_the_whole() -> None:
    costs = counted(MACS, PARAMS, UNITS)
    assert list(costs.rows) == ["params", "macs", "latency", "macs of conv2", "params of conv1", "units of conv2"]
    assert costs.dense.of("macs of conv2") == 9 * 64 * 4 * 5
    assert costs.dense.of("params of conv1") == 28 * 4
    cut = costs.exact(torch.tensor([True, True, False, False, True, True, False, False, False]))
    assert dict(cut.parts) == {"macs of conv2": 9 * 64 * 2 * 2, "params of conv1": 28 * 2, "units of conv2": 2}


def test_expected_parts_and_their_slopes_are_those_of_autograd() -> None:
    costs = counted(MACS, PARAMS, UNITS)
    chances = torch.linspace(0.1, 0.9, 9, dtype=torch.float64, requires_grad=True)
    first, second = chances[:4].sum(), chances[4:].sum()
    naive = {"macs of conv2": 9 * 64 * first * second, "params of conv1": 28 * first, "units of conv2": second}
    for name, wanted in naive.items():
        got = costs.expected(chances, name)
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(x, chances, retain_graph=True)[0] for x in (got, wanted)))


@settings(max_examples=40)
@given(
    widths=st.lists(st.integers(2, 9), min_size=4, max_size=5),
    shares=st.tuples(*[st.floats(0.3, 1.0)] * 2),
    opening=st.floats(0.0, 1.0),
    seed=st.integers(0, 99),
)
def test_a_projection_keeps_every_part_and_the_whole_within(
    widths: list[int], shares: tuple[float, float], opening: float, seed: int
) -> None:
    structure = chain(widths)
    budget = Budget(keep_params=shares[0], per={"fc1": {"keep_params": shares[1]}, "g0": {"keep_units": shares[0]}})
    costs = CostModel(structure, budget.parts)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(costs.total, generator=generator, dtype=torch.float64)
    is_open = torch.rand(costs.total, generator=generator) < opening
    targets = budget.targets(costs.dense)
    try:
        found = project(costs, scores, is_open, budget)
    except BudgetError:
        return
    after = costs.exact(found)
    assert all(after.of(name) <= limit for name, limit in targets.items())


def test_only_units_of_the_part_close_for_it() -> None:
    costs = CostModel(chain([4, 4, 4, 4]), (Part("g1", "units"),))
    scores = torch.arange(16.0)
    found = project(costs, scores, torch.ones(16, dtype=torch.bool), {"units of g1": 2})
    assert (~found).nonzero().flatten().tolist() == [4, 5]


def test_where_a_part_is_full_the_whole_is_filled_up_elsewhere() -> None:
    budget = Budget(keep_params=0.5, per={"g1": {"keep_units": 0.25}})
    costs = CostModel(chain([4, 8, 4, 4]), budget.parts)
    is_open = torch.zeros(costs.total, dtype=torch.bool)
    is_open[[0, 4, 12, 16]] = True
    # The closed units of the part have the highest scores, and yet it is the others that open.
    scores = torch.zeros(costs.total).index_fill(0, torch.arange(4, 12), 9.0)
    found = project(costs, scores, is_open, budget)
    assert costs.n_open(found).tolist() == [4, 2, 4, 4]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(x))


def test_training_brings_a_part_and_the_whole_to_their_sizes() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(64, 6)
    y = x[:, :3].argmax(1)
    budget = Budget(keep_params=0.5, per={"head.0": {"keep_units": 0.2}}, steps=300)
    pruner = sc.attach(model, examples=(x[:2],), budget=budget)
    optimizer = torch.optim.Adam(pruner.param_groups(lr=3e-3, gate_lr=5e-2))
    for _ in range(300):
        pruner.loss(lambda: nn.functional.cross_entropy(model(x), y)).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    dense, before = pruner.costs.dense, pruner.exact
    for name, share in (("units of head.0", 0.2), ("params", 0.5)):
        assert before.of(name) / dense.of(name) == pytest.approx(share, rel=0.1)
    small, report = pruner.finalize()
    assert small.head[0].out_features == report.compact.of("units of head.0") == 12
    assert 0.48 * dense.params <= report.compact.params <= 0.5 * dense.params


def test_the_state_of_a_run_with_parts_round_trips() -> None:
    budget = Budget(keep_params=0.5, per={"fc1": {"keep_params": 0.5}})
    costs = CostModel(chain([4, 8, 4, 4]), budget.parts)
    first, second = budget.start(costs), budget.start(costs)
    chances = torch.linspace(0.2, 0.9, costs.total)
    for _ in range(5):
        first.step(chances, chances > 0.5)
    second.load_state_dict(first.state_dict())
    assert second.state_dict().keys() == first.state_dict().keys()
    assert (second.expected, second.exact) == (first.expected, first.exact)


@pytest.mark.parametrize(
    ("per", "message"),
    [
        ({"conv9": {"keep_macs": 0.5}}, "no module with macs named 'conv9'"),
        ({"conv": {"keep_units": 0.5}}, "no group of units named 'conv'; there are, for example: conv"),
        ({"conv2": {"keep_macs": 0.0001}}, "cannot be reached"),
        ({"conv2": {"keep_params": 10_000}}, "dense model has only"),
    ],
)
def test_parts_that_do_not_fit_the_model_are_refused(per: dict[str, dict[str, float]], message: str) -> None:
    budget = Budget(per=per)
    with pytest.raises(BudgetError, match=message):
        budget.start(CostModel(convolutional(), budget.parts))


@pytest.mark.parametrize("per", [{"a": {}}, {"a": {"keep": 0.5}}, {"a": {"keep_units": 0}}, {"a": {"keep_macs": 1.5}}])
def test_sizes_of_parts_are_checked(per: dict[str, dict[str, float]]) -> None:
    with pytest.raises(BudgetError, match=r"per\['a'\]"):
        Budget(keep_params=0.5, per=per)


def test_a_part_that_contradicts_the_whole_is_refused() -> None:
    budget = Budget(keep_params=60, per={"fc0": {"keep_params": 64}})
    with pytest.raises(BudgetError, match="one contradicts the other"):
        budget.start(CostModel(chain([8, 8, 8]), budget.parts))


def test_a_budget_with_parts_says_when_they_were_not_counted() -> None:
    with pytest.raises(BudgetError, match="not counted here"):
        Budget(per={"fc0": {"keep_params": 0.5}}).start(CostModel(chain([8, 8, 8])))
