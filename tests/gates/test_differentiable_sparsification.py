"""Lee's method as we read it: exact zeros under plain optimizers, guards, and units that come back."""

from __future__ import annotations

import pytest
import torch

from secateur.errors import GateError
from secateur.gates import DifferentiableSparsification, Gate, Layout

N = 12
ONE_GROUP = Layout((N,))
USEFUL = 3


def optimizers(weight, gate):
    """Plain ones; weights decay, for gate times weight has a free scale in which a useless unit could hide."""
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": list(gate.parameters())}]
    return {
        "sgd": torch.optim.SGD(groups, lr=0.04),
        "momentum": torch.optim.SGD(groups, lr=0.008, momentum=0.9),
        "adam": torch.optim.Adam(groups, lr=0.02),
    }


def train(method, weight, optimizer, steps=600, penalty=0.1):
    """Least squares in which the first ``USEFUL`` units alone can lower the loss, with the method's L0 surrogate."""
    norms = weight.detach().abs() if method.uses_norms else None
    gate = Gate(method, ONE_GROUP, torch.Generator().manual_seed(0), norms=norms)
    target = torch.zeros(N)
    target[:USEFUL] = torch.tensor([2.0, -1.5, 1.0])
    weight.requires_grad_()
    step = optimizers(weight, gate)[optimizer]
    for _ in range(steps):
        norms = weight.abs() if method.uses_norms else None
        loss = (gate.sample(None, norms) * weight - target).square().sum() + penalty * gate.prob_open(norms).sum()
        step.zero_grad()
        loss.backward()
        step.step()
        gate.constrain_()
    assert loss.isfinite()
    return gate, gate.fixed(weight.detach().abs() if method.uses_norms else None)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("form", ["competitive", "independent"])
def test_useless_units_become_exactly_zero(form, optimizer):
    weight = 0.5 + 0.1 * torch.randn(N)
    _, gates = train(DifferentiableSparsification(form=form), weight, optimizer)
    assert (gates[:USEFUL] > 0).all()
    assert (gates[USEFUL:] == 0.0).all()


def test_shares_follow_the_formula():
    method = DifferentiableSparsification()
    layout = Layout((3, 4))
    alpha = torch.tensor([0.3, -1.0, 0.5, 1.0, 0.0, -2.0, 0.8], dtype=torch.float64)
    beta = torch.tensor([-1.4, -2.0], dtype=torch.float64)
    gates = method.fixed({"alpha": alpha, "beta": beta}, layout)
    parts = method.prob_open({"alpha": alpha, "beta": beta}, layout)
    norm = method.p_norm({"alpha": alpha, "beta": beta}, layout)
    for group, part in enumerate(layout.slices):
        over = (torch.softmax(alpha[part], 0) - torch.sigmoid(beta[group])).clamp(min=0)
        a = over / over.sum()
        torch.testing.assert_close(gates[part], len(a) * a)
        torch.testing.assert_close(parts[part], a.sqrt() * a.sqrt().sum())
        torch.testing.assert_close(norm[group], a.sqrt().sum() ** 2)
    assert (gates == 0).any()


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
def test_the_surrogate_counts_from_one_hot_to_uniform(p):
    method = DifferentiableSparsification(p=p)
    for n_open in (1, 3, 8):
        alpha = torch.where(torch.arange(8) < n_open, 3.0, -30.0).double()
        params = {"alpha": alpha, "beta": torch.tensor([-6.0], dtype=torch.float64)}
        assert method.prob_open(params, Layout((8,))).sum().item() == pytest.approx(n_open)
        assert method.p_norm(params, Layout((8,))).item() == pytest.approx(n_open ** (1 / p - 1))


def test_gates_of_a_group_sum_to_its_size():
    gate = Gate(DifferentiableSparsification(), Layout((5, 9)), dtype=torch.float64)
    with torch.no_grad():
        gate.alpha.normal_()
    assert gate.layout.sum(gate.fixed()).tolist() == pytest.approx([5.0, 9.0])


