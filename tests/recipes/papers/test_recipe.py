"""Recipes, points and jobs: what is refused, and what the names say."""

import dataclasses
import json
import math

import pytest

import secateur as sc
from secateur.errors import SecateurError
from secateur.gates import METHODS
from secateur.gates.layout import Layout
from secateur.recipes.data import DATA_SETS
from secateur.recipes.networks import network
from secateur.recipes.papers.experiments import EXPERIMENTS, recipe_of
from secateur.recipes.papers.recipe import Job, Point, Recipe, opened

RECIPES = [recipe for both in EXPERIMENTS.values() for recipe in both.values()]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.experiment}-{recipe.name}")
def test_recipes_name_what_there_is_and_keep_their_promises(recipe: Recipe):
    assert EXPERIMENTS[recipe.experiment][recipe.name] is recipe
    assert network(recipe.net).shape == DATA_SETS[recipe.data].shape
    for method in recipe.methods:
        settings, own = recipe.made_with(method)
        for differing in ({}, *own.values()):
            assert sc.method_from_name(method, **settings | dict(differing)).name in METHODS
    for point in recipe.points:
        Job(recipe, next(iter(recipe.methods)), point, 0)
    assert json.loads(json.dumps(recipe.settings()))["version"] == recipe.version
    if recipe.name == "ours":
        assert recipe.epochs <= 60
        assert recipe.dense.epochs <= 60
        assert recipe.experiment == "cifar-wrn" or not recipe.augmented


def test_a_method_may_ask_for_weight_decay_while_its_gates_train():
    recipe = EXPERIMENTS["mnist-lenet5"]["ours"]
    asked = {
        method: settings["weight_decay"] for method, settings in recipe.methods.items() if "weight_decay" in settings
    }
    assert asked
    for method in recipe.methods:
        job = Job(recipe, method, recipe.points[0], 0)
        assert job.phase("gated").weight_decay == asked.get(method, recipe.gated.weight_decay)
        assert job.phase("tuned").weight_decay == job.phase("scratch").weight_decay == recipe.tuned.weight_decay
        assert "weight_decay" not in recipe.made_with(method)[0]


@pytest.mark.parametrize("drop_rate", [0.05, 0.2, 0.3, 0.5])
def test_drop_rates_become_the_open_chances_of_their_log_alpha(drop_rate: float):
    method = sc.HardConcrete(init_open=opened(drop_rate))
    start = method.init(Layout((1000,)))["log_alpha"].mean().item()
    assert start == pytest.approx(math.log((1 - drop_rate) / drop_rate), abs=1e-3)


def test_points_are_named_by_what_they_ask_for():
    names = [Point(keep_params=0.1).name, Point(keep_macs=0.5).name, Point(lambdas=(10.0, 0.5)).name]
    assert names == ["params0.1", "macs0.5", "lambda10-0.5"]


@pytest.mark.parametrize(
    "point", [Point(keep_params=0.00505), Point(keep_macs=1.0), Point(lambdas=(0.1,)), Point(lambdas=(1e-5, 10.0, 0.0))]
)
def test_a_point_is_found_by_its_name(point: Point):
    assert Point.named(point.name) == point


@pytest.mark.parametrize("name", ["", "params", "params0.1-0.2", "lambda", "lambda0.1-", "bytes0.1", "params2", "0.1"])
def test_names_of_no_point_are_refused(name: str):
    with pytest.raises(SecateurError, match=r"names no point|expected a share"):
        Point.named(name)


def test_settings_of_small_sizes_are_those_of_the_least_share_that_holds_it():
    recipe = dataclasses.replace(
        recipe_of("mnist-mlp", "ours"), smaller={0.05: {"hold": 0.2, "ramp": 0.7}, 0.01: {"hold": 0.3}}
    )
    shares = {0.06: (0.1, 0.5), 0.05: (0.2, 0.7), 0.02: (0.2, 0.7), 0.01: (0.3, 0.5)}
    for share, schedule in shares.items():
        job = Job(recipe, "arm", Point(keep_params=share), 0)
        assert (job.recipe.hold, job.recipe.ramp) == schedule
        assert "smaller" not in job.recipe.settings()
        assert Job(job.recipe, "arm", job.point, 0).recipe.settings() == job.recipe.settings()
    paper = dataclasses.replace(recipe_of("mnist-mlp", "paper"), smaller={0.05: {"hold": 0.2}})
    assert paper.at(paper.points[0]).hold == paper.hold


@pytest.mark.parametrize("name", ["dense", "net", "version", "label_smoothing", "smaller", "hole"])
def test_what_all_sizes_share_cannot_differ_by_size(name: str):
    with pytest.raises(SecateurError, match=f"{name} must be the same for all sizes; what may differ: distillation, "):
        dataclasses.replace(recipe_of("mnist-mlp", "ours"), smaller={0.05: {name: 0, "hold": 0.2}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "got nothing"),
        ({"keep_params": 0.1, "keep_macs": 0.1}, "got keep_params and keep_macs"),
        ({"keep_params": 1.1}, r"keep_params=1\.1, expected a share"),
        ({"lambdas": (0.1, -1.0)}, "finite numbers of at least 0"),
        ({"lambdas": (math.inf,)}, "finite numbers of at least 0"),
    ],
)
def test_impossible_points_are_refused(settings: dict, message: str):
    with pytest.raises(SecateurError, match=message):
        Point(**settings)


@pytest.mark.parametrize(
    ("recipe", "method", "point", "seed", "message"),
    [
        ("ours", "lottery", Point(keep_params=0.1), 0, "no method 'lottery'; there are hard-concrete"),
        ("paper", "diffprune", Point(lambdas=(0.1,) * 3), 0, "use --recipe ours"),
        ("paper", "arm", Point(keep_params=0.1), 0, "takes lambdas, not params"),
        ("ours", "arm", Point(lambdas=(0.1,) * 3), 0, "takes a budget, not lambda"),
        ("paper", "arm", Point(lambdas=(0.1, 0.1)), 0, "2 lambdas, expected one, or 3"),
        ("ours", "arm", Point(keep_params=0.1), -1, "seed=-1"),
    ],
)
def test_impossible_jobs_are_refused(recipe: str, method: str, point: Point, seed: int, message: str):
    with pytest.raises(SecateurError, match=message):
        Job(recipe_of("mnist-mlp", recipe), method, point, seed)


def test_jobs_have_names_of_their_own():
    recipe = recipe_of("mnist-mlp", "ours")
    jobs = [
        Job(recipe, method, Point(keep_params=keep), seed, validated)
        for method in ("arm", "ar")
        for keep in (0.1, 0.2)
        for seed in (0, 1)
        for validated in (False, True)
    ]
    assert len({job.title for job in jobs}) == len(jobs)
    assert len({job.dense_title for job in jobs}) == 4


@pytest.mark.parametrize(("experiment", "name"), [("mnist", "ours"), ("mnist-mlp", "yours")])
def test_unknown_experiments_are_refused_with_a_list(experiment: str, name: str):
    with pytest.raises(SecateurError, match="there are: "):
        recipe_of(experiment, name)
