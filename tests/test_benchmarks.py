"""The benchmark of training steps does what it says; no time is asserted."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def steps() -> ModuleType:
    sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location("steps", ROOT / "benchmarks" / "steps.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_part_runs_and_has_a_line_on_the_page(steps: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "METHODS", {"hard-concrete": steps.METHODS["hard-concrete"]})
    monkeypatch.setattr(steps, "CASES", {name: steps.CASES[name] for name in ("LeNet-300-100", "LeNet-5")})
    parts = steps.measured(steps.arguments(["--short"]))
    assert set(parts) == {"steps", "weights", "arm", "shrunk", "compact"}
    assert all(len(row["ratio"]) == 3 and min(row["ratio"]) > 0 for rows in parts.values() for row in rows)
    assert all(min(row["peak"]) > 0 and min(row["held"]) > 0 for row in parts["steps"])
    text = steps.page({"threads": {"1": parts}, "versions": {"torch": "0"}})
    assert text.count("\n| LeNet") == sum(len(rows) for rows in parts.values())


def test_the_page_is_that_of_the_record(steps: ModuleType) -> None:
    import json

    record = json.loads((ROOT / "results" / "steps.json").read_text())
    assert (ROOT / "docs" / "benchmarks.md").read_text() == steps.page(record)
