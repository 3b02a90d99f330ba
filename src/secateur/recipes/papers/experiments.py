"""All experiments by name."""

from __future__ import annotations

from collections.abc import Mapping

from secateur.errors import SecateurError
from secateur.recipes.papers import cifar_resnet20, cifar_wrn, mnist_lenet5, mnist_mlp
from secateur.recipes.papers.recipe import Recipe

__all__ = ["EXPERIMENTS", "recipe_of"]

#: By experiment and recipe. A new experiment is one file and one row here.
EXPERIMENTS: Mapping[str, Mapping[str, Recipe]] = {
    "mnist-mlp": {"paper": mnist_mlp.PAPER, "ours": mnist_mlp.OURS},
    "mnist-lenet5": {"paper": mnist_lenet5.PAPER, "ours": mnist_lenet5.OURS},
    "cifar-resnet20": {"ours": cifar_resnet20.OURS},
    "cifar-wrn": {"paper": cifar_wrn.PAPER, "ours": cifar_wrn.OURS},
}


def recipe_of(experiment: str, name: str) -> Recipe:
    """The recipe ``name`` of an experiment.

    Raises:
        SecateurError: there is no such experiment or recipe.
    """
    if experiment not in EXPERIMENTS:
        raise SecateurError(f"unknown experiment {experiment!r}; there are: {', '.join(EXPERIMENTS)}")
    if name not in EXPERIMENTS[experiment]:
        raise SecateurError(f"unknown recipe {name!r}; there are: {', '.join(EXPERIMENTS[experiment])}")
    return EXPERIMENTS[experiment][name]
