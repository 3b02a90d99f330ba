"""``secateur reproduce``: records, resuming, refusals, and the page."""

import json
from pathlib import Path

import pytest
from tests.recipes.test_data import idx
from typer.testing import CliRunner, Result

from secateur.cli import app
from secateur.recipes.data import MNIST_FILES
from secateur.recipes.papers import experiments
from secateur.recipes.papers.experiments import EXPERIMENTS


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a few images in MNIST's format, and recipes of one epoch a phase."""
    import numpy as np

    random = np.random.RandomState(0)
    for part, n in (("train", 240), ("t10k", 40)):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(random.randint(0, 256, (n, 28, 28))))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(n) % 10))
    short = {name: {kind: recipe.shortened(1) for kind, recipe in both.items()} for name, both in EXPERIMENTS.items()}
    for module in (experiments, "secateur.recipes.papers.report", "secateur.recipes.papers.picture"):
        name = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{name}.EXPERIMENTS", short)
    return tmp_path


def called(tiny: Path, *words: str) -> Result:
    places = ["--results", f"{tiny}/results", "--work", f"{tiny}/work", "--page", f"{tiny}/docs/results.md"]
    return CliRunner().invoke(app, ["reproduce", *words, "--data-dir", str(tiny), *places])


def test_runs_are_recorded_kept_and_made_into_a_page(tiny: Path):
    words = ("mnist-mlp", "--method", "hard-concrete", "--method", "magnitude", "--seeds", "0", "--budget", "0.1")
    first = called(tiny, *words)
    assert first.exit_code == 0, first.output
    assert "hard-concrete params0.1 seed 0:" in first.stdout
    names = sorted(path.name for path in (tiny / "results").iterdir())
    titles = [f"mnist-mlp-ours-{method}-params0.1-seed0" for method in ("hard-concrete", "magnitude")]
    assert names == sorted(f"{title}.{kind}" for title in titles for kind in ("json", "log"))
    record = json.loads((tiny / "results" / names[0]).read_text())
    assert record["n_test"] == 40
    assert str(tiny) not in json.dumps(record)
    before = [(tiny / "results" / name).stat().st_mtime_ns for name in names]
    again = called(tiny, *words)
    assert again.exit_code == 0
    assert again.stdout == ""
    assert again.stderr.count("done before") == 2
    assert [(tiny / "results" / name).stat().st_mtime_ns for name in names] == before
    pytest.importorskip("matplotlib")
    page = called(tiny, "--report")
    assert page.exit_code == 0, page.output
    assert "**magnitude**, ours, params0.1" in (tiny / "docs" / "results.md").read_text()
    assert (tiny / "docs" / "results.svg").exists()


def test_a_record_of_another_version_is_said_and_replaced(tiny: Path):
    words = ("mnist-mlp", "--method", "hard-concrete", "--seeds", "0", "--budget", "0.1", "--validate")
    assert called(tiny, *words).exit_code == 0
    path = tiny / "results" / "mnist-mlp-ours-hard-concrete-params0.1-seed0-validated.json"
    record = json.loads(path.read_text())
    assert record["n_test"] == 20
    path.write_text(json.dumps({**record, "version": 77}))
    again = called(tiny, *words)
    assert "version 77 of the recipe, which is at version 0 now; it is trained again and replaced" in again.stderr
    assert json.loads(path.read_text())["version"] == 0


def test_missing_data_names_the_files_and_nothing_is_written(tmp_path: Path):
    for data in ([], ["--data-dir", str(tmp_path)]):
        result = CliRunner().invoke(app, ["reproduce", "mnist-mlp", "--results", f"{tmp_path}/results", *data])
        assert result.exit_code == 2
        assert all(name in result.stderr for name in MNIST_FILES)
    assert not list((tmp_path / "results").iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "unknown experiment ''; there are: mnist-mlp"),
        (("mnist-mlp", "--recipe", "theirs"), "unknown recipe 'theirs'; there are: paper, ours"),
        (("mnist-mlp", "--seeds", "0,one"), "--seeds '0,one': expected whole numbers"),
        (("mnist-mlp", "--seeds", "-1"), "seed=-1"),
        (("mnist-mlp", "--budget", "1.5"), "keep_params=1.5, expected a share"),
        (("mnist-mlp", "--budget", "0.5", "--lambdas", "1"), "got --budget and --lambdas"),
        (("mnist-mlp", "--lambdas", "0.1,0.1,0.1"), "takes a budget, not lambda0.1-0.1-0.1"),
        (("mnist-mlp", "--method", "lottery"), "no method 'lottery'"),
        (("--report",), "holds no record"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_message(tiny: Path, words: tuple[str, ...], message: str):
    result = called(tiny, *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
