"""The magnitude baseline follows its schedule and keeps the largest."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_swa_avg_fn

from secateur.errors import GateError
from secateur.gates import Gate, Layout, Magnitude
from secateur.gates.magnitude import STEP

LAYOUT = Layout((10, 4))
NORMS = torch.tensor([5.0, 1, 4, 2, 3, 9, 8, 7, 6, 10, 0.1, 0.3, 0.2, 0.4])


def at(step):
    return {"step": torch.tensor(step * STEP)}


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (5, 0.0), (10, 0.5 * (1 - 0.5**3)), (15, 0.5), (99, 0.5)])
def test_share_follows_the_cubic_ramp(step, share):
    method = Magnitude(final_closed=0.5, start=5, steps=10)
    assert method.share_closed(at(step)).item() == pytest.approx(share)


def test_the_smallest_of_each_group_are_closed():
    gates = Magnitude(final_closed=0.5, steps=1).fixed(at(1), LAYOUT, NORMS)
    assert gates.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0, 1]


def test_global_scope_compares_all_but_keeps_the_largest_of_each_group():
    gates = Magnitude(final_closed=0.5, steps=1, scope="global").fixed(at(1), LAYOUT, NORMS)
    assert gates.sum() == 7
    assert gates[10:].tolist() == [0, 0, 0, 1]
    nearly_all = Magnitude(final_closed=0.99, steps=1, scope="global").fixed(at(1), LAYOUT, NORMS)
    assert nearly_all.nonzero().flatten().tolist() == [9, 13]


def test_whole_shares_are_not_lost_to_rounding():
    for n in (10, 100, 30):
        layout = Layout((n,))
        gates = Magnitude(final_closed=0.7, steps=1).fixed(at(1), layout, torch.rand(n))
        assert int((gates == 0).sum()) == round(0.7 * n)


def test_ties_close_as_many():
    gates = Magnitude(final_closed=0.5, steps=1).fixed(at(1), Layout((6,)), torch.ones(6))
    assert gates.sum() == 3


def test_units_come_back_when_they_outgrow_others():
    method = Magnitude(final_closed=0.5, steps=1)
    assert method.fixed(at(1), Layout((2,)), torch.tensor([1.0, 2.0])).tolist() == [0.0, 1.0]
    assert method.fixed(at(1), Layout((2,)), torch.tensor([3.0, 2.0])).tolist() == [1.0, 0.0]


def test_steps_are_counted_and_nothing_is_trained():
    gate = Gate(Magnitude(steps=4), LAYOUT)
    assert not list(gate.parameters())
    for _ in range(3):
        gate.constrain_()
    assert gate.state_dict()["step"].item() == 3 * STEP
    assert not gate.sample(None, NORMS.requires_grad_()).requires_grad
    NORMS.requires_grad_(False)


@pytest.mark.parametrize("average", [get_ema_avg_fn(0.99), get_ema_avg_fn(0.9), get_swa_avg_fn()])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_of_a_gate_follows_its_schedule(average, use_buffers):
    gate = Gate(Magnitude(final_closed=0.5, steps=50), LAYOUT)
    model = nn.ModuleList([gate, nn.Linear(1, 1)])
    averaged = AveragedModel(model, avg_fn=average, use_buffers=use_buffers)
    closed = []
    for _ in range(300):
        gate.constrain_()
        averaged.update_parameters(model)
        closed.append(int((averaged.module[0].fixed(NORMS) == 0).sum()))
    assert closed == sorted(closed)
    assert closed[0] == 0
    assert closed[-1] == int((gate.fixed(NORMS) == 0).sum()) == 7


def test_steps_are_counted_in_a_model_of_low_precision():
    gate = Gate(Magnitude(final_closed=0.5, steps=1000), LAYOUT).to(torch.bfloat16)
    for _ in range(1000):
        gate.constrain_()
    assert int((gate.fixed(NORMS) == 0).sum()) == 7


@pytest.mark.parametrize(
    ("setting", "good", "bad", "expected"),
    [
        ("final_closed", 0.0, 1.0, r"\(0, 1\); or exactly 0"),
        ("start", 0, -1, "a whole number of at least 0"),
        ("steps", 1, 0, "a whole number of at least 1"),
        ("scope", "global", "layer", "'group', 'global'"),
    ],
)
def test_settings_are_checked(setting, good, bad, expected):
    assert getattr(Magnitude(**{setting: good}), setting) == good
    with pytest.raises(GateError, match=rf"Magnitude: {setting} is .*{expected}"):
        Magnitude(**{setting: bad})
