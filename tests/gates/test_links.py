"""Links keep their promises, and functions that do not are refused with the place where they fail."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.errors import GateError
from secateur.gates.links import LINKS, link_from


def cauchy(t):
    return torch.atan(t) / math.pi + 0.5


def smooth_step(t):
    inside = (t / 4 + 0.5).clamp(0, 1)
    return inside**2 * (3 - 2 * inside)


GOOD = {**{name: name for name in LINKS}, "probit": torch.special.ndtr, "cauchy": cauchy, "step": smooth_step}


@pytest.mark.parametrize("value", GOOD.values(), ids=GOOD)
def test_links_are_antisymmetric_and_invertible(value):
    link = link_from(value)
    t = torch.linspace(-9, 9, 101, dtype=torch.float64)
    torch.testing.assert_close(link.chance(t) + link.chance(-t), torch.ones_like(t))
    for chance in (0.02, 0.3, 0.5, 0.9, 0.98):
        point = torch.tensor([link.inverse(chance)], dtype=torch.float64)
        assert link.chance(point).item() == pytest.approx(chance, abs=1e-9)


@pytest.mark.parametrize("value", GOOD.values(), ids=GOOD)
def test_slope_is_that_of_the_log_odds(value):
    link = link_from(value)
    t = torch.linspace(-1.7, 1.7, 41, dtype=torch.float64)
    step = 1e-6
    numeric = (torch.logit(link.chance(t + step)) - torch.logit(link.chance(t - step))) / (2 * step)
    torch.testing.assert_close(link.slope(t), numeric, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", ["hard_sigmoid", smooth_step, torch.special.ndtr])
def test_slope_is_zero_where_the_chance_is_0_or_1(value):
    t = torch.tensor([-90.0, 90.0])
    assert link_from(value).slope(t).tolist() == [0.0, 0.0]


def test_slope_of_the_sigmoid_is_exact_where_the_quotient_is_not():
    assert LINKS["sigmoid"].slope(torch.tensor([-90.0, 0.0, 90.0])).tolist() == [1.0, 1.0, 1.0]


def test_slope_works_without_gradients():
    with torch.no_grad():
        assert link_from(cauchy).slope(torch.zeros(3)).isfinite().all()


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("probit", "expected 'sigmoid', 'hard_sigmoid' or a function"),
        (3, "expected 'sigmoid', 'hard_sigmoid' or a function"),
        ("custom:mine.link", "pass the function itself"),
        (lambda t: torch.sigmoid(t - 0.1), r"not antisymmetric: g\(.*\) \+ g\(.*\) = .*, expected 1"),
        (lambda t: torch.sigmoid(-t), "decreases at t"),
        (lambda t: torch.tanh(t) + 0.5, r"leaves \[0, 1\]: from -0.5 to 1.5"),
        (lambda t: t * math.nan, r"leaves \[0, 1\]"),
        (lambda t: torch.sigmoid(t).sum(), "does not map a float64 tensor"),
        (lambda t: torch.sigmoid(t).float(), "does not map a float64 tensor"),
        (lambda t: torch.sigmoid(t.detach()), "not differentiable"),
        (lambda t: torch.sigmoid(t / t.abs().max()), "element by element"),
    ],
)
def test_functions_that_are_no_links_are_refused(value, match):
    with pytest.raises(GateError, match=match):
        link_from(value)


def test_a_link_that_never_comes_near_the_ends_is_refused_where_it_matters():
    flat = link_from(lambda t: 0.5 + 0.1 * torch.tanh(t))
    assert flat.inverse(0.55) == pytest.approx(math.atanh(0.5))
    with pytest.raises(GateError, match=r"never reaches the open chance 0\.9"):
        flat.inverse(0.9)
