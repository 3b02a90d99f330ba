from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import secateur as sc
from secateur.recipes import compare as room
from secateur.recipes.compare import DENSE, Comparison, compare, page, table_rows
from secateur.recipes.data import digits
from secateur.recipes.images import Images

ASKED = Comparison("digits", "resnet-7", ("hard-concrete", "arm"), (0, 1), keep_params=0.3, epochs=2)


def few() -> Images:
    whole = digits()
    return dataclasses.replace(
        whole, x=whole.x[:64], y=whole.y[:64], x_test=whole.x_test[:50], y_test=whole.y_test[:50]
    )


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Runs that were trained, by a stand-in; steps are measured by one too."""
    runs: list[tuple[str, int, int]] = []

    def stand_in(asked: Comparison, method: str, seed: int, fold: int, *_: object) -> dict[str, float]:
        runs.append((method, seed, fold))
        return {"accuracy": 90.0 + seed + len(method), "params": 10, "macs": 20, "difference": 1e-9, "flipped": 0}

    steps = {"ratios": {"hard-concrete": [1.2, 1.1, 1.3], "arm": [1.5, 1.4, 1.6]}}
    passes = {"passes": {DENSE: 1.0, "hard-concrete": 1.0, "arm": 1.9}}
    monkeypatch.setattr(room, "_train", stand_in)
    monkeypatch.setattr(room, "_steps", lambda *_: steps | passes)
    return runs


def test_every_run_is_trained_and_measured(tmp_path: Path) -> None:
    asked = dataclasses.replace(ASKED, seeds=(0,), methods=("arm",))
    dense, arm = compare(asked, few, tmp_path, lambda epoch: None, lambda line: None)
    assert (dense.method, arm.method) == (DENSE, "arm")
    assert dense.params == 48_818
    assert arm.params <= 0.3 * dense.params
    assert arm.macs < dense.macs
    assert (dense.passes, dense.step) == (1.0, None)
    assert 1.5 < arm.passes <= 2.0
    assert arm.step is not None
    assert arm.step.low <= arm.step.median <= arm.step.high
    assert arm.difference < 1e-9
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "arm-seed0-fold0.json",
        "dense-seed0-fold0.json",
        "steps.json",
    ]


def test_what_is_recorded_is_not_trained_again(tmp_path: Path, trained: list[tuple[str, int, int]]) -> None:
    one = dataclasses.replace(ASKED, seeds=(1,))
    told: list[str] = []
    compare(one, few, tmp_path, lambda epoch: None, told.append)
    assert trained == [(DENSE, 1, 0), ("hard-concrete", 1, 0), ("arm", 1, 0)]
    (tmp_path / "arm-seed1-fold0.json").unlink()  # as if it had been killed there
    trained.clear()
    lines = compare(ASKED, few, tmp_path, lambda epoch: None, told.append)
    assert sorted(trained) == [("arm", 0, 0), ("arm", 1, 0), (DENSE, 0, 0), ("hard-concrete", 0, 0)]
    trained.clear()
    again = compare(ASKED, lambda: pytest.fail("loads nothing"), tmp_path, lambda epoch: None, told.append)
    assert again == lines
    assert not trained
    assert told[-1] == "arm-seed1-fold0: recorded"


def test_records_of_other_settings_are_refused_before_anything_is_trained(
    tmp_path: Path, trained: list[tuple[str, int, int]]
) -> None:
    compare(ASKED, few, tmp_path, lambda epoch: None, lambda line: None)
    trained.clear()
    other = dataclasses.replace(ASKED, keep_params=0.2, seeds=(2, 0))
    with pytest.raises(sc.SecateurError, match=r"was found with keep_params=0\.3, not 0\.2"):
        compare(other, few, tmp_path, lambda epoch: None, lambda line: None)
    assert not trained


def test_table_and_page_say_mean_deviation_and_cost(tmp_path: Path, trained: list[tuple[str, int, int]]) -> None:
    lines = compare(ASKED, few, tmp_path, lambda epoch: None, lambda line: None)
    rows = table_rows(lines)
    assert rows[2] == ("arm", "93.50", "0.71", "2", "10", "100.0%", "100.0%", "1.50 (1.40-1.60)", "1.90")
    text = page(ASKED, lines, "secateur compare --seeds 0,1")
    assert "| arm | 93.50 | 0.71 |" in text
    assert "Most accurate: `hard-concrete`, by 10.00 over `arm`" in text
    assert "secateur compare --seeds 0,1" in text


def test_folds_are_the_digits_test_sets_in_turn() -> None:
    asked = dataclasses.replace(ASKED, folds=5, seeds=(3,))
    assert [run for run in asked.runs() if run[0] == "arm"] == [("arm", 3, fold) for fold in range(5)]
    parts = [room._of_fold(asked, few(), fold) for fold in range(5)]
    assert sum(len(part.y_test) for part in parts) == 1797
    assert torch.equal(room._of_fold(ASKED, few(), 0).y, few().y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ()}, "methods"),
        ({"methods": ("arm", "arm")}, "each once"),
        ({"methods": ("arms",)}, "unknown method 'arms'"),
        ({"seeds": (0, 0)}, "seeds"),
        ({"data": "mnist", "net": "lenet-5", "folds": 5}, "folds=5"),
        ({"folds": 0}, "folds=0"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(sc.SecateurError, match=message):
        dataclasses.replace(ASKED, **change)  # type: ignore[arg-type]
