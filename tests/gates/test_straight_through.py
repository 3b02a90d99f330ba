"""The straight-through baseline: exact draws, the chance's gradient."""

from __future__ import annotations

import pytest
import torch

from secateur.errors import GateError
from secateur.gates import Layout, StraightThrough

LAYOUT = Layout((200,))


def test_draws_are_exactly_binary_and_carry_the_gradient_of_the_chance():
    method = StraightThrough()
    logits = torch.linspace(-4, 4, 200, requires_grad=True)
    noise = method.noise(LAYOUT, torch.Generator().manual_seed(0))
    z = method.sample({"logits": logits}, LAYOUT, noise)
    assert torch.equal(z, (noise < torch.sigmoid(logits)).float())
    weights = torch.randn(200)
    (weights * z).sum().backward()
    chance = torch.sigmoid(logits.detach())
    torch.testing.assert_close(logits.grad, weights * chance * (1 - chance))


def test_evaluation_opens_at_half():
    params = {"logits": torch.tensor([-1e-6, 0.0, 1e-6])}
    assert StraightThrough().fixed(params, Layout((3,))).tolist() == [0.0, 1.0, 1.0]


def test_logits_are_clamped():
    params = {"logits": torch.tensor([-9.0, 0.5, 9.0])}
    StraightThrough(clamp=2.5).constrain_(params, Layout((3,)))
    assert params["logits"].tolist() == [-2.5, 0.5, 2.5]
    StraightThrough(clamp=None).constrain_(params, Layout((3,)))
    assert params["logits"].tolist() == [-2.5, 0.5, 2.5]


@pytest.mark.parametrize(
    ("setting", "good", "bad"), [("init_open", 0.5, 0.0), ("init_open", 0.9, 1.5), ("clamp", 3.0, 0.0)]
)
def test_settings_are_checked(setting, good, bad):
    assert getattr(StraightThrough(**{setting: good}), setting) == good
    with pytest.raises(GateError, match=f"StraightThrough: {setting} is"):
        StraightThrough(**{setting: bad})


def test_a_start_beyond_the_clamp_is_refused():
    with pytest.raises(GateError, match=r"needs logits of 5\.293"):
        StraightThrough(init_open=0.995)
    assert StraightThrough(init_open=0.995, clamp=None).init_open == 0.995
