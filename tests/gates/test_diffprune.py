"""DiffPrune's reading: two identities, the Bernoulli limit, exact ends, and gates that return."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from secateur.errors import GateError
from secateur.gates import ARM, Correlated, DiffPrune, HardConcrete, Layout, Logistic, Noise, Normal
from secateur.gates.noise import uniform

LAYOUT = Layout((4, 3))
N = 20_000


@dataclass(frozen=True)
class Skewed(Noise):
    """An exponential variable moved to median 0: a user's own, not symmetric."""

    def draw(self, layout, generator, *, dtype, device, draws):
        u = uniform(layout, generator, dtype=dtype, device=device, draws=draws)
        return -torch.log1p(-u) - math.log(2)

    def prob_above(self, threshold):
        return torch.exp(-(threshold + math.log(2)).clamp(min=0))


NOISES = {
    "normal": (Normal(), 0.3990),
    "logistic": (Logistic(), 0.2501),
    "correlated": (Correlated(rho=0.7), 0.3990),
    "skewed": (Skewed(), 1.0001),
}


def positions(dtype=torch.float64):
    return torch.linspace(-2.0, 2.0, 7, dtype=dtype)


def test_logistic_noise_at_two_thirds_is_hard_concrete():
    ours = DiffPrune(mode="stochastic", distribution="logistic", scale=1.0, tau=2 / 3)
    theirs = HardConcrete(evaluation="median")
    noise = ours.noise(LAYOUT, torch.Generator().manual_seed(0), dtype=torch.float64, draws=(1000,))
    again = theirs.noise(LAYOUT, torch.Generator().manual_seed(0), dtype=torch.float64, draws=(1000,))
    assert torch.equal(noise, again)
    x = positions().requires_grad_()
    gradients = []
    for method, name in ((ours, "x"), (theirs, "log_alpha")):
        z = method.sample({name: x}, LAYOUT, noise)
        gradients.append((z.detach(), *torch.autograd.grad(z.square().sum(), x)))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.prob_open({"x": x}, LAYOUT), theirs.prob_open({"log_alpha": x}, LAYOUT))
    torch.testing.assert_close(ours.fixed({"x": x}, LAYOUT), theirs.fixed({"log_alpha": x}, LAYOUT))


