"""Checkpoints: whole or not at all, of the same settings, and refused by name where they are neither."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from secateur.errors import SecateurError
from secateur.recipes.checkpoint import Checkpoint
from secateur.recipes.train import Phase

PHASE = Phase("dense", epochs=4, batch=8, lr=0.1)


def test_states_are_read_back_and_replaced(tmp_path: Path):
    checkpoint = Checkpoint(tmp_path / "run.pt")
    assert checkpoint.load(PHASE) is None
    for value in (1.0, 2.0):
        checkpoint.save(PHASE, {"epochs": [], "x": torch.full((3,), value)})
    assert checkpoint.load(PHASE)["x"].tolist() == [2.0] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_epochs_between_two_saves_are_left_out_and_the_last_is_not(tmp_path: Path):
    checkpoint = Checkpoint(tmp_path / "run.pt", every=3)
    seen = []
    for done in range(1, 5):
        checkpoint.save(PHASE, {"epochs": list(range(done))})
        seen.append(len((checkpoint.load(PHASE) or {"epochs": []})["epochs"]))
    assert seen == [0, 0, 3, 4]


def test_a_checkpoint_of_other_settings_is_refused_and_says_which(tmp_path: Path):
    Checkpoint(tmp_path / "run.pt").save(PHASE, {"epochs": []})
    with pytest.raises(SecateurError, match=r"lr=0\.1 \(now 0\.2\)"):
        Checkpoint(tmp_path / "run.pt").load(Phase("dense", epochs=4, batch=8, lr=0.2))


@dataclass(frozen=True)
class Before:
    """Settings as they were."""

    epochs: int
    lr: float = 0.1


@dataclass(frozen=True)
class After:
    """The same with a field that came later."""

    epochs: int
    lr: float = 0.1
    checks: int = 0


def test_a_setting_that_came_later_had_its_default_before(tmp_path: Path):
    checkpoint = Checkpoint(tmp_path / "run.pt")
    for before in (Before(4), Before(4, lr=0.2)):
        checkpoint.save(before, {"epochs": []})
        assert checkpoint.load(After(4, lr=before.lr)) == {"epochs": []}
        with pytest.raises(SecateurError, match=r"checks=0 \(now 2\)"):
            checkpoint.load(After(4, lr=before.lr, checks=2))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04"])
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path, content: bytes):
    (tmp_path / "run.pt").write_bytes(content)
    with pytest.raises(SecateurError, match=r"run\.pt: cannot be read"):
        Checkpoint(tmp_path / "run.pt").load(PHASE)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = Checkpoint(tmp_path / "run.pt")
    checkpoint.save(PHASE, {"epochs": []})

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(SecateurError, match="No space left"):
        checkpoint.save(PHASE, {"epochs": [], "x": 1})
    assert checkpoint.load(PHASE) == {"epochs": []}
    assert len(list(tmp_path.iterdir())) == 1
