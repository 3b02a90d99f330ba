"""The rows of the papers' tables that results stand beside, and the targets that follow from them.

The kept units are those that the prune rate is computed from; errors are the best of any epoch. Rows are recollected:
their prune rates follow from the architectures, their errors could not be checked against the papers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["BESIDE_DENSE", "PUBLISHED", "READINGS", "READING_MARGIN", "TARGETS", "Published", "Target"]

#: Methods that are readings of abstracts, and by how many points their error may be above that of hard concrete gates
#: at the same size.
READINGS, READING_MARGIN = ("diffprune", "diff-sparse"), 0.2
#: By experiment, the share of the multiply-accumulates at which the best method may err by so many points more than the
#: dense network that was trained alike.
BESIDE_DENSE: Mapping[str, tuple[float, float]] = {"cifar-resnet20": (0.5, 0.5)}


@dataclass(frozen=True)
class Published:
    """One row.

    Args:
        name: of the method, as the tables have it.
        kept: live units; empty where the paper does not say them.
        error: on the test images, in percent.
    """

    name: str
    kept: tuple[int, ...]
    error: float


@dataclass(frozen=True)
class Target:
    """What a compact network is to reach with the recipe *ours*, after the last epoch, mean of three seeds.

    Args:
        pruned: at least this, a share.
        error: at most this, in percent.
        method: of which it is asked, in ``secateur.gates.METHODS``; "" for the best of all.
        source: the row that it comes from.
    """

    pruned: float
    error: float
    method: str = ""
    source: str = ""


#: By experiment.
PUBLISHED: Mapping[str, tuple[Published, ...]] = {
    "mnist-mlp": (
        Published("Sparse VD", (512, 114, 72), 1.8),
        Published("BC-GNJ", (278, 98, 13), 1.8),
        Published("BC-GHS", (311, 86, 14), 1.8),
        Published("L0-HC, one lambda", (219, 214, 100), 1.4),
        Published("L0-HC, lambda per layer", (266, 88, 33), 1.8),
        Published("L0-AR, one lambda", (453, 150, 68), 1.7),
        Published("L0-ARM, one lambda", (143, 153, 78), 1.7),
        Published("L0-AR, lambda per layer", (464, 114, 65), 1.8),
        Published("L0-ARM, lambda per layer", (159, 74, 73), 1.9),
    ),
    "mnist-lenet5": (
        Published("Sparse VD", (14, 19, 242, 131), 1.0),
        Published("GL", (3, 12, 192, 500), 1.0),
        Published("GD", (7, 13, 208, 16), 1.1),
        Published("SBP", (3, 18, 284, 283), 0.9),
        Published("BC-GNJ", (8, 13, 88, 13), 1.0),
        Published("BC-GHS", (5, 10, 76, 16), 1.0),
        Published("L0-HC, one lambda", (20, 25, 45, 462), 0.9),
        Published("L0-HC, lambda per layer", (9, 18, 65, 25), 1.0),
        Published("L0-AR, one lambda", (18, 28, 46, 249), 1.2),
        Published("L0-ARM, one lambda", (20, 16, 32, 257), 0.9),
        Published("L0-AR, lambda per layer", (5, 12, 131, 22), 1.6),
        Published("L0-ARM, lambda per layer", (6, 10, 39, 11), 1.3),
        Published("DiffPrune, leader board", (), 0.6),
    ),
    "cifar-wrn": (
        Published("dense", (), 4.00),
        Published("dense, dropout", (), 3.89),
        Published("L0-HC (nothing pruned)", (), 3.83),
        Published("L0-ARM (about half of the gated layers pruned)", (), 4.3),
    ),
}

#: By experiment.
TARGETS: Mapping[str, tuple[Target, ...]] = {
    "mnist-mlp": (
        Target(0.90, 1.5),
        Target(0.933, 1.7),
        Target(0.8999, 1.8, "hard-concrete", "L0-HC, lambda per layer"),
        Target(0.9328, 1.9, "arm", "L0-ARM, lambda per layer"),
        Target(0.7710, 1.8, "ar", "L0-AR, lambda per layer"),
    ),
    "mnist-lenet5": (
        Target(0.986, 0.8),
        Target(0.995, 1.1),
        Target(0.9857, 1.0, "hard-concrete", "L0-HC, lambda per layer"),
        Target(0.9949, 1.3, "arm", "L0-ARM, lambda per layer"),
        Target(0.9890, 1.6, "ar", "L0-AR, lambda per layer"),
        Target(0.986, 1.0, "diffprune", "set here, for its row has no prune rate"),
    ),
}
