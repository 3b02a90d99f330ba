"""The gates of the experiments: what differs by group, and what a budget bounds."""

import pytest
import torch
from tests.recipes.papers.conftest import squares

from secateur.pruning.pruner import Pruner
from secateur.recipes.papers.attached import attached
from secateur.recipes.papers.experiments import recipe_of
from secateur.recipes.papers.recipe import Job
from secateur.recipes.task import fresh


def pruner_of(experiment: str, name: str, method: str) -> Pruner:
    recipe = recipe_of(experiment, name)
    images = squares((1, 28, 28), n=120, n_test=20)
    return attached(Job(recipe, method, recipe.points[0], 0), fresh(recipe.net, 0), images)


def chances(pruner: Pruner) -> dict[str, float]:
    """The mean open chance of every group at the start."""
    each = pruner.gates.prob_open().detach().split([group.size for group in pruner.groups])
    return {group.name: chance.mean().item() for group, chance in zip(pruner.groups, each, strict=True)}


@pytest.mark.parametrize("method", ["hard-concrete", "arm", "ar", "diffprune"])
def test_dear_feature_maps_start_as_good_as_surely_open(method: str):
    found = chances(pruner_of("mnist-lenet5", "ours", method))
    assert found.pop("conv2") >= 0.985
    assert found == pytest.approx(dict.fromkeys(("conv1", "fc1", "fc1.inputs"), 0.9), abs=0.01)


def test_the_paper_recipe_starts_pixels_by_a_drop_rate_of_their_own():
    found = chances(pruner_of("mnist-mlp", "paper", "arm"))
    assert found == pytest.approx({"fc1.inputs": 0.8, "fc1": 0.5, "fc2": 0.5}, abs=0.01)


def test_the_hidden_layer_has_a_bound_of_its_own_but_where_nothing_steers_to_it():
    recipe = recipe_of("mnist-lenet5", "ours")
    budgets = {name: Job(recipe, name, recipe.points[0], 0).budget(100) for name in ("arm", "magnitude")}
    assert {name: dict(budget.per) for name, budget in budgets.items() if budget is not None} == {
        "arm": {"fc1": {"keep_units": 0.03}},
        "magnitude": {},
    }
    pruner = pruner_of("mnist-lenet5", "ours", "magnitude")
    assert torch.equal(pruner.gates.prob_open(), torch.ones(sum(group.size for group in pruner.groups)))


def test_magnitude_pruning_ends_within_its_budget_where_inputs_are_chosen_with_their_maps():
    recipe = recipe_of("mnist-lenet5", "ours")
    job = Job(recipe, "magnitude", recipe.points[0], 0)
    net = fresh(recipe.net, 0)
    maps = torch.logspace(0, 3, net.conv2.out_channels)
    with torch.no_grad():
        net.conv2.weight.normal_().mul_(maps[:, None, None, None])
        net.fc1.weight.normal_().mul_(maps.repeat_interleave(net.fc1.in_features // len(maps)))
    pruner = attached(job, net, squares((1, 28, 28), n=120, n_test=20))
    budget = job.budget(job.phase("gated").steps(120))
    for _ in range(sum(budget.schedule)):
        pruner.gates.constrain_()
    (limit,) = budget.targets(pruner.costs.dense).values()
    assert 0.9 * limit <= pruner.exact.params <= limit
