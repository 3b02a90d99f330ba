"""Records that are found again, and those that are of something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.errors import SecateurError
from secateur.recipes.resume import keep, kept


def test_what_was_kept_is_found_for_the_same_settings_alone(tmp_path: Path) -> None:
    path = tmp_path / "point.json"
    assert kept(path, {"seed": 0}) is None
    keep(path, {"seed": 0, "shares": (0.5, 0.1)}, {"accuracy": 98.5, "widths": [3, 4]})
    assert kept(path, {"shares": [0.5, 0.1], "seed": 0}) == {"accuracy": 98.5, "widths": [3, 4]}
    assert [file.name for file in tmp_path.iterdir()] == ["point.json"]
    with pytest.raises(SecateurError, match=r"point\.json: was found with seed=0, not 1, lr=None, not 0\.1; delete it"):
        kept(path, {"seed": 1, "shares": (0.5, 0.1), "lr": 0.1})


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 0}', '{"format": 1, "settings": 3, "found": {}}'])
def test_what_is_no_record_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "point.json"
    path.write_text(text)
    with pytest.raises(SecateurError, match=r"point\.json.*delete it"):
        kept(path, {})