def test_cold_logistic_noise_is_the_bernoulli_gate_of_arm():
    ours = DiffPrune(mode="stochastic", distribution="logistic", scale=1.0, tau=1e-7)
    theirs = ARM(k=7.0)
    u = torch.rand(500, 7, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    x = positions()
    ours_z = ours.sample({"x": x}, LAYOUT, torch.logit(1 - u))  # positive exactly where u is under sigma(x)
    assert torch.equal(ours_z, theirs.sample({"phi": x / 7}, LAYOUT, u))
    torch.testing.assert_close(ours.prob_open({"x": x}, LAYOUT), torch.sigmoid(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("noise", "density"), NOISES.values(), ids=NOISES)
def test_gates_become_bernoulli_as_tau_falls(noise, density):
    """P(0 < z < 1) <= 4.796 tau M, and P(z = 1) tends to P(X > 0), each within 4.5 standard errors."""
    x = positions()
    for tau in (0.1, 0.01, 1e-6):
        method = DiffPrune(mode="stochastic", distribution=noise, tau=tau)
        eps = method.noise(LAYOUT, torch.Generator().manual_seed(2), dtype=torch.float64, draws=(N,))
        z = method.sample({"x": x}, LAYOUT, eps)
        between = ((z > 0) & (z < 1)).double().mean(0)
        bound = 4.796 * tau * density
        assert (between <= bound + 4.5 * math.sqrt(bound / N)).all()
    limit = noise.prob_above(-x)
    error = (limit * (1 - limit) / N).sqrt() + 1e-5
    assert (((z == 1).double().mean(0) - limit).abs() < 4.5 * error).all()


def test_the_limit_keeps_dependence():
    """P(both open) is the orthant probability 1/4 + asin(rho) / (2 pi) in a group and 1/4 across groups."""
    rho = 0.7
    method = DiffPrune(mode="stochastic", distribution=Correlated(rho=rho), tau=1e-6)
    eps = method.noise(LAYOUT, torch.Generator().manual_seed(2), dtype=torch.float64, draws=(N,))
    z = method.sample({"x": torch.zeros(7, dtype=torch.float64)}, LAYOUT, eps)
    error = 4.5 * math.sqrt(0.25 / N)
    assert abs((z[:, 0] * z[:, 1]).mean().item() - (0.25 + math.asin(rho) / (2 * math.pi))) < error
    assert abs((z[:, 0] * z[:, 5]).mean().item() - 0.25) < error


@pytest.mark.parametrize("mode", ["deterministic", "stochastic"])
@pytest.mark.parametrize("backward", ["smooth", "exact"])
def test_zeros_and_ones_are_exact_and_start_at_tau_ln_11(mode, backward):
    method = DiffPrune(mode=mode, backward=backward, tau=0.3)
    edge = 0.3 * math.log(11)
    x = torch.tensor([-50.0, -edge - 1e-5, -edge + 1e-3, edge - 1e-3, edge + 1e-5, 50.0, 0.0])
    z = method.fixed({"x": x}, LAYOUT)
    assert z[[0, 1]].tolist() == [0.0, 0.0]
    assert z[[4, 5]].tolist() == [1.0, 1.0]
    assert z[6].item() == pytest.approx(0.5)
    assert ((z[[2, 3]] > 0) & (z[[2, 3]] < 1)).all()


def test_deterministic_gates_are_the_same_in_training_and_evaluation():
    method = DiffPrune()
    params = {"x": positions()}
    assert method.noise(LAYOUT) is None
    assert torch.equal(method.sample(params, LAYOUT, None), method.fixed(params, LAYOUT))


def test_deterministic_surrogate_is_half_where_the_gate_closes_and_pushes_gates_at_1():
    method = DiffPrune(tau=0.3)
    x = torch.tensor([method.closing, 1.5, *[0.0] * 5], dtype=torch.float64, requires_grad=True)
    chance = method.prob_open({"x": x}, LAYOUT)
    chance.sum().backward()
    assert chance[0].item() == pytest.approx(0.5)
    assert method.fixed({"x": x}, LAYOUT)[1] == 1.0
    assert x.grad[1] > 0.05


def test_a_gate_at_1_is_told_to_fall_and_not_to_rise():
    method = DiffPrune()
    x = torch.tensor([2.0, 2.0, 0.0, 0.0, -2.0, -2.0, 2.0], dtype=torch.float64, requires_grad=True)
    gates = method.sample({"x": x}, LAYOUT, None)
    assert gates.tolist() == pytest.approx([1.0, 1.0, 0.5, 0.5, 0.0, 0.0, 1.0])
    gates.backward(torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 0.0], dtype=torch.float64))
    assert torch.sign(x.grad).tolist() == [1.0, 0.0, 1.0, -1.0, 1.0, -1.0, 0.0]


@pytest.mark.parametrize(("backward", "returns"), [("smooth", True), ("exact", False)])
def test_a_closed_gate_returns_when_the_loss_asks_and_the_backward_is_smooth(backward, returns):
    method = DiffPrune(backward=backward)
    x = torch.full((7,), -1.5, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.5)
    assert (method.fixed({"x": x}, LAYOUT) == 0).all()
    for _ in range(100):
        optimizer.zero_grad()
        loss = (method.sample({"x": x}, LAYOUT, None) - 1).square().sum()
        loss.backward()
        optimizer.step()
    assert (method.fixed({"x": x}, LAYOUT) > 0.9).all() == returns


