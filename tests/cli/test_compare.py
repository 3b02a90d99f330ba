from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur.cli import app
from secateur.recipes import compare as room
from secateur.recipes.compare import DENSE


def stand_in(asked: room.Comparison, method: str, seed: int, *_: object) -> dict[str, float]:
    return {"accuracy": 90.0 + seed, "params": 100 if method == DENSE else 10, "macs": 200, "difference": 0.0}


def steps(asked: room.Comparison, *_: object) -> dict[str, object]:
    return {
        "ratios": {name: [1.5, 1.4, 1.6] for name in asked.methods},
        "passes": dict.fromkeys((DENSE, *asked.methods), 1.0),
    }


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(room, "_train", stand_in)
    monkeypatch.setattr(room, "_steps", steps)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_prints_one_table_and_writes_the_page_with_the_command_that_makes_it_again(quick: Path) -> None:
    words = ["compare", "--method", "arm", "--method", "diffprune", "--seeds", "0,2", "--keep-params", "0.2"]
    first = CliRunner().invoke(app, [*words, "--out", "page.md"])
    assert first.exit_code == 0, first.output
    assert [line.split()[0] for line in first.stdout.splitlines()[-4:] if line.strip()] == [DENSE, "arm", "diffprune"]
    assert "91.00" in first.stdout
    assert "1.41" in first.stdout
    page = (quick / "page.md").read_text()
    command = next(line for line in page.splitlines() if line.startswith("secateur compare"))
    again = CliRunner().invoke(app, command.split()[1:])
    assert again.exit_code == 0, again.output
    assert (quick / "page.md").read_text() == page
    assert "recorded" in again.stderr
    assert "trained" not in again.stderr
    assert len(list((quick / "runs/compare/digits-resnet-7-params0.2").iterdir())) == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "a"], "--seeds 'a': expected whole numbers"),
        (["--method", "arms"], "unknown method 'arms'"),
        (["--folds", "0"], "folds=0"),
        (["--keep-params", "2.0"], "keep_params=2.0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(quick: Path, words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["compare", *words])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (quick / "runs").exists()
