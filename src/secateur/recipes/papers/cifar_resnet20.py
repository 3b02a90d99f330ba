"""ResNet-20 on CIFAR-10: gates on all channels, those of the residual stream included."""

from __future__ import annotations

from secateur.recipes.papers.recipe import Point, Recipe
from secateur.recipes.train import Phase

__all__ = ["OURS"]

#: None of the four papers has this network; the dense one is trained as long and alike. Images are shifted and
#: mirrored for all networks, as is usual.
OURS = Recipe(
    experiment="cifar-resnet20",
    name="ours",
    version=1,
    data="cifar10",
    net="resnet-20",
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