def test_renormalised_gates_keep_their_scale_as_others_close():
    method, plain = DifferentiableSparsification(renormalised=True), DifferentiableSparsification()
    layout = Layout((8, 5))
    for n_open in (1, 3, 5):
        alpha = torch.cat([torch.where(torch.arange(8) < n_open, 2.0, -30.0), torch.randn(5)]).double()
        params = {"alpha": alpha, "beta": torch.tensor([-6.0, -2.5], dtype=torch.float64)}
        gates = method.fixed(params, layout)
        torch.testing.assert_close(gates[:8], (torch.arange(8) < n_open).double())
        shares = plain.fixed(params, layout)[8:] / 5
        torch.testing.assert_close(gates[8:], shares / shares.square().sum())
        assert (shares * gates[8:]).sum().item() == pytest.approx(1.0)
        assert torch.equal(method.prob_open(params, layout), plain.prob_open(params, layout))


def test_gradient_of_renormalised_gates_is_that_of_their_formula():
    method, layout = DifferentiableSparsification(renormalised=True), Layout((4, 3))
    beta = torch.tensor([-3.0, -2.5], dtype=torch.float64)
    alpha = torch.linspace(-0.5, 0.5, 7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda alpha: method.sample({"alpha": alpha, "beta": beta}, layout, None), (alpha,))


def test_independent_gates_follow_the_formula():
    method = DifferentiableSparsification(form="independent")
    norms = torch.tensor([0.0, 0.2, 0.5, 2.0], dtype=torch.float64)
    params = {"beta": torch.logit(torch.tensor([0.3], dtype=torch.float64))}
    expected = [0.0, 0.0, 0.2 / 0.5, 1.7 / 2.0]
    assert method.fixed(params, Layout((4,)), norms).tolist() == pytest.approx(expected)
    chances = method.prob_open(params, Layout((4,)), norms)
    assert chances.tolist() == pytest.approx([value**0.5 for value in expected])


def test_a_group_never_closes_whole():
    """With the threshold over every share the largest unit stays, and nothing is divided by 0."""
    method, layout = DifferentiableSparsification(), Layout((4, 3, 1))
    alpha = torch.tensor([0.1, 0.2, 3.0, 0.0, 0.0, 0.0, 0.0, 5.0], requires_grad=True)
    beta = torch.full((3,), 50.0, requires_grad=True)
    gates = method.sample({"alpha": alpha, "beta": beta}, layout, None)
    assert gates.tolist() == [0.0, 0.0, 4.0, 0.0, 1.0, 1.0, 1.0, 1.0]  # of equal units all stay
    (gates.square().sum() + method.prob_open({"alpha": alpha, "beta": beta}, layout).sum()).backward()
    assert alpha.grad.isfinite().all()
    assert alpha.grad.abs().max() < 100
    with torch.no_grad():
        method.constrain_({"alpha": alpha, "beta": beta}, layout)
    shares = torch.softmax(alpha[:4], 0)
    assert torch.sigmoid(beta[0]).item() == pytest.approx(0.9 * shares.max().item())


def test_threshold_that_fits_is_not_moved():
    method = DifferentiableSparsification()
    params = method.init(Layout((4, 3)), torch.Generator().manual_seed(0))
    before = params["beta"].clone()
    method.constrain_(params, Layout((4, 3)))
    assert torch.equal(params["beta"], before)
    torch.testing.assert_close(torch.sigmoid(before), 0.1 / torch.tensor([4.0, 3.0]))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("form", ["competitive", "independent"])
