"""Losses against their formulas in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.errors import SecateurError
from secateur.recipes.images import Images
from secateur.recipes.papers.experiments import recipe_of
from secateur.recipes.papers.objectives import (
    SHIFT,
    dropped,
    l0_penalty,
    learning,
    shifted_and_mirrored,
    soft_targets,
)
from secateur.recipes.papers.recipe import Distillation
from secateur.recipes.task import fresh


def gated(name: str) -> sc.Pruner:
    model = fresh(name, 0)
    rules = [sc.Rule(), sc.Rule("inputs", where="fc1")]
    return sc.attach(model, examples=(torch.zeros(1, 1, 28, 28),), gates=rules)


def chances(pruner: sc.Pruner) -> dict[str, torch.Tensor]:
    sizes = [group.size for group in pruner.groups]
    parts = pruner.gates.prob_open().split(sizes)
    return {group.name: part for group, part in zip(pruner.groups, parts, strict=True)}


def test_the_penalty_of_the_dense_network_is_the_papers_by_hand():
    pruner, lambdas = gated("lenet-300-100"), (0.1, 0.3, 0.4)
    p = chances(pruner)
    counts = {"fc1.inputs": (0.1, 300), "fc1": (0.3, 100), "fc2": (0.4, 10)}
    expected = sum(price * size * p[name].sum().item() for name, (price, size) in counts.items()) / 60_000
    found = l0_penalty(pruner, lambdas, 60_000)()
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in pruner.gates.parameters())


def test_the_penalty_of_lenet_5_counts_filters_and_outgoing_weights():
    pruner, lambdas = gated("lenet-5"), (10.0, 0.5, 0.1, 7.0)
    p = chances(pruner)
    counts = {"conv1": (10.0, 25), "conv2": (0.5, 25 * 20), "fc1.inputs": (0.1, 500), "fc1": (7.0, 10)}
    expected = sum(price * size * p[name].sum().item() for name, (price, size) in counts.items()) / 60_000
    assert l0_penalty(pruner, lambdas, 60_000)().item() == pytest.approx(expected, rel=1e-5)


def test_a_wrong_number_of_lambdas_names_the_layers():
    with pytest.raises(SecateurError, match=r"2 lambdas for 4 gated groups: conv1, conv2, fc1\.inputs, fc1"):
        l0_penalty(gated("lenet-5"), (0.1, 0.1), 60_000)


def test_distillation_is_its_formula_and_without_a_teacher_labels_alone_count(small_images: Images):
    recipe = recipe_of("mnist-mlp", "ours")
    taught = recipe.distillation
    assert isinstance(taught, Distillation)
    teacher, student, index = fresh(recipe.net, 1), fresh(recipe.net, 0).train(), torch.arange(7)
    soft = soft_targets(teacher, small_images.x, taught)
    assert soft.sum(1).numpy() == pytest.approx(1.0, abs=1e-6)
    x, y = small_images.x[index], small_images.y[index]
    p, q = (F.softmax(model(x) / taught.temperature, dim=1) for model in (student, teacher))
    divergence = (q * (q / p).log()).sum(1).mean()
    labels = F.cross_entropy(student(x), y)
    expected = (1 - taught.share) * labels + taught.share * taught.temperature**2 * divergence
    found = learning(recipe, small_images, soft=soft).loss(student, index)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert learning(recipe, small_images).loss(student, index).item() == pytest.approx(labels.item(), rel=1e-6)


def test_dropout_acts_on_the_named_inputs_in_training_only_and_leaves_nothing_behind():
    model = nn.Sequential(nn.Linear(50, 3), nn.Linear(3, 2))
    x = torch.ones(4, 50)
    with dropped(model, {"0": 0.5}):
        assert not torch.equal(model.train()(x), model(x))
        assert torch.equal(model.eval()(x), model(x))
    assert torch.equal(model.train()(x), model(x))


def test_images_are_shifted_and_mirrored_as_wholes():
    x = torch.rand(200, 3, 9, 9) + 1
    padded = F.pad(x, (SHIFT,) * 4)
    found = shifted_and_mirrored(x)
    places = set()
    for image, before in zip(found, padded, strict=True):
        fits = [
            (down, right, mirrored)
            for mirrored in (False, True)
            for down in range(2 * SHIFT + 1)
            for right in range(2 * SHIFT + 1)
            if torch.equal(image.flip(2) if mirrored else image, before[:, down : down + 9, right : right + 9])
        ]
        assert len(fits) == 1
        places.add(fits[0])
    assert {place[2] for place in places} == {False, True}
    assert len({place[:2] for place in places}) > 60
