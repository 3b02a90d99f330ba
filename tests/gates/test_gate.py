"""The contract that every gate method keeps. A new method is one row of ``METHODS_UNDER_TEST``."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass

import pytest
import torch

from secateur.errors import GateError
from secateur.gates import (
    ARM,
    METHODS,
    DifferentiableSparsification,
    DiffPrune,
    Gate,
    HardConcrete,
    Layout,
    Magnitude,
    Method,
    ScoreFunction,
    StraightThrough,
    method_from_name,
)
from secateur.gates.magnitude import STEP

LAYOUT = Layout((1, 5, 3, 2))
EXTREMES = (-200.0, -30.0, -3.0, 0.0, 3.0, 30.0, 200.0)


@dataclass(frozen=True)
class Row:
    """One method with canonical settings.

    Args:
        method: what is tested.
        starts_at: the open chance that its settings promise at the start, for units of norm 1.
        counts_only: its open chances are counts by group (1 to n), not numbers in [0, 1].
    """

    method: Method
    starts_at: float
    counts_only: bool = False


METHODS_UNDER_TEST = {
    "hard-concrete": Row(HardConcrete(init_open=0.8), 0.8),
    "hard-concrete median": Row(HardConcrete(init_open=0.6, evaluation="median", clamp=None), 0.6),
    "arm": Row(ARM(init_open=0.7), 0.7),
    "arm hard sigmoid": Row(ARM(init_open=0.7, link="hard_sigmoid"), 0.7),
    "arm own link": Row(ARM(init_open=0.7, link=torch.special.ndtr, k=2.0), 0.7),
    "ar binary": Row(ARM(init_open=0.5, estimator="ar", evaluation="binary", rao_blackwell=True), 0.5),
    "diffprune": Row(DiffPrune(init_open=0.8), 0.8),
    "diffprune exact": Row(DiffPrune(init_open=0.8, backward="exact", tau=0.5), 0.8),
    "diffprune normal": Row(DiffPrune(init_open=0.8, mode="stochastic"), 0.8),
    "diffprune correlated": Row(
        DiffPrune(init_open=0.7, mode="stochastic", distribution={"kind": "correlated", "marginal": "logistic"}), 0.7
    ),
    "diff-sparse": Row(DifferentiableSparsification(), 1.0, counts_only=True),
    "diff-sparse independent": Row(DifferentiableSparsification(form="independent", init_open=0.81), 0.9),
    "magnitude": Row(Magnitude(final_closed=0.6, steps=10), 1.0),
    "magnitude global": Row(Magnitude(final_closed=0.6, steps=10, scope="global"), 1.0),
    "straight-through": Row(StraightThrough(init_open=0.75), 0.75),
}


@pytest.fixture(params=METHODS_UNDER_TEST)
def row(request):
    return METHODS_UNDER_TEST[request.param]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def norms_for(method, layout=LAYOUT, dtype=torch.float32):
    if not method.uses_norms:
        return None
    return 0.3 + torch.rand(layout.total, generator=generator(5), dtype=dtype)


def scattered(method, layout=LAYOUT, dtype=torch.float32, spread=2.0):
    """Parameters far from the start, some units open and some closed."""
    params = method.init(layout, generator(), dtype)
    for value in params.values():
        if value.is_floating_point():
            value.add_(spread * torch.randn(value.shape, generator=generator(1), dtype=dtype))
        else:
            value.fill_(7 * STEP)
    method.constrain_(params, layout)
    return params


def closed_at(method, mask, dtype=torch.float32):
    """Parameters and norms that close the units of ``mask`` as firmly as the method can."""
    params, norms = method.init(LAYOUT, generator(), dtype), norms_for(method, dtype=dtype)
    for value in params.values():
        if not value.is_floating_point():
            value.fill_(10**6 * STEP)
        elif value.shape == mask.shape:
            value.masked_fill_(mask, -40.0)
    return params, norms if norms is None else norms.masked_fill(mask, 1e-6)


def test_the_table_holds_every_method():
    assert {type(row.method) for row in METHODS_UNDER_TEST.values()} == {
        type(method_from_name(name)) for name in METHODS
    }


def test_units_start_at_the_promised_open_chance(row):
    layout = Layout((150, 50))
    norms = torch.ones(200) if row.method.uses_norms else None
    params = row.method.init(layout, generator())
    chances = row.method.prob_open(params, layout, norms)
    assert chances.shape == (200,)
    torch.testing.assert_close(chances, torch.full_like(chances, row.starts_at), atol=0.03, rtol=0)


def test_equal_units_do_not_start_equal(row):
    trained = {name: value for name, value in row.method.init(LAYOUT, generator()).items() if value.shape == (11,)}
    assert all(value.unique().numel() == 11 for value in trained.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_answers_have_one_entry_a_unit_and_keep_the_type(row, dtype):
    method, norms = row.method, norms_for(row.method, dtype=dtype)
    params = scattered(method, dtype=dtype)
    noise = method.noise(LAYOUT, generator(), dtype=dtype)
    answers = [getattr(method, name)(params, LAYOUT, norms) for name in ("prob_open", "fixed", "opened", "score")]
    for answer in [method.sample(params, LAYOUT, noise, norms), *answers]:
        assert answer.shape == (11,)
        assert answer.dtype == dtype
        assert answer.isfinite().all()


@pytest.mark.parametrize("draws", [(), (4,)], ids=["one draw", "four draws"])
def test_a_draw_in_closed_form_is_the_sample_with_the_gradient_that_autograd_finds(row, draws):
    method, norms = row.method, norms_for(row.method, dtype=torch.float64)
    params = scattered(method, dtype=torch.float64)
    noise = method.noise(LAYOUT, generator(), dtype=torch.float64, draws=draws)
    found = method.drawn(params, LAYOUT, noise, norms)
    if found is None:
        assert method.estimator == "pathwise"
        return
    values, pull = found
    twins = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in params.items()}
    sample = method.sample(twins, LAYOUT, noise, norms)
    assert torch.equal(values, sample.detach())
    if method.estimator != "pathwise":
        return
    for seed in (1, 2):  # a second time as the first: it may be asked again
        outer = torch.randn(sample.shape, generator=generator(seed), dtype=torch.float64)
        wanted = torch.autograd.grad(sample, twins.values(), outer, retain_graph=True)
        torch.testing.assert_close(list(pull(outer).values()), list(wanted))


def test_several_draws_come_at_once(row):
    method, norms = row.method, norms_for(row.method)
    noise = method.noise(LAYOUT, generator(), draws=(4, 3))
    params = scattered(method)
    z = method.sample(params, LAYOUT, noise, norms)
    if noise is None:
        assert z.shape == (11,)
        return
    assert noise.shape == z.shape == (4, 3, 11)
    assert not noise.requires_grad
    one_by_one = torch.stack([method.sample(params, LAYOUT, part, norms) for part in noise.reshape(-1, 11)])
    torch.testing.assert_close(z.reshape(-1, 11), one_by_one)


def test_closed_units_are_exactly_zero(row):
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 0, 0, 1, 0, 1], dtype=torch.bool)
    params, norms = closed_at(row.method, mask)
    noise = row.method.noise(LAYOUT, generator(), draws=(50,))
    z = row.method.sample(params, LAYOUT, noise, norms)
    assert (z[..., mask] == 0.0).all()
    assert (row.method.fixed(params, LAYOUT, norms)[mask] == 0.0).all()
    if row.method.binary:
        assert ((z == 0.0) | (z == 1.0)).all()


def test_closed_gates_hear_the_task_where_the_method_says_so(row):
    method, norms = row.method, norms_for(row.method, dtype=torch.float64)
    params = {name: value.requires_grad_(value.is_floating_point()) for name, value in at_zero(method).items()}
    noise = method.noise(LAYOUT, generator(), dtype=torch.float64, draws=(40,))
    if norms is not None:
        norms[:3] = 1e-2
        norms.requires_grad_()
    z = method.sample(params, LAYOUT, noise, norms)
    closed = z == 0
    assert closed.any()
    heard = torch.zeros(())
    if z.requires_grad:
        told = [*(value for value in params.values() if value.requires_grad), *([] if norms is None else [norms])]
        grads = torch.autograd.grad(z, told, closed.double() * torch.randn_like(z), allow_unused=True)
        heard = torch.stack([grad.abs().sum() for grad in grads if grad is not None]).sum()
    assert (heard != 0) == method.hears_closed


def at_zero(method):
    """Parameters of which some draws close units, one of them just at the border."""
    params = scattered(method, dtype=torch.float64)
    if isinstance(method, DiffPrune):
        params["x"][:3] = torch.tensor([method.closing, method.closing - 1e-3, -3.0])
        method.constrain_(params, LAYOUT)
    return params


def test_open_gates_are_positive(row):
    params, norms = scattered(row.method), norms_for(row.method)
    noise = row.method.noise(LAYOUT, generator(), draws=(20,))
    assert (row.method.sample(params, LAYOUT, noise, norms) >= 0).all()
    assert (row.method.fixed(params, LAYOUT, norms) >= 0).all()
    assert (row.method.opened(params, LAYOUT, norms) > 0).all()


def test_evaluation_is_deterministic_and_draws_no_random_numbers(row):
    params, norms = scattered(row.method), norms_for(row.method)
    before = torch.get_rng_state()
    first = row.method.fixed(params, LAYOUT, norms)
    assert torch.equal(first, row.method.fixed(params, LAYOUT, norms))
    assert torch.equal(before, torch.get_rng_state())


def test_draws_come_from_the_generator_alone(row):
    before = torch.get_rng_state()
    draws = [row.method.noise(LAYOUT, generator(3)) for _ in range(2)]
    other = row.method.noise(LAYOUT, generator(4))
    params = [row.method.init(LAYOUT, generator(3)) for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state())
    if draws[0] is None:
        assert other is None
    else:
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], other)
    assert all(torch.equal(params[0][name], params[1][name]) for name in params[0])


@pytest.mark.parametrize("extreme", EXTREMES)
def test_open_chances_are_in_range(row, extreme):
    params, norms = scattered(row.method), norms_for(row.method)
    for value in params.values():
        if value.is_floating_point():
            value.add_(extreme)
    chances = row.method.prob_open(params, LAYOUT, norms)
    assert (chances >= 0).all()
    if row.counts_only:
        counts = LAYOUT.sum(chances)
        assert (counts >= 1 - 1e-5).all()
        assert (counts <= LAYOUT.counts + 1e-5).all()
    else:
        assert (chances <= 1).all()


@pytest.mark.parametrize("extreme", EXTREMES)
def test_gradients_are_finite_at_extreme_parameters(row, extreme):
    method, norms = row.method, norms_for(row.method)
    if norms is not None:
        norms = norms.masked_fill(torch.arange(11) % 3 == 0, 0.0).requires_grad_()
    for only_first in (False, True):
        params = method.init(LAYOUT, generator())
        trained = [value for value in params.values() if value.is_floating_point()]
        for value in trained:
            value[0 if only_first else slice(None)] = extreme
            value.requires_grad_()
        noise = method.noise(LAYOUT, generator())
        z, chances = method.sample(params, LAYOUT, noise, norms), method.prob_open(params, LAYOUT, norms)
        weights = torch.randn(11, generator=generator(2))
        total = (weights * chances).sum() + (weights * z).sum()
        if isinstance(method, ScoreFunction):
            second = torch.tensor(-1.0) if method.estimator == "arm" else None
            total = total + method.surrogate(params, LAYOUT, noise, torch.tensor(2.0), second)
        if total.requires_grad:
            total.backward()
        for value in trained if norms is None else [*trained, norms]:
            assert value.grad is None or value.grad.isfinite().all()
        scores = method.score(params, LAYOUT, None if norms is None else norms.detach())
        assert scores.isfinite().all()


def test_open_chance_is_the_share_of_draws_that_open(row):
    """Within 4.5 standard errors for each of 11 units; methods with a surrogate say that they are not calibrated."""
    method, norms, n = row.method, norms_for(row.method), 20_000
    params = scattered(method, spread=0.5)
    noise = method.noise(LAYOUT, generator(), draws=(n,))
    z = method.sample(params, LAYOUT, noise, norms).expand(n, 11)
    chances = method.prob_open(params, LAYOUT, norms)
    if not method.calibrated:
        assert ((z != 0).float().mean(0) - chances).abs().max() > 0.01
        return
    error = (chances * (1 - chances) / n).sqrt() + 1e-6
    assert (((z != 0).double().mean(0) - chances).abs() < 4.5 * error).all()


def test_scores_rank_open_units_over_closed_ones(row):
    for seed in range(5):
        params, norms = scattered(row.method, spread=1.0 + seed), norms_for(row.method)
        scores = row.method.score(params, LAYOUT, norms)
        is_open = row.method.fixed(params, LAYOUT, norms) != 0
        for part in LAYOUT.slices:
            opened, closed = scores[part][is_open[part]], scores[part][~is_open[part]]
            if len(opened) and len(closed):
                assert opened.min() >= closed.max()


def test_constraining_leaves_ordinary_parameters_alone(row):
    params = row.method.init(LAYOUT, generator())
    before = {name: value.clone() for name, value in params.items()}
    row.method.constrain_(params, LAYOUT)
    for name, value in params.items():
        if value.is_floating_point():
            assert torch.equal(value, before[name])


def test_settings_survive_json(row):
    settings = row.method.settings()
    if callable(getattr(row.method, "link", None)):
        assert settings["link"].startswith("custom:")
        with pytest.raises(GateError, match="pass the function itself"):
            method_from_name(row.method.name, **settings)
        return
    recorded = json.loads(json.dumps(settings))
    assert method_from_name(row.method.name, **recorded) == row.method


def test_methods_are_values(row):
    assert hash(row.method) == hash(copy.deepcopy(row.method))
    assert pickle.loads(pickle.dumps(row.method)) == row.method
    with pytest.raises(AttributeError):
        row.method.init_open = 0.1


def test_the_start_can_be_moved_where_there_is_one(row):
    if isinstance(row.method, Magnitude):
        with pytest.raises(GateError, match="has no init_open"):
            row.method.with_init_open(0.5)
        return
    assert row.method.with_init_open(0.5).init_open == 0.5
    with pytest.raises(GateError, match="init_open"):
        row.method.with_init_open(1.0)


@pytest.mark.parametrize("wrong", [None, torch.ones(10)])
def test_norms_are_asked_for_where_they_are_needed(row, wrong):
    if row.method.uses_norms:
        with pytest.raises(GateError, match="norms"):
            row.method.fixed(scattered(row.method), LAYOUT, wrong)
    else:
        assert row.method.fixed(scattered(row.method), LAYOUT, wrong).shape == (11,)


def test_gate_owns_the_tensors_and_repeats_the_method(row):
    gate, norms = Gate(row.method, LAYOUT, generator(), torch.float64), norms_for(row.method, dtype=torch.float64)
    noise = gate.draw_noise(generator(1))
    plain = row.method.init(LAYOUT, generator(), torch.float64)
    assert list(gate.state_dict()) == list(plain)
    assert {name for name, _ in gate.named_parameters()} == {
        name for name, value in plain.items() if value.is_floating_point()
    }
    assert torch.equal(gate.sample(noise, norms), row.method.sample(plain, LAYOUT, noise, norms))
    assert torch.equal(gate.prob_open(norms), row.method.prob_open(plain, LAYOUT, norms))
    assert torch.equal(gate.fixed(norms), row.method.fixed(plain, LAYOUT, norms))
    assert torch.equal(gate.score(norms), row.method.score(plain, LAYOUT, norms))
    assert not gate.score(norms).requires_grad
    gate.constrain_()
    assert gate.layout == LAYOUT
    assert "units=11" in repr(gate)


def test_state_makes_the_round_trip(row):
    gate, fresh = Gate(row.method, LAYOUT, generator()), Gate(row.method, LAYOUT, generator(9))
    norms = norms_for(row.method)
    gate.constrain_()
    fresh.load_state_dict(gate.state_dict())
    assert torch.equal(gate.fixed(norms), fresh.fixed(norms))
    gate.force(torch.arange(11) % 2 == 0)
    fresh.load_state_dict(gate.state_dict())
    assert torch.equal(gate.fixed(norms), fresh.fixed(norms))
    assert torch.equal(copy.deepcopy(gate).fixed(norms), gate.fixed(norms))
    gate.force(None)
    fresh.load_state_dict(gate.state_dict())
    assert torch.equal(gate.fixed(norms), fresh.fixed(norms))
    assert fresh.forced_open is None


def test_forced_units_obey(row):
    gate, norms = Gate(row.method, LAYOUT, generator()), norms_for(row.method)
    with torch.no_grad():
        for name, value in scattered(row.method).items():
            getattr(gate, name).copy_(value)
    free = gate.fixed(norms)
    keep = torch.arange(11) % 2 == 0
    gate.force(keep)
    assert torch.equal(gate.fixed(norms) != 0, keep)
    assert torch.equal(gate.fixed(norms)[keep & (free != 0)], free[keep & (free != 0)])
    some = torch.arange(11) < 4
    gate.force(keep, where=some)
    assert torch.equal(gate.fixed(norms)[~some], free[~some])
    assert torch.equal((gate.fixed(norms) != 0)[some], keep[some])
    gate.force(None)
    assert torch.equal(gate.fixed(norms), free)


def test_gate_moves_between_types_and_devices(row):
    gate, norms = Gate(row.method, LAYOUT, generator()), norms_for(row.method)
    half = None if norms is None else norms.bfloat16()
    gate.bfloat16()
    noise = gate.draw_noise(generator())
    assert noise is None or noise.dtype == torch.float32  # u has too few values in bfloat16
    assert gate.sample(noise, half).dtype == gate.fixed(half).dtype == torch.bfloat16
    gate.to("meta")
    ghost = None if norms is None else half.to("meta")
    assert gate.layout.segment.device.type == "meta"
    assert gate.sample(gate.draw_noise(), ghost).device.type == "meta"
    assert gate.prob_open(ghost).shape == gate.fixed(ghost).shape == (11,)
    gate.to_empty(device="cpu")
    assert gate.layout.segment.tolist() == LAYOUT.segment.tolist()


def test_score_function_methods_alone_have_a_second_draw(row):
    gate = Gate(row.method, LAYOUT, generator())
    noise = gate.draw_noise(generator())
    assert isinstance(row.method, ScoreFunction) == (row.method.estimator != "pathwise")
    if isinstance(row.method, ScoreFunction):
        assert gate.antithetic(noise).shape == (11,)
        assert not gate.sample(noise).requires_grad
        return
    with pytest.raises(GateError, match="pathwise"):
        gate.antithetic(noise)
    with pytest.raises(GateError, match="pathwise"):
        gate.surrogate(noise, torch.tensor(1.0))


@pytest.mark.parametrize(
    ("keep", "where"),
    [
        (torch.ones(11), None),
        (torch.ones(10, dtype=torch.bool), None),
        (torch.ones(11, dtype=torch.bool), torch.ones(11)),
    ],
)
def test_force_refuses_other_tensors(keep, where):
    with pytest.raises(GateError, match=r"expected torch\.bool of shape \(11,\)"):
        Gate(HardConcrete(), LAYOUT).force(keep, where)


def test_a_gate_made_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        layout = Layout((4, 4))
    gate = Gate(DifferentiableSparsification(), layout)
    gate.sample(None)[0].backward()
    assert gate.alpha.grad.abs().sum() > 0
