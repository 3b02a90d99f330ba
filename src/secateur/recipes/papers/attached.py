"""The gates of an experiment, put into its network."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.pruning.pruner import Pruner
from secateur.recipes.images import Images
from secateur.recipes.networks import network
from secateur.recipes.papers.recipe import Job, Recipe

__all__ = ["attached"]

#: Halvings in the search for the share of units that meets a budget.
HALVINGS = 12


def attached(job: Job, model: nn.Module, images: Images) -> Pruner:
    """The model with the gates of a job: on all groups, and on single inputs where the papers' tables count them.

    Args:
        job: says method, settings and size.
        model: not gated yet; gates are put into it.
        images: what it trains on; their number says how long the budget has.
    """
    recipe, example = job.recipe, images.x[:1]
    budget = job.budget(job.phase("gated").steps(len(images.y)))
    settings, own = recipe.made_with(job.method)
    if job.method == "magnitude":
        settings |= _closing(job, model, example, len(images.y))
    rules = _rules(recipe, job.method, settings, own)
    l2 = sc.ActivityL2(recipe.weight_decay, into_gates=True) if recipe.weight_decay else None
    return sc.attach(model, examples=(example,), gates=rules, budget=budget, l2=l2, seed=job.seed)


def _rules(
    recipe: Recipe, method: str, settings: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]]
) -> list[sc.Rule]:
    """One rule for all groups but those with settings of their own, one for each of these, one for single inputs."""

    def made(group: str) -> sc.Method:
        return sc.method_from_name(method, **{**settings, **own.get(group, {})})

    apart = tuple(group for group in own if group != "inputs")
    rules = [sc.Rule(where=recipe.units, exclude=apart or None, method=made(""))]
    rules += [sc.Rule(where=group, method=made(group)) for group in apart]
    if inputs := network(recipe.net).inputs:
        rules.append(sc.Rule("inputs", where=inputs, method=made("inputs")))
    return rules


def _closing(job: Job, model: nn.Module, example: Tensor, n: int) -> dict[str, float | int]:
    """The schedule of magnitude pruning that ends near the budget: the same share of every group closes.

    The share is the one at which the network meets the budget where single inputs lie in feature maps that are open, as
    most do that have the largest weights after a training; what differs is for the projection at the end.
    """
    budget = job.budget(job.phase("gated").steps(n))
    assert budget is not None  # it has no paper recipe
    costs = sc.attach(copy.deepcopy(model), examples=(example,), gates=_rules(job.recipe, "magnitude", {}, {})).costs
    limits = budget.targets(costs.dense)
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        share = (low + high) / 2
        cost = costs.exact(torch.cat([torch.arange(size) >= int(share * size) for size in costs.sizes]))
        low, high = (low, share) if cost.within(limits) else (share, high)
    hold, ramp = budget.schedule
    return {"final_closed": high, "start": hold, "steps": max(1, ramp)}
