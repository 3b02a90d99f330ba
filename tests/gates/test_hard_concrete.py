"""Hard concrete's draws, chances and rules against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.errors import GateError
from secateur.gates import HardConcrete, Layout

N = 40_000
ONE = Layout((1,))
SHAPES = [HardConcrete(), HardConcrete(beta=0.4, gamma=-0.3, zeta=1.05), HardConcrete(beta=1.5, gamma=-0.05, zeta=1.4)]


def at(log_alpha, dtype=torch.float64):
    return {"log_alpha": torch.tensor([log_alpha], dtype=dtype)}


def draws(method, log_alpha, n=N):
    noise = method.noise(ONE, torch.Generator().manual_seed(1), dtype=torch.float64, draws=(n,))
    return method.sample(at(log_alpha), ONE, noise).squeeze(-1)


@pytest.mark.parametrize("method", SHAPES, ids=str)
@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.5])
def test_draws_follow_the_closed_form(method, log_alpha):
    """Kolmogorov-Smirnov on [0, 1): a true claim passes with probability at least 1 - 1e-6 (Massart's bound).

    P(z <= x) = sigma(beta logit((x - gamma) / (zeta - gamma)) - log_alpha) for 0 <= x < 1, which jumps at 0 and 1.
    """
    x = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1]
    claimed = torch.sigmoid(method.beta * torch.logit((x - method.gamma) / (method.zeta - method.gamma)) - log_alpha)
    ordered = draws(method, log_alpha).sort().values
    measured = torch.searchsorted(ordered, x, right=True) / N
    assert (claimed - measured).abs().max() < math.sqrt(math.log(2 / 1e-6) / (2 * N))


@pytest.mark.parametrize("method", SHAPES, ids=str)
@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.5])
def test_masses_at_0_and_1(method, log_alpha):
    """Within 4.5 standard errors; P(z = 1) = sigma(log_alpha - beta log((1 - gamma) / (zeta - 1)))."""
    z = draws(method, log_alpha)
    closed = 1 - method.prob_open(at(log_alpha), ONE).item()
    full = 1 / (1 + math.exp(method.beta * math.log((1 - method.gamma) / (method.zeta - 1)) - log_alpha))
    for chance, share in ((closed, (z == 0).double().mean()), (full, (z == 1).double().mean())):
        assert abs(share - chance) < 4.5 * math.sqrt(chance * (1 - chance) / N)


def test_gradcheck():
    method, layout = HardConcrete(), Layout((40,))
    noise = method.noise(layout, torch.Generator().manual_seed(0), dtype=torch.float64)
    log_alpha = torch.linspace(-3, 3, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: method.sample({"log_alpha": x}, layout, noise), (log_alpha,))
    assert torch.autograd.gradcheck(lambda x: method.prob_open({"log_alpha": x}, layout), (log_alpha,))
    assert torch.autograd.gradcheck(lambda x: method.fixed({"log_alpha": x}, layout), (log_alpha,))


def test_clipped_draws_carry_no_gradient():
    log_alpha = torch.tensor([-8.0, 0.3, 8.0], requires_grad=True)
    HardConcrete().sample({"log_alpha": log_alpha}, Layout((3,)), torch.zeros(3)).sum().backward()
    assert log_alpha.grad[0] == log_alpha.grad[2] == 0.0
    assert log_alpha.grad[1] > 0


def test_paper_rule_closes_at_minus_ln_11_where_31_percent_of_draws_are_open():
    method = HardConcrete(evaluation="paper")
    edge = -math.log(11)
    assert method.fixed(at(edge - 1e-9), ONE).item() == 0.0
    assert method.fixed(at(edge + 1e-6), ONE).item() > 0.0
    assert method.prob_open(at(edge), ONE).item() == pytest.approx(0.310, abs=5e-4)
    assert method.fixed(at(0.0), ONE).item() == pytest.approx(0.5)


def test_median_rule_closes_at_half_and_is_the_median_of_the_draws():
    method = HardConcrete(evaluation="median")
    edge = -method.open_shift
    assert method.prob_open(at(edge), ONE).item() == pytest.approx(0.5)
    assert method.fixed(at(edge - 1e-9), ONE).item() == 0.0
    assert method.fixed(at(edge + 1e-6), ONE).item() > 0.0
    assert method.fixed(at(-0.5), ONE).item() == pytest.approx(draws(method, -0.5).median().item(), abs=0.02)


def test_opened_is_the_median_of_the_draws_that_are_open():
    method = HardConcrete()
    z = draws(method, -2.6)
    assert method.fixed(at(-2.6), ONE).item() == 0.0
    assert method.opened(at(-2.6), ONE).item() == pytest.approx(z[z > 0].median().item(), abs=0.02)


@pytest.mark.parametrize(("drop_rate", "open_chance"), [(0.5, 0.832), (0.2, 0.952), (0.3, 0.920), (0.05, 0.989)])
def test_init_open_converts_the_papers_drop_rates(drop_rate, open_chance):
    chance = 1 / (1 + math.exp(-(math.log((1 - drop_rate) / drop_rate) + HardConcrete().open_shift)))
    assert chance == pytest.approx(open_chance, abs=1e-3)
    log_alpha = HardConcrete(init_open=chance).init(Layout((100,)), torch.Generator().manual_seed(0))["log_alpha"]
    assert log_alpha.mean().item() == pytest.approx(math.log((1 - drop_rate) / drop_rate), abs=0.005)
    assert log_alpha.std().item() == pytest.approx(0.01, rel=0.3)


def test_log_alpha_is_clamped():
    params = {"log_alpha": torch.tensor([-9.0, 1.0, 9.0])}
    HardConcrete().constrain_(params, Layout((3,)))
    assert params["log_alpha"].tolist() == pytest.approx([-4.605, 1.0, 4.605], abs=1e-3)
    free = {"log_alpha": torch.tensor([-9.0, 9.0])}
    HardConcrete(clamp=None).constrain_(free, Layout((2,)))
    assert free["log_alpha"].tolist() == [-9.0, 9.0]


@pytest.mark.parametrize(
    ("setting", "good", "bad", "expected"),
    [
        ("beta", 0.1, 0.0, r"\(0, inf\)"),
        ("beta", 2.0, -1.0, r"\(0, inf\)"),
        ("gamma", -0.5, 0.0, r"\(-inf, 0\)"),
        ("zeta", 1.5, 1.0, r"\(1, inf\)"),
        ("init_open", 0.2, 0.0, r"\(0, 1\)"),
        ("init_open", 0.99, 1.0, r"\(0, 1\)"),
        ("evaluation", "median", "mean", "'paper', 'median'"),
        ("clamp", None, 0.0, r"\(0, inf\)"),
    ],
)
def test_settings_are_checked(setting, good, bad, expected):
    assert getattr(HardConcrete(**{setting: good}), setting) == good
    with pytest.raises(GateError, match=f"HardConcrete: {setting} is {bad!r}.*{expected}"):
        HardConcrete(**{setting: bad})


def test_a_start_beyond_the_clamp_is_refused():
    assert HardConcrete(init_open=0.999, clamp=7.0).init_open == 0.999
    with pytest.raises(GateError, match=r"init_open=0\.999 needs log_alpha=5\.308"):
        HardConcrete(init_open=0.999)