def test_closed_units_reopen_when_the_loss_asks(form, optimizer):
    """Without elu's derivative the gradient at closed units would be 0 and these would stay closed."""
    method = DifferentiableSparsification(form=form)
    gate = Gate(method, ONE_GROUP, torch.Generator().manual_seed(0))
    weight = torch.full((N,), 0.5)
    with torch.no_grad():
        if form == "competitive":
            gate.alpha[:USEFUL] = -3.0
            gate.beta.fill_(-4.0)
        else:
            weight[:USEFUL] = 0.05
    weight.requires_grad_()

    def norms():
        return weight.abs() if method.uses_norms else None

    assert (gate.fixed(norms())[:USEFUL] == 0).all()
    assert (gate.fixed(norms())[USEFUL:] > 0).all()
    step = optimizers(weight, gate)[optimizer]
    for _ in range(400):
        loss = (gate.sample(None, norms()) * weight - 1.0).square().sum()
        step.zero_grad()
        loss.backward()
        step.step()
        gate.constrain_()
    assert (gate.fixed(norms())[:USEFUL] > 0).all()


def test_the_penalty_leaves_closed_units_alone():
    """Its own gradient is exact: 0 through the relu of a closed unit, so that only the task can bring it back."""
    method, layout = DifferentiableSparsification(form="independent"), Layout((3,))
    norms = torch.tensor([0.01, 0.5, 0.8], requires_grad=True)
    method.prob_open({"beta": torch.zeros(1) - 1.5}, layout, norms).sum().backward()
    assert norms.grad[0] == 0.0
    assert (norms.grad[1:] > 0).all()


