"""Each check with a value that passes and values that fail; descriptions that JSON can hold."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

from secateur.errors import GateError
from secateur.gates.noise import Normal
from secateur.gates.settings import Checks, described


def problems(check, *arguments):
    checks = Checks("Somewhere")
    getattr(checks, check)("value", *arguments)
    return checks.problems


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (("between", 0.0, 1.0), [0.5, 1e-9], [0.0, 1.0, -1, 2, float("nan"), "0.5", True, None]),
        (("between", None, 0.0), [-1, -1e30], [0, 1, float("-inf")]),
        (("between", 1.0, None), [1.5, 10**9], [1, float("inf")]),
        (("pair", 0.0, 1.0), [(0.1, 0.9), [0.2, 0.3]], [(0.9, 0.1), (0.5,), 0.5, (0.0, 0.5), (0.5, 1.0), "ab"]),
        (("count", 1), [1, 50], [0, -3, 1.0, True, "1"]),
        (("one_of", ("a", None)), ["a", None], ["b", 0, False]),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_checks_pass_what_is_right_and_record_what_is_not(check, good, bad):
    name, *limits = check
    for value in good:
        assert problems(name, value, *limits) == []
    for value in bad:
        (problem,) = problems(name, value, *limits)
        assert f"value is {value!r}, expected" in problem


def test_all_problems_are_raised_at_once():
    checks = Checks("Somewhere")
    checks.done()
    checks.between("a", 3, 0, 1, advice="take less")
    checks.holds(True, "not this")
    checks.holds(False, "the second")
    with pytest.raises(GateError, match=r"^Somewhere: a is 3, expected a number in \(0, 1\); take less; the second$"):
        checks.done()


def test_descriptions_are_json():
    @dataclass(frozen=True)
    class Settings:
        number: float = 0.5
        pair: tuple[float, float] = (0.1, 0.2)
        noise: object = Normal()
        function: object = torch.sigmoid
        nothing: None = None

    assert json.loads(json.dumps(described(Settings()))) == {
        "number": 0.5,
        "pair": [0.1, 0.2],
        "noise": {"kind": "normal"},
        "function": described(Settings())["function"],
        "nothing": None,
    }
    assert described(Settings())["function"].startswith("custom:")