def test_a_closed_gate_returns_under_noise_by_the_draws_that_open_it():
    method = DiffPrune(mode="stochastic")
    x = torch.full((7,), -1.5, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD([x], lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        (method.sample({"x": x}, LAYOUT, method.noise(LAYOUT, generator)) - 1).square().sum().backward()
        optimizer.step()
    assert (method.fixed({"x": x}, LAYOUT) == 1).all()


@pytest.mark.parametrize("backward", ["smooth", "exact"])
def test_gradient_between_the_ends_is_the_gates_own(backward):
    method = DiffPrune(tau=0.5, backward=backward)
    x = torch.linspace(-1.1, 1.1, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: method.sample({"x": value}, LAYOUT, None), (x,))


def test_start_states_the_first_gate():
    assert DiffPrune().start == 1.0
    for method in (DiffPrune(init_open=0.6, tau=0.5), DiffPrune(init_open=0.6, mode="stochastic")):
        gate = method.fixed(method.init(Layout((500,)), torch.Generator().manual_seed(0)), Layout((500,))).mean()
        assert gate.item() == pytest.approx(method.start, abs=0.01)


@pytest.mark.parametrize(("noise", "density"), NOISES.values(), ids=NOISES)
def test_init_open_is_the_chance_under_any_noise(noise, density):
    method = DiffPrune(init_open=0.65, mode="stochastic", distribution=noise, scale=0.4)
    params = method.init(LAYOUT, torch.Generator().manual_seed(0), torch.float64)
    eps = method.noise(LAYOUT, torch.Generator().manual_seed(1), dtype=torch.float64, draws=(N,))
    assert ((method.sample(params, LAYOUT, eps) > 0).double().mean(0) - 0.65).abs().max() < 0.05 * (1 + density)


def test_x_is_held_where_the_surrogate_is_within_limits():
    for method in (DiffPrune(limits=(0.05, 0.95)), DiffPrune(mode="stochastic", limits=(0.05, 0.95))):
        params = {"x": torch.tensor([-99.0, 99.0, *[0.0] * 5], dtype=torch.float64)}
        method.constrain_(params, LAYOUT)
        assert method.prob_open(params, LAYOUT)[:2].tolist() == pytest.approx([0.05, 0.95])
        assert params["x"][2] == 0.0


@pytest.mark.parametrize(
    ("setting", "good", "bad", "expected"),
    [
        ("init_open", 0.5, 1.0, r"\(0, 1\)"),
        ("mode", "stochastic", "random", "'deterministic', 'stochastic'"),
        ("scale", 0.2, 0.0, r"\(0, inf\)"),
        ("tau", 1.0, 0.0, r"\(0, inf\)"),
        ("surrogate_tau", 0.5, -1.0, r"\(0, inf\)"),
        ("gamma", -0.2, 0.1, r"\(-inf, 0\)"),
        ("zeta", 1.2, 0.9, r"\(1, inf\)"),
        ("backward", "exact", "soft", "'smooth', 'exact', None"),
        ("limits", (0.2, 0.95), (0.2,), "two numbers"),
    ],
)
def test_settings_are_checked(setting, good, bad, expected):
    assert getattr(DiffPrune(**{setting: good}), setting) == good
    with pytest.raises(GateError, match=rf"DiffPrune: {setting} is .*{expected}"):
        DiffPrune(**{setting: bad})


def test_a_start_beyond_the_limits_is_refused():
    with pytest.raises(GateError, match=r"init_open is 0\.995, expected a chance in \[0\.01, 0\.99\]"):
        DiffPrune(init_open=0.995)
    assert DiffPrune(init_open=0.995, limits=(0.01, 0.999)).init_open == 0.995


def test_noise_of_a_wrong_shape_is_refused():
    @dataclass(frozen=True)
    class Single(Normal):
        def draw(self, layout, generator, *, dtype, device, draws):
            return torch.zeros(1)

    with pytest.raises(GateError, match=r"Single\.draw gave shape \(1,\), expected \(7,\)"):
        DiffPrune(mode="stochastic", distribution=Single()).noise(LAYOUT)