def test_a_demand_for_more_open_units_reaches_closed_ones_and_opens_them():
    layout = Layout((4,))
    method = DifferentiableSparsification()
    alpha = torch.tensor([1.0, 0.5, -1.0, -2.0], dtype=torch.float64, requires_grad=True)
    beta = torch.logit(torch.tensor([0.15], dtype=torch.float64)).requires_grad_()
    params = {"alpha": alpha, "beta": beta}
    closed = method.fixed(params, layout) == 0
    assert closed.tolist() == [False, False, True, True]
    optimizer = torch.optim.SGD([alpha], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (-method.prob_open(params, layout)[2]).backward()
        optimizer.step()
        if (method.fixed(params, layout) > 0)[2]:
            break
    assert (method.fixed(params, layout) > 0)[2]


def test_an_opened_unit_is_worth_as_much_as_the_smallest_open_one_of_its_group():
    layout = Layout((4, 2))
    method = DifferentiableSparsification()
    params = {
        "alpha": torch.tensor([1.0, 0.5, -1.0, -2.0, 0.0, 0.0], dtype=torch.float64),
        "beta": torch.logit(torch.tensor([0.15, 0.2], dtype=torch.float64)),
    }
    fixed, opened = method.fixed(params, layout), method.opened(params, layout)
    assert torch.equal(opened[:4], fixed[1].expand(4))
    assert torch.equal(opened[4:], fixed[4].expand(2))


def test_score_of_open_units_forgets_how_far_the_threshold_has_fallen():
    """Else groups without competition, whose threshold falls without end, would never be asked to close a unit."""
    layout, method = Layout((4, 4)), DifferentiableSparsification()
    alpha = torch.tensor([0.1, 0.0, -0.1, -9.0] * 2, dtype=torch.float64)
    low, lower = torch.logit(torch.tensor([0.01, 1e-6], dtype=torch.float64))
    params = {"alpha": alpha, "beta": torch.stack([low, lower])}
    gates, score = method.fixed(params, layout), method.score(params, layout)
    assert (gates > 0).tolist() == [True, True, True, False, True, True, True, True]
    assert torch.equal(score > 0, gates > 0)
    torch.testing.assert_close(score[:3], score[4:7], rtol=0.01, atol=0.01)
    assert score.view(2, 4).diff(dim=1).lt(0).all(), "the order within a group is that of the shares"


def test_gradients_are_finite_where_gates_and_norms_are_0():
    for form in ("competitive", "independent"):
        method = DifferentiableSparsification(form=form)
        gate = Gate(method, ONE_GROUP)
        norms = torch.zeros(N, requires_grad=True) if method.uses_norms else None
        with torch.no_grad():
            gate.beta.fill_(-60.0)
            if form == "competitive":
                gate.alpha[: N // 2] = -200.0
        assert (gate.fixed(norms)[: N // 2] == 0).all()
        (gate.sample(None, norms).sum() + gate.prob_open(norms).sum()).backward()
        for value in gate.parameters():
            assert value.grad.isfinite().all()
        assert norms is None or norms.grad.isfinite().all()


def test_slope_of_the_surrogate_is_held_near_0():
    """z^p alone has slope p z^(p - 1), here 5000 at z = 1e-8; it is held at its value at z = 0.01."""
    method = DifferentiableSparsification(form="independent")
    norms = torch.tensor([0.5 + 5e-9, 1.0], dtype=torch.float64, requires_grad=True)
    method.prob_open({"beta": torch.zeros(1, dtype=torch.float64)}, Layout((2,)), norms).sum().backward()
    assert norms.grad[0].item() == pytest.approx(0.5 * 0.01**-0.5 * 2, rel=1e-3)
    assert norms.grad[1].item() == pytest.approx(0.5 * 0.5**-0.5 * 0.5)


def test_away_from_the_guards_gradients_are_those_of_the_formula():
    method = DifferentiableSparsification()
    alpha = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    beta = torch.tensor([-6.0], dtype=torch.float64, requires_grad=True)

    def surrogate(a, b):
        return method.prob_open({"alpha": a, "beta": b}, ONE_GROUP)

    def gates(a, b):
        return method.sample({"alpha": a, "beta": b}, ONE_GROUP, None)

    assert (gates(alpha, beta) > 0.01).all()
    assert torch.autograd.gradcheck(surrogate, (alpha, beta))
    assert torch.autograd.gradcheck(gates, (alpha, beta))


def test_uniform_alpha_would_not_move_which_is_why_the_start_is_jittered():
    method = DifferentiableSparsification()
    alpha = torch.zeros(N, dtype=torch.float64, requires_grad=True)
    beta = torch.tensor([-6.0], dtype=torch.float64)
    method.prob_open({"alpha": alpha, "beta": beta}, ONE_GROUP).sum().backward()
    assert alpha.grad.abs().max() < 1e-12
    params = method.init(ONE_GROUP, torch.Generator().manual_seed(0))
    assert params["alpha"].std().item() == pytest.approx(0.01, rel=0.5)


def test_start_of_the_independent_form_follows_the_norms():
    method, layout = DifferentiableSparsification(form="independent", init_open=0.8), Layout((4, 6))
    norms = torch.tensor([0.02, 0.03, 0.05, 0.02, 0.4, 0.5, 0.6, 0.5, 0.4, 0.6])
    params = method.init(layout, norms=norms)
    typical = layout.spread(layout.sum(norms) / layout.counts)
    torch.testing.assert_close(method.fixed(params, layout, typical), torch.full((10,), 0.8))
    assert (method.fixed(params, layout, norms) > 0).all()
    blind = method.init(layout)
    torch.testing.assert_close(torch.sigmoid(blind["beta"]), torch.full((2,), 0.2))


@pytest.mark.parametrize(
    ("setting", "good", "bad", "expected"),
    [
        ("form", "independent", "exclusive", "'competitive', 'independent'"),
        ("init_open", 0.5, 1.0, r"\(0, 1\)"),
        ("p", 0.9, 1.0, r"\(0, 1\)"),
        ("p", 0.1, 0.0, r"\(0, 1\)"),
        ("jitter", 0.1, 0.0, r"\(0, inf\)"),
        ("renormalised", True, 1, "True, False"),
    ],
)
def test_settings_are_checked(setting, good, bad, expected):
    assert getattr(DifferentiableSparsification(**{setting: good}), setting) == good
    with pytest.raises(GateError, match=rf"{setting} is .*{expected}"):
        DifferentiableSparsification(**{setting: bad})


def test_independent_gates_are_never_renormalised():
    with pytest.raises(GateError, match="renormalised is for the competitive form"):
        DifferentiableSparsification(form="independent", renormalised=True)
