"""ARM and AR: the mean estimate is the exact gradient, by enumeration, for every link and both estimators."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from secateur.errors import GateError
from secateur.gates import ARM, Layout

LINKS = {"sigmoid": "sigmoid", "hard_sigmoid": "hard_sigmoid", "probit": torch.special.ndtr}
BATCHES, DRAWS = 250, 200


def table(n_gates):
    """A function of ``n_gates`` binary gates without structure, with an offset that AR has to average away."""
    values = torch.randn(2**n_gates, generator=torch.Generator().manual_seed(n_gates), dtype=torch.float64) + 1.0
    place = 2 ** torch.arange(n_gates)
    return lambda z: values[(z.long() * place).sum(-1)]


def quadratic(n_gates):
    """The squared error of gates that share one sum: every gate matters to every other."""
    weights = torch.linspace(-1, 2, n_gates, dtype=torch.float64)
    return lambda z: ((z * weights).sum(-1) - 0.7) ** 2


FUNCTIONS = {"table of 1": (1, table), "table of 5": (5, table), "quadratic of 8": (8, quadratic)}


def parameters(method, n_gates):
    """phi with chances spread over (0.1, 0.9)."""
    link = method._g
    points = [link.inverse(chance) / method.k for chance in torch.linspace(0.1, 0.9, n_gates).tolist()]
    return torch.tensor(points, dtype=torch.float64, requires_grad=True)


def exact_gradient(method, phi, function):
    """That of sum_z f(z) prod_i g_i^z_i (1 - g_i)^(1 - z_i), over all masks."""
    chance = method.prob_open({"phi": phi}, Layout((len(phi),)))
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(phi))), dtype=torch.float64)
    weights = torch.where(masks > 0, chance, 1 - chance).prod(-1)
    (gradient,) = torch.autograd.grad((weights * function(masks)).sum(), phi)
    return gradient


def estimates(method, phi, function, **options):
    """Independent estimates ``(BATCHES, U)``, each a mean over ``DRAWS`` draws."""
    layout, params, rows = Layout((len(phi),)), {"phi": phi}, []
    generator = torch.Generator().manual_seed(7)
    for _ in range(BATCHES):
        noise = method.noise(layout, generator, dtype=torch.float64, draws=(DRAWS,))
        loss = function(method.sample(params, layout, noise))
        second = function(method.antithetic(params, layout, noise)) if method.estimator == "arm" else None
        rows.append(torch.autograd.grad(method.surrogate(params, layout, noise, loss, second, **options), phi)[0])
    return torch.stack(rows)


def assert_unbiased(rows, exact):
    """Each mean within 4 standard errors."""
    error = rows.std(0) / math.sqrt(len(rows))
    assert ((rows.mean(0) - exact).abs() <= 4 * error + 1e-12).all()


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("rao_blackwell", [False, True], ids=["plain", "conditioned"])
@pytest.mark.parametrize("estimator", ["arm", "ar"])
@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
def test_mean_estimate_is_the_exact_gradient(link, estimator, rao_blackwell, function):
    n_gates, make = function
    method = ARM(link=link, estimator=estimator, k=3.0, rao_blackwell=rao_blackwell)
    phi, loss = parameters(method, n_gates), make(n_gates)
    assert_unbiased(estimates(method, phi, loss), exact_gradient(method, phi, loss))


def test_the_factor_k_alone_would_be_biased_for_the_hard_sigmoid():
    method = ARM(link="hard_sigmoid")
    phi, loss = parameters(method, 5), table(5)
    exact = exact_gradient(method, phi, loss)
    rows = estimates(method, phi, loss) / method.slope(phi) * method.k
    error = rows.std(0) / math.sqrt(BATCHES)
    assert ((rows.mean(0) - exact).abs() > 10 * error).any()


@pytest.mark.parametrize("make", [table, quadratic])
def test_two_passes_have_less_variance_than_one_and_conditioning_never_more(make):
    variance = {}
    for estimator, conditioned in itertools.product(("arm", "ar"), (False, True)):
        method = ARM(estimator=estimator, rao_blackwell=conditioned)
        variance[estimator, conditioned] = estimates(method, parameters(method, 8), make(8)).var(0)
    assert (variance["arm", False] < variance["ar", False]).all()
    for estimator in ("arm", "ar"):
        assert variance[estimator, True].sum() < variance[estimator, False].sum()


def test_a_baseline_keeps_the_mean_and_takes_variance_off_ar():
    method = ARM(estimator="ar")
    phi = parameters(method, 5)

    def loss(z):
        return table(5)(z) + 20.0

    exact = exact_gradient(method, phi, loss)
    plain = estimates(method, phi, loss)
    steadied = estimates(method, phi, loss, baseline=torch.tensor(21.0).expand(DRAWS))
    assert_unbiased(steadied, exact)
    assert (steadied.var(0) < 0.1 * plain.var(0)).all()


@pytest.mark.parametrize("estimator", ["arm", "ar"])
def test_credit_by_unit_is_exact_where_the_loss_is_a_sum(estimator):
    """Each unit is credited with its own part of f alone: same mean, less variance."""
    method = ARM(estimator=estimator)
    phi, weights = parameters(method, 6), torch.linspace(-2, 3, 6, dtype=torch.float64)
    exact = exact_gradient(method, phi, lambda z: (z * weights).sum(-1))
    shared = estimates(method, phi, lambda z: (z * weights).sum(-1))
    by_unit = estimates(method, phi, lambda z: z * weights)
    assert_unbiased(by_unit, exact)
    assert by_unit.var(0).sum() < shared.var(0).sum()


def test_one_step_by_hand():
    method, layout = ARM(k=7.0), Layout((3,))
    phi = torch.tensor([0.0, -0.1, 0.3], requires_grad=True)
    u = torch.tensor([0.2, 0.5, 0.95])
    term = method.surrogate({"phi": phi}, layout, u, torch.tensor(3.0), torch.tensor(1.0))
    term.backward()
    assert term.item() == 0.0
    torch.testing.assert_close(phi.grad, 7 * (1.0 - 3.0) * (u - 0.5))
    phi.grad = None
    ARM(estimator="ar").surrogate({"phi": phi}, layout, u, torch.tensor(3.0)).backward()
    torch.testing.assert_close(phi.grad, 7 * 3.0 * (1 - 2 * u))


def test_masks_are_those_of_the_paper():
    method, layout = ARM(link="hard_sigmoid", k=1.0), Layout((400,))
    phi = torch.linspace(-4, 4, 400, dtype=torch.float64)
    u = method.noise(layout, torch.Generator().manual_seed(0), dtype=torch.float64)
    chance = method.prob_open({"phi": phi}, layout)
    assert torch.equal(method.sample({"phi": phi}, layout, u) == 1, u < chance)
    assert torch.equal(method.antithetic({"phi": phi}, layout, u) == 1, u > 1 - chance)


def test_no_gradient_reaches_the_losses():
    method, layout = ARM(), Layout((2,))
    params = {"phi": torch.zeros(2, requires_grad=True)}
    losses = torch.tensor([2.0, 1.0], requires_grad=True)
    method.surrogate(params, layout, torch.tensor([0.1, 0.7]), losses[0], losses[1]).backward()
    assert losses.grad is None


def test_a_dead_chance_gets_no_estimate():
    """Where the hard sigmoid is 0 or 1 the factor is exactly 0, not infinite."""
    method = ARM(link="hard_sigmoid", k=7.0)
    phi = torch.tensor([-2.0, 0.0, 2.0], requires_grad=True)
    term = method.surrogate({"phi": phi}, Layout((3,)), torch.full((3,), 0.3), torch.tensor(5.0), torch.tensor(1.0))
    term.backward()
    assert phi.grad[0] == phi.grad[2] == 0.0
    assert phi.grad[1] != 0.0


@pytest.mark.parametrize("link", ["hard_sigmoid", torch.special.ndtr])
def test_chances_that_can_die_are_held(link):
    method, layout = ARM(link=link), Layout((3,))
    params = {"phi": torch.tensor([-50.0, 0.1, 50.0], dtype=torch.float64)}
    method.constrain_(params, layout)
    chance = method.prob_open(params, layout)
    assert chance[0].item() == pytest.approx(0.02)
    assert chance[2].item() == pytest.approx(0.98)
    assert params["phi"][1] == 0.1


def test_the_sigmoid_is_not_held_unless_asked():
    params = {"phi": torch.tensor([-50.0, 50.0])}
    ARM().constrain_(params, Layout((2,)))
    assert params["phi"].tolist() == [-50.0, 50.0]
    ARM(limits=(0.1, 0.95)).constrain_(params, Layout((2,)))
    assert ARM().prob_open(params, Layout((2,))).tolist() == pytest.approx([0.1, 0.95])


def test_evaluation_keeps_chances_of_at_least_half():
    layout = Layout((3,))
    params = {"phi": torch.tensor([-0.01, 0.0, 0.2])}
    chance = ARM().prob_open(params, layout)
    assert ARM().fixed(params, layout).tolist() == [0.0, 0.5, chance[2].item()]
    assert ARM(evaluation="binary").fixed(params, layout).tolist() == [0.0, 1.0, 1.0]


def test_start_is_that_of_the_paper():
    phi = ARM(init_open=0.99).init(Layout((2000,)), torch.Generator().manual_seed(0))["phi"]
    assert phi.mean().item() == pytest.approx(0.6564, abs=1e-3)
    assert phi.std().item() == pytest.approx(0.01 / 7, rel=0.1)


@pytest.mark.parametrize(
    ("estimator", "second", "match"),
    [("arm", None, "takes the loss under both draws"), ("ar", torch.tensor(1.0), "takes one loss")],
)
def test_each_estimator_asks_for_its_losses(estimator, second, match):
    method = ARM(estimator=estimator)
    params = method.init(Layout((3,)))
    with pytest.raises(GateError, match=match):
        method.surrogate(params, Layout((3,)), torch.rand(3), torch.tensor(1.0), second)


def test_one_mean_loss_for_several_draws_is_refused():
    method, layout = ARM(), Layout((3,))
    params, noise = method.init(layout), torch.rand(4, 3)
    method.surrogate(params, layout, noise, torch.rand(4), torch.rand(4))
    with pytest.raises(GateError, match=r"losses have shape \(\), expected \(4,\), one for each draw"):
        method.surrogate(params, layout, noise, torch.tensor(1.0), torch.tensor(2.0))


@pytest.mark.parametrize(
    ("setting", "good", "bad", "expected"),
    [
        ("init_open", 0.5, 0.0, r"\(0, 1\)"),
        ("estimator", "ar", "reinforce", "'arm', 'ar'"),
        ("k", 1.0, 0.0, r"\(0, inf\)"),
        ("evaluation", "binary", "mean", "'paper', 'binary'"),
        ("limits", (0.1, 0.95), (0.9, 0.1), "two numbers a < b"),
        ("link", "hard_sigmoid", "softmax", "'sigmoid', 'hard_sigmoid' or a function"),
    ],
)
def test_settings_are_checked(setting, good, bad, expected):
    assert getattr(ARM(**{setting: good}), setting) == good
    with pytest.raises(GateError, match=rf"ARM: {setting} is .*{expected}"):
        ARM(**{setting: bad})


def test_a_start_beyond_the_limits_is_refused():
    assert ARM(link="hard_sigmoid", init_open=0.98).init_open == 0.98
    with pytest.raises(GateError, match=r"init_open is 0\.99, expected a chance in \[0\.02, 0\.98\]"):
        ARM(link="hard_sigmoid", init_open=0.99)
    assert ARM(link="hard_sigmoid", init_open=0.99, limits=(0.01, 0.995)).init_open == 0.99
