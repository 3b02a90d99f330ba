"""Runs of every recipe on a few images: what they record, how they resume, what they never look at."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.recipes.papers.conftest import squares

from secateur.errors import SecateurError
from secateur.recipes.data import DATA_SETS
from secateur.recipes.images import Images
from secateur.recipes.networks import network
from secateur.recipes.papers.experiments import EXPERIMENTS, recipe_of
from secateur.recipes.papers.recipe import Job
from secateur.recipes.papers.run import run, validation_split
from secateur.recipes.train import Epoch

ALL = [
    (experiment, name, method)
    for experiment, both in EXPERIMENTS.items()
    for name in both
    for method in both[name].methods
]
#: One run of each network and recipe, and every method once; wide networks take their time.
CHOSEN = [
    pytest.param(*row, marks=[pytest.mark.slow] if row[0] == "cifar-wrn" else [])
    for row in ALL
    if row[2] == "hard-concrete" or row[:2] == ("mnist-mlp", "ours")
]


def job_of(experiment: str, name: str, method: str, epochs: int = 2) -> Job:
    recipe = recipe_of(experiment, name).shortened(epochs)
    return Job(recipe, method, recipe.points[0], seed=0)


@pytest.mark.parametrize(("experiment", "name", "method"), CHOSEN)
def test_every_recipe_runs_to_a_record(experiment: str, name: str, method: str, tmp_path: Path):
    job = job_of(experiment, name, method, epochs=1)
    if job.recipe.net == "wrn-28-10":
        job = replace(job, recipe=replace(job.recipe, net="wrn-16-4"))
    recipe = job.recipe
    images = squares(DATA_SETS[recipe.data].shape, n=120 if recipe.data == "mnist" else 20, n_test=20)
    result, epochs = run(job, images, tmp_path, lambda epoch: None)
    assert result.method == method
    assert result.n_test == 20
    assert set(result.errors) == {"dense", "gated", "compact", "final", "scratch"}
    assert all(0 <= error.best <= error.last <= 100 for error in result.errors.values())
    assert {name: len(each) for name, each in epochs.items()} == dict(result.epochs)
    assert result.epochs["scratch"] == recipe.epochs
    assert result.difference <= 1e-8
    if job.point.keep_params is not None:
        assert result.params <= job.point.keep_params * result.dense_params
    if job.point.keep_macs is not None:
        assert result.macs <= job.point.keep_macs * result.dense_macs
    row = network(recipe.net)
    if row.pruned is not None:
        assert result.pruned == row.pruned(result.kept)
    assert {"gated", "shrunk", "compact"} == set(result.step_ratio)


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(small_images: Images, tmp_path: Path):
    job = job_of("mnist-mlp", "ours", "arm")
    whole, epochs = run(job, small_images, tmp_path / "whole", lambda epoch: None)
    turns = 0

    def watch(epoch: Epoch) -> None:
        nonlocal turns
        turns += 1
        raise KeyboardInterrupt

    for _ in range(20):
        try:
            resumed, again = run(job, small_images, tmp_path / "killed", watch)
        except KeyboardInterrupt:
            continue
        break
    assert turns == sum(whole.epochs.values())
    timeless = {"seconds": {}, "step_ratio": {}}
    assert replace(resumed, **timeless) == replace(whole, **timeless)
    assert again == epochs
    # What all methods share stays; what was this run's own is gone.
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [job.dense_title]


def test_a_validated_run_never_sees_a_test_image(small_images: Images, tmp_path: Path):
    job = replace(job_of("mnist-mlp", "ours", "hard-concrete"), validated=True)
    blind = replace(small_images, x_test=torch.full_like(small_images.x_test, torch.nan))
    result, _ = run(job, blind, tmp_path, lambda epoch: None)
    assert result.validated
    assert result.n_test == 20
    assert result.errors["final"].last < 100


def test_the_split_holds_out_a_twelfth_of_every_class(small_images: Images):
    split = validation_split(small_images, 3)
    assert (len(split.y), len(split.y_test)) == (220, 20)
    assert split.y_test.bincount().tolist() == [2] * 10
    both = torch.cat([split.x, split.x_test]).flatten(1).sum(1).sort().values
    assert torch.equal(both, small_images.x.flatten(1).sum(1).sort().values)
    assert not torch.equal(split.x_test, validation_split(small_images, 4).x_test)


def test_a_work_directory_that_cannot_be_made_is_refused(small_images: Images, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(SecateurError, match="choose another --work"):
        run(job_of("mnist-mlp", "ours", "arm"), small_images, tmp_path / "file", lambda epoch: None)
