"""The table of methods, and the errors that name what it holds."""

from __future__ import annotations

import json

import pytest

from secateur.errors import GateError
from secateur.gates import METHODS, method_from_name


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_made_by_name(name):
    method = method_from_name(name)
    assert method.name == name
    json.dumps(method.settings())


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("hard_concrete", {}, "expected one of 'hard-concrete', 'arm', 'ar', 'diffprune', 'diff-sparse', 'magnitude'"),
        ("arm", {"beta": 1.0}, r"unknown settings \['beta'\]; expected some of init_open, estimator, link"),
        ("ar", {"estimator": "arm"}, "its settings make 'arm'"),
        ("hard-concrete", {"beta": -1.0}, "beta is -1.0, expected a number in"),
    ],
)
def test_impossible_names_and_settings_are_refused(name, settings, match):
    with pytest.raises(GateError, match=match):
        method_from_name(name, **settings)
