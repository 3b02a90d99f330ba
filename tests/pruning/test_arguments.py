"""Arguments of another kind than expected: one error that says all of them, and nothing has changed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.gated import DTYPE, Mlp, mlp_structure
from tests.pruning.test_placement import state_of

import secateur as sc
from secateur.errors import GateError

X = torch.randn(8, 3, dtype=DTYPE, generator=torch.Generator().manual_seed(0))


def made(method: sc.Method | None = None) -> tuple[Mlp, sc.Pruner, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Mlp().double()
    pruner = sc.attach(net, structure=mlp_structure(), method=method)
    return net, pruner, torch.optim.Adam(pruner.param_groups(lr=1e-3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.5}, r"budget is 0.5, expected an sc.Budget such as sc.Budget\(keep_params=0.5\)$"),
        ({"budget": sc.Budget}, "budget is <class .*, expected an sc.Budget"),
        (
            {"budget": sc.Penalty(0.1, unit="density")},
            "budget is Penalty.*, expected an sc.Budget .*give it as penalty=",
        ),
        ({"penalty": 0.5}, "penalty is 0.5, expected an sc.Penalty such as"),
        ({"penalty": sc.Budget(keep_params=0.5)}, "penalty is a Budget, expected an sc.Penalty .*give it as budget="),
        ({"l2": 0.1}, r"l2 is 0.1, expected an sc.ActivityL2 such as sc.ActivityL2\(0.1\)"),
        ({"gates": sc.Rule()}, r"gates is a Rule, expected a list of rules: gates=\[sc.Rule\(\)\]"),
        ({"gates": "weights"}, "gates is 'weights', expected a list of rules"),
        ({"seed": "a"}, "seed is 'a', expected a whole number"),
        ({"seed": 1.5}, "seed is 1.5, expected a whole number"),
        ({"seed": 2**64}, "seed is 18446744073709551616, expected a whole number"),
        ({"structure": 3}, r"structure is 3, expected what sc.trace\(model, examples\) returned"),
        ({"conditional": "yes"}, "conditional is 'yes', expected one of 'auto', True, False"),
        ({"budget": 0.5, "l2": 0.1, "seed": None}, "^attach: budget is 0.5, .*; l2 is 0.1, .*; seed is None, "),
    ],
)
def test_attach(arguments: dict[str, Any], message: str) -> None:
    net = Mlp().double()
    before = state_of(net)
    with pytest.raises(GateError, match=message):
        sc.attach(net, **{"structure": mlp_structure(), **arguments})
    assert state_of(net) == before
    sc.attach(net, structure=mlp_structure())  # and it can be gated still


@pytest.mark.parametrize("seed", [-1, 2**64 - 1, np.int64(3)])
def test_attach_takes_what_serves(seed: int) -> None:
    rules: Any = (rule for rule in [sc.Rule()])
    assert sc.attach(Mlp().double(), structure=mlp_structure(), seed=seed, gates=rules).groups


@pytest.mark.parametrize("scale", [None, "a", True, math.nan, math.inf, -1.0, torch.tensor([1.0, 2.0])])
def test_the_scale_of_a_loss(scale: Any) -> None:
    net, pruner, _ = made()
    called = []
    with pytest.raises(GateError, match=r"loss: scale is .*, expected a finite number of at least 0"):
        pruner.loss(lambda: called.append(1) or net(X).square().mean(), scale=scale)
    assert not called
    assert pruner.loss(lambda: net(X).square().mean(), scale=np.float32(0.5)).isfinite()


@pytest.mark.parametrize("draws", [2.0, "a", None, True, 0])
def test_the_draws_of_a_loss(draws: Any) -> None:
    net, pruner, _ = made(sc.ARM())
    generator = pruner._live().generator.get_state()
    with pytest.raises(GateError, match=r"draws=.*; expected a whole number of at least 1"):
        pruner.loss(lambda: net(X).square().mean(), draws=draws)
    assert torch.equal(pruner._live().generator.get_state(), generator)
    assert pruner.loss(lambda: net(X).square().mean(), draws=np.int64(2)).isfinite()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": None}, "optimizer is None, expected the torch.optim.Optimizer that trains the model"),
        ({"optimizer": torch.optim.Adam}, "optimizer is <class .*Adam.*, expected the torch.optim.Optimizer"),
        ({"optimizer": [3]}, r"optimizer is \[3\], expected the torch.optim.Optimizer"),
        ({"ema": 3}, "ema is 3, expected a copy of the gated model"),
        ({"ema": [torch.zeros(2)]}, r"ema is \[tensor\(\[0., 0.\]\)\], expected .* and of lists of tensors"),
        ({"checks": "a"}, "checks is 'a', expected a whole number of at least 1"),
        ({"checks": 1.5}, "checks is 1.5, expected a whole number of at least 1"),
        ({"chance": "a"}, r"chance is 'a', expected a number in \(0, 1\)"),
        ({"chance": 1.0, "checks": 0}, r"^shrink: checks is 0, .*; chance is 1.0, "),
    ],
)
def test_shrink(arguments: dict[str, Any], message: str) -> None:
    _, pruner, optimizer = made()
    with pytest.raises(GateError, match=message):
        pruner.shrink(**{"optimizer": optimizer, **arguments})
    assert not pruner._removal.closed_for.any()
    assert not pruner.shrink([optimizer], ema=()).removed


@pytest.mark.parametrize("optimizer", [None, Mlp()])
def test_check(optimizer: Any) -> None:
    _, pruner, right = made()
    with pytest.raises(GateError, match=rf"check: got a {type(optimizer).__name__}, expected an optimizer, made from"):
        pruner.check(optimizer)
    pruner.check(right)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: None, "load_state_dict: got None, expected what pruner.state_dict"),
        (
            lambda state: {"version": state["version"]},
            "no 'removal'; .* no 'pressure'; .* no 'generator'; expected what",
        ),
        (lambda state: {**state, "pressure": {"controller": None}}, "'pressure' has no 'waited'; .* no 'held'"),
        (lambda state: {**state, "removal": 3}, "'removal' has no 'gone'"),
        (lambda state: {**state, "generator": None}, "'generator' is no state of a torch.Generator"),
        (lambda state: {**state, "generator": torch.zeros(3)}, "'generator' is no state of a torch.Generator"),
        (lambda state: {**state, "version": 2}, "version 2, expected 3"),
    ],
)
def test_load_state_dict(change: Any, message: str) -> None:
    _, pruner, _ = made()
    before = pruner.state_dict()
    with pytest.raises(GateError, match=message):
        pruner.load_state_dict(change(pruner.state_dict()))
    assert torch.equal(pruner.state_dict()["generator"], before["generator"])
    pruner.load_state_dict(before)
