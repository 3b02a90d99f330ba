"""The benchmarks of training steps and of whole trainings do what they say; no time is asserted."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def benchmark(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def steps() -> ModuleType:
    return benchmark("steps")


@pytest.fixture(scope="module")
def training() -> ModuleType:
    return benchmark("training")


def test_each_part_runs_and_has_a_line_on_the_page(steps: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "METHODS", {"hard-concrete": steps.METHODS["hard-concrete"]})
    monkeypatch.setattr(steps, "CASES", {name: steps.CASES[name] for name in ("LeNet-300-100", "LeNet-5")})
    parts = steps.measured(steps.arguments(["--short"]))
    assert set(parts) == {"steps", "weights", "arm", "shrunk", "compact", "cost", "floor"}
    assert all(len(row["ratio"]) == 3 and min(row["ratio"]) > 0 for rows in parts.values() for row in rows)
    assert all(min(row["peak"]) > 0 and min(row["held"]) > 0 for row in parts["steps"])
    text = steps.page({"threads": {"1": parts}, "versions": {"torch": "0"}})
    assert text.count("\n| LeNet") == sum(len(rows) for rows in parts.values())


def test_the_page_is_that_of_the_record(steps: ModuleType) -> None:
    import json

    record = json.loads((ROOT / "results" / "steps.json").read_text())
    assert (ROOT / "docs" / "benchmarks.md").read_text() == steps.page(record)


def test_trainings_take_turns_and_each_is_timed_alone(training: ModuleType) -> None:
    order: list[str] = []

    def party(name: str, pauses: int):
        def run(pause) -> None:
            for _ in range(pauses):
                order.append(name)
                pause()
            order.append(f"{name} ends")

        return run

    spent = training.alternating({"a": party("a", 2), "b": party("b", 3)})
    assert order == ["a", "b", "a", "b", "a ends", "b", "b ends"]
    assert {name: len(times) for name, times in spent.items()} == {"a": 3, "b": 4}


def test_a_failure_in_one_training_ends_both(training: ModuleType) -> None:
    def fails(pause) -> None:
        pause()
        raise ValueError("diverged")

    with pytest.raises(ValueError, match="diverged"):
        training.alternating({"a": fails, "b": lambda pause: pause()})


def test_a_short_training_is_a_line_of_the_page(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case = training.Case(training.Settings(keep_params=0.3, epochs=3), 96, 0.6)
    monkeypatch.setitem(training.CASES, "digits", case)
    images = training.load("digits", None).first(96)
    row = training.measured(case, images)
    assert len(row["seconds"]["dense"]) == len(row["seconds"]["pruned"]) == 3
    assert row["kept"]["params"] <= 0.3
    text = training.page({"networks": {"digits": row}, "versions": {"torch": "0"}})
    assert "\n| digits | 96 | 3 |" in text


@pytest.fixture(scope="module")
def conditional() -> ModuleType:
    return benchmark("conditional")


def test_steps_on_open_units_run_and_have_lines_on_the_page(conditional: ModuleType) -> None:
    (found,) = conditional.measured(conditional.arguments(["--short"]))
    (row,) = found["rows"]
    assert 0 < row["macs"] < 1
    assert min(*row["open"], *row["dense"]) > 0
    record = {"found": [found], "threads": 1, "versions": {"torch": "0"}}
    assert "| 50% |" in conditional.page(record)


def test_the_page_of_conditional_steps_is_that_of_the_record(conditional: ModuleType) -> None:
    import json

    record = json.loads((ROOT / "results" / "conditional.json").read_text())
    assert (ROOT / "docs" / "conditional.md").read_text() == conditional.page(record)
