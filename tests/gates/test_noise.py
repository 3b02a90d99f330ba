"""Draws against the distribution functions that they claim, with stated confidence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from secateur.errors import GateError
from secateur.gates import Correlated, Layout, Logistic, Noise, Normal
from secateur.gates.noise import noise_from, uniform

NOISES = {
    "normal": Normal(),
    "logistic": Logistic(),
    "correlated normal": Correlated(rho=0.6),
    "correlated logistic": Correlated(rho=0.6, marginal="logistic"),
}
LAYOUT = Layout((2, 1))


def draw(noise, n, layout=LAYOUT, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return noise.draw(layout, generator, dtype=dtype, device="cpu", draws=(n,))


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_draws_follow_their_distribution(noise):
    """Kolmogorov-Smirnov: a true claim stays under this distance with probability 1 - 1e-6 (Massart's bound)."""
    n = 20_000
    limit = math.sqrt(math.log(2 / 1e-6) / (2 * n))
    for values in draw(noise, n).unbind(-1):
        ordered = values.sort().values
        below = 1 - noise.prob_above(ordered)
        steps = torch.arange(n + 1, dtype=torch.float64) / n
        assert max((below - steps[:-1]).abs().max(), (below - steps[1:]).abs().max()) < limit


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_upper_quantile_inverts_prob_above(noise):
    chances = torch.tensor([1e-4, 0.01, 0.3, 0.5, 0.9, 0.999], dtype=torch.float64)
    torch.testing.assert_close(noise.prob_above(noise.upper_quantile(chances)), chances, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_prob_above_is_differentiable(noise):
    assert torch.autograd.gradcheck(noise.prob_above, (torch.randn(9, dtype=torch.float64, requires_grad=True),))


def test_only_units_of_one_group_are_correlated():
    n = 20_000
    correlations = torch.corrcoef(draw(Correlated(rho=0.6), n).T)
    tolerance = 4.5 / math.sqrt(n)
    assert abs(correlations[0, 1] - 0.6) < tolerance
    assert correlations[:2, 2].abs().max() < tolerance
    assert torch.corrcoef(draw(Normal(), n).T)[0, 1].abs() < tolerance


def test_logistic_tails_of_the_copula_are_finite():
    extreme = Correlated(rho=0.999, marginal="logistic")
    assert draw(extreme, 50_000, dtype=torch.float32).isfinite().all()


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_settings_make_the_round_trip(noise):
    assert noise_from(noise.settings()) == noise
    assert noise_from(noise) is noise


def test_low_precision_is_drawn_in_float32():
    assert uniform(LAYOUT, None, dtype=torch.bfloat16, device="cpu").dtype == torch.float32


@pytest.mark.parametrize("rho", [0.0, 1.0, -0.5])
def test_impossible_correlations_are_refused(rho):
    assert Correlated(rho=0.5).rho == 0.5
    with pytest.raises(GateError, match="rho is"):
        Correlated(rho=rho)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("gauss", "expected a Noise or one of 'normal', 'logistic', 'correlated'"),
        ({"kind": "normal", "rho": 0.5}, "rho"),
        ({"rho": 0.5}, "expected a Noise or one of"),
        ("custom:mine.Noise", "pass the object itself"),
        ({"kind": "correlated", "marginal": "cauchy"}, "marginal is 'cauchy', expected one of 'normal', 'logistic'"),
    ],
)
def test_unknown_noise_is_refused(value, match):
    with pytest.raises(GateError, match=match):
        noise_from(value)


def test_a_noise_of_ones_own_needs_two_methods():
    @dataclass(frozen=True)
    class Uniform(Noise):
        def draw(self, layout, generator, *, dtype, device, draws):
            return 2 * uniform(layout, generator, dtype=dtype, device=device, draws=draws) - 1

        def prob_above(self, threshold):
            return ((1 - threshold) / 2).clamp(0, 1)

    assert Uniform().upper_quantile(torch.tensor(0.25)).item() == pytest.approx(0.5)
    assert draw(Uniform(), 10).shape == (10, 3)
