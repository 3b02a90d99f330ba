"""Records: whole or not at all, and read back as they were written."""

import json
from pathlib import Path

import pytest

from secateur.errors import SecateurError
from secateur.recipes.measure import Latency
from secateur.recipes.record import read_record, write_record, write_text
from secateur.recipes.settings import Settings
from secateur.recipes.task import ORDER, Outcome, Row


def made() -> Outcome:
    rows = tuple(Row(name, 99.25, 431_080, 2_293_000, 1_724_984, Latency(12.28, 9.19, 14.01)) for name in ORDER)
    return Outcome(
        settings=Settings(data="mnist", net="lenet-5", keep_params=0.05),
        schedule={"gated": 14, "fine-tuned": 6, "scratch": 20, "dense": 20},
        rows=rows,
        difference={"float32": 1e-6, "float64": 1e-15},
        widths={"conv1": (7, 20), "conv2": (12, 50)},
        flipped=1,
        counted=(7, 12, 90, 30),
        pruned=0.98,
        n_test=10_000,
        seconds=600.0,
    )


def test_what_is_written_is_read_back(tmp_path: Path):
    write_record(tmp_path / "run.json", made())
    assert read_record(tmp_path / "run.json") == made()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 0}', '{"format": 1, "settings": {"data": "digits", "colour": 1}}']
)
def test_what_is_no_record_is_refused_by_name(tmp_path: Path, text: str):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(SecateurError, match=r"run\.json"):
        read_record(path)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "run.json"
    write_record(path, made())
    before = path.read_text()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(SecateurError, match="No space left"):
        write_text(path, "other")
    assert path.read_text() == before
    assert [each.name for each in tmp_path.iterdir()] == ["run.json"]


def test_a_record_names_the_versions_that_made_it(tmp_path: Path):
    write_record(tmp_path / "run.json", made())
    assert set(json.loads((tmp_path / "run.json").read_text())["versions"]) == {"secateur", "torch", "python"}
