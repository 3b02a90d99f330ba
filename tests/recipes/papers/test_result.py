"""Records of runs: round trip, versions, logs, and writes that fail."""

import dataclasses
import json
from pathlib import Path

import pytest

from secateur.errors import SecateurError
from secateur.recipes.measure import Latency
from secateur.recipes.papers.experiments import recipe_of
from secateur.recipes.papers.recipe import Job
from secateur.recipes.papers.result import Error, Result, is_of, log_text, read_result, write_result
from secateur.recipes.train import Epoch, Phase
from secateur.structure.groups import Cost


def made(method: str = "arm", seed: int = 0, error: float = 1.4, keep: int = 0, **changes: object) -> Result:
    """A record as a run of LeNet-300-100 would leave it."""
    recipe = recipe_of("mnist-mlp", "ours")
    kept = (219, 100 - 20 * keep, 40)
    params = 219 * kept[1] + kept[1] * 41 + 40 * 11 + 10
    values = {
        "experiment": "mnist-mlp",
        "recipe": "ours",
        "version": recipe.version,
        "method": method,
        "settings": dict(recipe.methods[method]),
        "point": recipe.points[keep].name,
        "seed": seed,
        "validated": False,
        "schedule": recipe.settings(),
        "kept": kept,
        "pruned": 1 - (219 * kept[1] + kept[1] * 40 + 400) / 266_200,
        "widths": {"fc1.inputs": (219, 784), "fc1": (kept[1], 300), "fc2": (40, 100)},
        "flipped": 1,
        "params": params,
        "macs": params - kept[1] - 50,
        "dense_params": 266_610,
        "dense_macs": 266_200,
        "errors": {name: Error(error, error - 0.1) for name in ("dense", "gated", "compact", "final", "scratch")},
        "difference": 1e-14,
        "n_test": 10_000,
        "epochs": {"gated": 2, "tuned": 1},
        "seconds": {"gated": 3.0},
        "step_ratio": {"gated": Latency(2.0, 1.9, 2.1)},
    }
    return Result(**values | changes)


def test_what_is_written_is_read_back(tmp_path: Path):
    write_result(tmp_path / "run.json", made())
    assert read_result(tmp_path / "run.json") == made()
    content = json.loads((tmp_path / "run.json").read_text())
    assert set(content["versions"]) == {"secateur", "torch", "python"}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 0}', '{"format": 1, "kept": []}'])
def test_what_is_no_record_is_refused_by_name(tmp_path: Path, text: str):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(SecateurError, match=r"run\.json"):
        read_result(path)


def test_a_write_that_fails_leaves_the_record_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "run.json"
    write_result(path, made())

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(SecateurError, match="No space left"):
        write_result(path, made(error=9.9))
    assert read_result(path) == made()
    assert len(list(tmp_path.iterdir())) == 1


def test_records_of_other_versions_or_settings_are_told_apart():
    recipe = recipe_of("mnist-mlp", "ours")
    job = Job(recipe, "arm", recipe.points[0], 0)
    assert is_of(made(), job) == ""
    older = made(version=recipe.version - 1)
    assert f"version {recipe.version - 1} of the recipe, which is at version {recipe.version} now" in is_of(older, job)
    assert "other settings" in is_of(made(schedule={**recipe.settings(), "hold": 0.9}), job)
    assert "other settings" in is_of(made(settings={"k": 3.0}), job)
    changed = dataclasses.replace(recipe, gated=dataclasses.replace(recipe.gated, lr=1.0))
    assert "other settings" in is_of(made(), dataclasses.replace(job, recipe=changed))


def test_a_record_stays_its_recipes_after_a_round_trip(tmp_path: Path):
    recipe = recipe_of("mnist-mlp", "ours")
    write_result(tmp_path / "run.json", made())
    assert is_of(read_result(tmp_path / "run.json"), Job(recipe, "arm", recipe.points[0], 0)) == ""


def test_the_log_has_a_line_for_every_epoch():
    phase = Phase("gated", 2, 8, 0.1)
    sizes = {"dense": Cost(100, 10), "expected": Cost(60, 6), "exact": Cost(50, 5)}
    epochs = {"gated": [Epoch(phase, 1, 0.5), Epoch(phase, 2, 0.25, **sizes, error=2.0)]}
    rows = [json.loads(line) for line in log_text(epochs).splitlines()]
    assert rows == [
        {"phase": "gated", "epoch": 1, "loss": 0.5},
        {"phase": "gated", "epoch": 2, "loss": 0.25, "error": 2.0, "expected": 0.6, "exact": 0.5},
    ]
