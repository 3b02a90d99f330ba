"""What a user can say about size, and what is refused, with the message that helps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.polynomials import Polynomials, chain, convolutional, group

from secateur.budgets.budget import Budget, feasible, project
from secateur.budgets.costs import CostModel, Kind
from secateur.budgets.penalty import Penalty
from secateur.errors import BudgetError
from secateur.structure.groups import Axis, Cost, Frozen, Term

DENSE = Cost(params=1000, macs=50_000)
TIMED = Cost(params=1000, macs=50_000, latency=2_000_000)


def timed() -> Polynomials:
    """Ten units that take 3,000.7 ns each beside 10,000.25 ns that stay, 40,007 ns in all."""
    structure = Polynomials((group(10, "hidden"),), (Axis(0, ((0, 1),)),), (Term(7.0, (0,), "fc.weight"),), ())
    return replace(structure, latency_terms=(Term(10_000.25, (), "stem"), Term(3000.7, (0,), "fc")))


@pytest.mark.parametrize(
    ("budget", "targets"),
    [
        (Budget(keep_params=0.1), {"params": 100}),
        (Budget(keep_params=1.0), {"params": 1000}),
        (Budget(keep_params=1), {"params": 1000}),
        (Budget(keep_params=250), {"params": 250}),
        (Budget(keep_macs=0.3), {"macs": 15_000}),
        (Budget(keep_params=0.2, keep_macs=9999), {"params": 200, "macs": 9999}),
        (Budget(keep_params=0.0019), {"params": 1}),
        (Budget(latency=0.25), {"latency": 500_000}),
        (Budget(latency_ms=1.5), {"latency": 1_500_000}),
        (Budget(latency_ms=2), {"latency": 2_000_000}),
        (Budget(keep_macs=0.3, latency=1), {"macs": 15_000, "latency": 2_000_000}),
    ],
)
def test_targets_are_shares_or_numbers(budget: Budget, targets: dict[Kind, int]) -> None:
    assert budget.targets(TIMED) == targets


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latency": 1.5}, r"latency=1.5, expected a share in \(0, 1\]; for milliseconds say latency_ms="),
        ({"latency": True}, "latency=True"),
        ({"latency_ms": 0.0}, "latency_ms=0.0, expected milliseconds, over 0"),
        ({"latency_ms": math.inf}, "latency_ms=inf"),
        ({"latency": 0.5, "latency_ms": 1.0}, "both say the latency"),
    ],
)
def test_wrong_latencies_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**settings)


def test_a_latency_needs_a_model_of_it() -> None:
    with pytest.raises(BudgetError, match=r"the structure has none; measure it by .*sc\.latency_model"):
        Budget(latency=0.5).targets(DENSE)
    with pytest.raises(BudgetError, match=r"the structure has none; measure it by .*sc\.latency_model"):
        Penalty(0.1, unit="density", kind="latency").start(CostModel(replace(timed(), latency_terms=())))
    with pytest.raises(BudgetError, match="latency_ms=3, but the dense model has only 2 ms as predicted"):
        Budget(latency_ms=3).targets(TIMED)


def test_a_latency_is_met_as_other_costs_are() -> None:
    costs = CostModel(timed())
    assert (costs.dense, costs.least) == (Cost(70, 0, 40_007), Cost(7, 0, 13_001))
    scores, everything = torch.arange(10.0), torch.ones(10, dtype=torch.bool)
    found = project(costs, scores, everything, Budget(latency=0.5))
    assert found.tolist() == [False] * 7 + [True] * 3
    assert costs.exact(found) == Cost(21, 0, 19_002)
    chances = torch.full((10,), 0.5, dtype=torch.float64, requires_grad=True)
    value = Penalty(2.0, unit="density", kind="latency").start(costs).loss(chances)
    assert value.item() == pytest.approx(2.0 * (10_000.25 + 5 * 3000.7) / 40_007)
    controller = Budget(latency_ms=0.02, steps=1, hold=0, ramp=0).start(costs)
    for _ in range(3):
        controller.step(chances.detach(), everything, scores=scores)
    (pull,) = torch.autograd.grad(controller.loss(chances), chances)
    assert (pull[:7] > pull[7:].max()).all()
    assert controller.exact.latency == 40_007
    with pytest.raises(BudgetError, match=r"0\.01 ms latency .* cannot be reached: .* 0\.013 ms remain .* in stem"):
        Budget(latency_ms=0.01).start(costs)


def test_counts_stay_whole_beside_a_fractional_latency() -> None:
    large = Polynomials((group(3, "g"),), (Axis(1, ((0, 2**40),)),), (Term(3.0, (0,), "w"),), ())
    assert CostModel(replace(large, latency_terms=(Term(0.3, (0,), "w"),))).dense.params == 3 * (3 * 2**40 + 1)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.5, 0, -3, math.nan, math.inf, True, "0.1"])
def test_values_that_are_neither_are_refused(keep: Any) -> None:
    with pytest.raises(BudgetError, match=r"expected a share in \(0, 1\] or an absolute number"):
        Budget(keep_params=keep)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per": {"0": 0.5}}, r"per\['0'\]=0.5, expected sizes, for example {'keep_macs': 0.5}"),
        ({"per": 0.5}, r"per=0.5, expected sizes by part"),
        ({"keep_params": 0.5, "slack": "a"}, r"slack='a', expected a share of the dense cost in \[0, 1\]"),
        ({"keep_params": 0.5, "control": 3}, "control=3, expected a secateur.budgets.control.Control"),
    ],
)
def test_settings_of_another_kind_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**settings)


def test_a_budget_needs_a_target() -> None:
    with pytest.raises(BudgetError, match="no target"):
        Budget()


def test_all_problems_come_at_once() -> None:
    with pytest.raises(BudgetError) as caught:
        Budget(keep_params=2.5, keep_macs=-1.0, steps=0, hold=1.5, ramp=-2, slack=2.0)
    for part in ("keep_params=2.5", "keep_macs=-1.0", "steps=0", "hold=1.5", "ramp=-2", "slack=2.0"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "schedule"),
    [
        ({}, (50, 250)),
        ({"steps": 2000}, (200, 1000)),
        ({"steps": 2000, "hold": 30, "ramp": 100}, (30, 100)),
        ({"steps": 100, "hold": 0.0, "ramp": 1.0}, (0, 100)),
        ({"hold": 10, "ramp": 7}, (10, 7)),
    ],
)
def test_schedules_are_fractions_or_steps(settings: dict[str, Any], schedule: tuple[int, int]) -> None:
    assert Budget(keep_params=0.5, **settings).schedule == schedule


def test_a_schedule_longer_than_the_training_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"hold \+ ramp = 50 \+ 60 steps, but the training has 100"):
        Budget(keep_params=0.5, steps=100, hold=50, ramp=60)


def test_numbers_above_the_dense_cost_are_refused() -> None:
    assert Budget(keep_params=1000).targets(DENSE) == {"params": 1000}
    with pytest.raises(BudgetError, match="keep_params=1001, but the dense model has only 1000"):
        Budget(keep_params=1001).targets(DENSE)


def test_targets_out_of_reach_say_what_is_least_and_what_stays() -> None:
    structure = Polynomials(
        (group(10, "hidden"),),
        (Axis(0, ((0, 1),)),),
        (Term(1.0, (0,), "fc.weight"), Term(60.0, (), "head.weight"), Term(30.0, (), "stem.weight")),
        (),
        frozen=(
            Frozen("stem.weight", 0, 5, "something else"),
            Frozen("head.weight", 0, 6, "it is a model output", "aten.addmm", "head"),
        ),
    )
    costs = CostModel(structure)
    assert Budget(keep_params=91).start(costs).target == {"params": 91}
    with pytest.raises(BudgetError) as caught:
        Budget(keep_params=0.5, keep_macs=0.5).start(costs)
    message = str(caught.value)
    assert "50 params (50.000% of 100) cannot be reached" in message
    assert "91 remain (91.000%)" in message
    assert "most of them in head.weight (it is a model output)" in message


def test_targets_out_of_reach_of_the_units_that_have_gates() -> None:
    costs = CostModel(chain([8, 10, 6]))
    closed = costs.exact(torch.cat([torch.zeros(8), torch.ones(16)]).bool())
    assert feasible(costs, {"params": closed.params}, closed) == {"params": closed.params}
    with pytest.raises(BudgetError) as caught:
        feasible(costs, {"params": closed.params - 1}, closed)
    for part in (f"{closed.params - 1} params", "cannot be reached by the units that have gates", "gate more groups"):
        assert part in str(caught.value)


def test_an_equal_choice_of_budget_starts_an_equal_controller() -> None:
    controller = Budget(keep_params=0.5, keep_macs=0.25, equality=False, steps=100).start(CostModel(convolutional()))
    dense = controller.costs.dense
    assert controller.target == {"params": dense.params // 2, "macs": dense.macs // 4}
    assert (controller.hold, controller.ramp, controller.equality) == (10, 50, False)
    assert controller.expected == controller.exact == dense


def test_projection_by_budget_and_by_number() -> None:
    costs = CostModel(chain([8, 10, 6]))
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(24, generator=generator)
    everything = torch.ones(24, dtype=torch.bool)
    found = project(costs, scores, everything, Budget(keep_params=0.4))
    limit = int(0.4 * costs.dense.params)
    assert limit - 16 < costs.exact(found).params <= limit
    assert torch.equal(project(costs, scores, everything, {"params": limit}), found)
    both = Budget(keep_params=0.4, keep_macs=0.1)
    assert costs.exact(project(costs, scores, everything, both)).macs <= 0.1 * costs.dense.macs
    with pytest.raises(BudgetError, match="cannot be reached"):
        project(costs, scores, everything, Budget(keep_params=0.001))
    with pytest.raises(BudgetError, match="cannot be reached"):
        project(costs, scores, everything, {"params": 1})


def test_projection_leaves_what_an_upper_bound_allows_and_what_slack_covers() -> None:
    costs = CostModel(chain([10, 10, 10]))
    scores = torch.linspace(0.0, 1.0, 30)
    few = scores > 0.9
    few[[0, 10]] = True
    assert torch.equal(project(costs, scores, few, Budget(keep_params=0.5, equality=False)), few)
    assert torch.equal(project(costs, scores, few, Budget(keep_params=0.5, slack=1.0)), few)
    assert costs.exact(project(costs, scores, few, Budget(keep_params=0.5))).params > 90
