"""A training loop is told what it leaves out, once, where it called the pruner."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable

import pytest
import torch
from tests.gated import DTYPE, Mlp, mlp_structure

import secateur as sc
from secateur.errors import GateError
from secateur.gates import ARM, HardConcrete, Method
from secateur.pruning.pruner import Pruner

X = torch.randn(8, 3, dtype=DTYPE, generator=torch.Generator().manual_seed(0))


def made(method: Method | None = None, budget: sc.Budget | None = None) -> tuple[Mlp, Pruner, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Mlp().double()
    method = HardConcrete() if method is None else method
    pruner = sc.attach(net, structure=mlp_structure(), method=method, budget=budget)
    return net, pruner, torch.optim.Adam(pruner.param_groups(lr=1e-3))


def silent(call: Callable[[], object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


@pytest.mark.parametrize("way", ["loss", "backward", "penalty"])
def test_a_whole_loop_hears_nothing(way: str) -> None:
    net, pruner, optimizer = made(budget=sc.Budget(keep_params=0.7))

    def loop() -> None:
        for _ in range(2):
            if way == "loss":
                pruner.loss(lambda: net(X).square().mean()).backward()
            elif way == "backward":
                pruner.backward(lambda: net(X).square().mean())
            else:
                (net(X).square().mean() + pruner.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
        net.eval()
        with torch.no_grad():
            pruner.loss(lambda: net(X).square().mean())  # a validation loss
        pruner.finalize(examples=(X[:2],))

    silent(loop)


@pytest.mark.parametrize("method", [HardConcrete(), ARM()], ids=["pathwise", "score"])
def test_training_in_evaluation_mode(method: Method) -> None:
    net, pruner, _ = made(method)
    net.eval()
    with pytest.warns(UserWarning, match=r"evaluation mode: its gates are fixed.* model\.train\(\)") as found:
        pruner.loss(lambda: net(X).square().mean())
    assert found[0].filename == __file__
    silent(lambda: pruner.loss(lambda: net(X).square().mean()))  # said once


def test_a_budget_that_enters_no_loss() -> None:
    net, pruner, optimizer = made(budget=sc.Budget(keep_params=0.7))
    net(X).square().mean().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"no loss was asked for.* or add pruner\.penalty\(\)"):
        pruner.step()
    silent(pruner.step)
    _, free, _ = made()
    silent(free.step)  # nothing is to enter a loss


def test_steps_that_are_never_told() -> None:
    net, pruner, optimizer = made(budget=sc.Budget(keep_params=0.7))
    silent(lambda: made(budget=sc.Budget(keep_params=0.7))[1].finalize(examples=(X[:2],)))  # no training at all
    pruner.backward(lambda: net(X).square().mean())
    optimizer.step()
    with pytest.warns(UserWarning, match=r"step\(\) was never called.* after each optimizer\.step\(\)"):
        pruner.finalize(examples=(X[:2],))


@pytest.mark.parametrize("method", [HardConcrete(), ARM()], ids=["pathwise", "score"])
def test_a_loss_instead_of_what_computes_it_is_refused(method: Method) -> None:
    net, pruner, _ = made(method)
    with pytest.raises(GateError, match=r"got a Tensor, expected a function .* pruner\.loss\(lambda: criterion"):
        pruner.loss(net(X).square().mean())  # type: ignore[arg-type]


def test_a_refused_step_counts_for_nothing() -> None:
    net, pruner, optimizer = made()
    del optimizer
    wrong = torch.optim.AdamW(net.parameters(), lr=1e-3)
    wrong.cycle = torch.optim.lr_scheduler.StepLR(wrong, 1)  # type: ignore[attr-defined]
    gc.disable()
    try:
        for _ in range(3):
            with pytest.raises(GateError, match="weight decay"):
                pruner.step()
        assert pruner._loop._steps == 0
        right = torch.optim.Adam(pruner.param_groups(lr=1e-3))
        del wrong  # it lives on in the cycle, and trains nothing any more
        pruner.step()
    finally:
        gc.enable()
    assert pruner._loop._steps == 1
    assert right.param_groups


def test_an_optimizer_that_was_refused_is_looked_for_again() -> None:
    net, pruner, optimizer = made()
    wrong = torch.optim.AdamW(net.parameters(), lr=1e-3)
    with pytest.raises(GateError, match="weight decay"):
        pruner.check(wrong)
    with pytest.raises(GateError, match="weight decay"):
        pruner.step()
    pruner.check(optimizer)
    pruner.step()  # what was checked is what trains
