"""Wide residual networks on CIFAR-10: the paper's gates in WRN-28-10, and all channels of WRN-16-4."""

from __future__ import annotations

from secateur.recipes.papers.recipe import Point, Recipe, opened
from secateur.recipes.train import Phase

__all__ = ["OURS", "PAPER"]

#: As published: SGD with Nesterov momentum, 0.1 times 0.2 after 60, 120 and 160 of 200 epochs, gates on the channels
#: between the two convolutions of each block, drop rates 0.3 (hard concrete) and 0.01 (L0-ARM), images shifted and
#: mirrored. Two departures, without which nothing is pruned, as L0-ARM found of hard concrete: gates have Adam, as in
#: the later code of L0-ARM's authors, and the weights' decay does not reach them.
PAPER = Recipe(
    experiment="cifar-wrn",
    name="paper",
    version=1,
    data="cifar10",
    net="wrn-28-10",
    methods={
        "hard-concrete": {"init_open": opened(0.3)},
        "arm": {"init_open": 0.99},
        "ar": {"init_open": 0.99},
    },
    points=(Point(lambdas=(0.001,)), Point(lambdas=(0.002,))),
    dense=Phase("dense", 200, 128, 0.1, weight_decay=5e-4, optimizer="sgd", milestones=(60, 120, 160), drop=0.2),
    gated=Phase(
        "gated",
        200,
        batch=128,
        lr=0.1,
        gate_lr=1e-3,
        weight_decay=5e-4,
        optimizer="sgd",
        milestones=(60, 120, 160),
        drop=0.2,
        average=0.99,
    ),
    units="blocks.*.conv1",
    pixels="standardised",
    augmented=True,
    half=True,
)

#: A network that one accelerator trains in an hour; images are shifted and mirrored as for the papers' rows beside it.
OURS = Recipe(
    experiment="cifar-wrn",
    name="ours",
    version=1,
    data="cifar10",
    net="wrn-16-4",
    methods={"hard-concrete": {}, "arm": {}, "ar": {}, "diffprune": {}, "diff-sparse": {}, "magnitude": {}},
    points=(Point(keep_macs=0.5), Point(keep_macs=0.3)),
    dense=Phase("dense", 60, batch=128, lr=0.1, weight_decay=5e-4, optimizer="sgd", warm_up=0.05),
    gated=Phase(
        "gated",
        40,
        batch=128,
        lr=0.1,
        gate_lr=0.02,
        weight_decay=5e-4,
        optimizer="sgd",
        warm_up=0.05,
        checks=40,
    ),
    tuned=Phase("tuned", 20, batch=128, lr=0.05, weight_decay=5e-4, optimizer="sgd"),
    pixels="standardised",
    augmented=True,
    half=True,
)
