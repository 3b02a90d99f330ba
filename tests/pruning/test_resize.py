from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.gated import DTYPE, Mlp, mlp_structure
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import secateur as sc
from secateur.errors import GateError
from secateur.pruning.pruner import Pruner


def shut() -> tuple[Mlp, Pruner]:
    """A gated network of which every second unit is due at the first check."""
    torch.manual_seed(0)
    net = Mlp().double()
    pruner = sc.attach(net, structure=mlp_structure(), method=sc.HardConcrete(clamp=None))
    with torch.no_grad():
        next(iter(pruner.gates.parameters()))[::2] = -60.0
    return net, pruner


def loss_of(net: Mlp, pruner: Pruner) -> Tensor:
    return pruner.loss(lambda: net(torch.randn(4, 3, dtype=DTYPE)).square().mean())


def shapes(net: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in net.parameters()]


def refused(net: Mlp, pruner: Pruner, optimizers: object, match: str, **options: object) -> None:
    before = shapes(net)
    with pytest.raises(GateError, match=match):
        pruner.shrink(optimizers, checks=1, **options)  # type: ignore[arg-type]
    assert shapes(net) == before


def test_an_optimizer_of_another_model_is_refused() -> None:
    net, pruner = shut()
    other = torch.optim.Adam(Mlp().parameters())
    refused(net, pruner, other, "trains no parameter of the model")
    refused(net, pruner, "adam", "optimizer is 'adam', expected the torch.optim.Optimizer")


def test_what_is_not_told_is_refused_while_it_lives() -> None:
    net, pruner = shut()
    optimizer = torch.optim.Adam(pruner.param_groups(lr=0.1))
    second = torch.optim.SGD(net.fc1.parameters(), lr=0.1)
    refused(net, pruner, optimizer, "another SGD trains these")
    assert second.param_groups
    del second
    assert pruner.shrink(optimizer, checks=1).removed


def test_several_optimizers_are_told_together() -> None:
    net, pruner = shut()
    gates = torch.optim.Adam(pruner.gates.parameters())
    weights = torch.optim.SGD(pruner.param_groups(lr=0.1)[0]["params"], lr=0.1, momentum=0.9)
    loss_of(net, pruner).backward()
    weights.step()
    weights.zero_grad()
    assert pruner.shrink([gates, weights], checks=1).removed
    assert {id(p) for p in weights.param_groups[0]["params"]} <= {id(p) for p in net.parameters()}
    assert all(id(p) in {id(q) for q in net.parameters()} for p in weights.state)
    assert all(state["momentum_buffer"].shape == p.shape for p, state in weights.state.items())


def test_a_scheduler_that_was_dropped_does_not_keep_its_optimizer_in_use() -> None:
    _, pruner = shut()
    old = torch.optim.Adam(pruner.param_groups(lr=0.1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(old, lambda step: 1.0)
    gc.disable()
    try:
        del old, scheduler
        assert pruner.shrink(torch.optim.Adam(pruner.param_groups(lr=0.1)), checks=1).removed
    finally:
        gc.enable()


def test_state_of_another_shape_is_refused() -> None:
    net, pruner = shut()
    factored = torch.optim.Adafactor(pruner.param_groups(lr=0.1))
    loss_of(net, pruner).backward()
    factored.step()
    refused(net, pruner, factored, r"fc1.weight: Adafactor keeps state 'row_var' of shape .* make it anew")


def test_parameters_that_an_optimizer_keeps_elsewhere_are_refused() -> None:
    net, pruner = shut()
    refused(net, pruner, torch.optim.LBFGS(list(net.parameters())), "LBFGS holds it outside of its groups")


def test_a_forward_that_waits_for_its_backward_is_refused() -> None:
    net, pruner = shut()
    optimizer = torch.optim.Adam(pruner.param_groups(lr=0.1))
    loss = loss_of(net, pruner)
    refused(net, pruner, optimizer, "waits for its backward pass")
    loss.backward()
    assert pruner.shrink(optimizer, checks=1).removed
    kept = loss_of(net, pruner)
    refused(net, pruner, optimizer, "waits for its backward pass")
    assert kept.isfinite()
    del kept
    assert not pruner.shrink(optimizer, checks=1).removed


def test_a_shrink_within_a_backward_pass_is_refused() -> None:
    net, pruner = shut()
    optimizer = torch.optim.Adam(pruner.param_groups(lr=0.1))
    seen: list[str] = []

    def hook(_: Tensor) -> None:
        with pytest.raises(GateError) as error:
            pruner.shrink(optimizer, checks=1)
        seen.append(str(error.value))

    loss = loss_of(net, pruner)
    loss.register_hook(hook)
    loss.backward()
    assert "during a backward pass" in seen[0]


def test_hooks_on_parameters_are_refused() -> None:
    net, pruner = shut()
    optimizer = torch.optim.Adam(pruner.param_groups(lr=0.1))
    handle = net.fc1.weight.register_post_accumulate_grad_hook(lambda _: None)
    refused(net, pruner, optimizer, "fc1.weight: it has hooks of its own")
    handle.remove()
    assert pruner.shrink(optimizer, checks=1).removed


def test_a_model_that_is_distributed_is_refused(tmp_path: Path) -> None:
    net, pruner = shut()
    optimizer = torch.optim.Adam(pruner.param_groups(lr=0.1))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(net)
        refused(net, pruner, optimizer, "DistributedDataParallel, which holds on")
        del wrapped
        gc.collect()
        assert pruner.shrink(optimizer, checks=1).removed
        DistributedDataParallel(net)(torch.randn(4, 3, dtype=DTYPE)).sum().backward()
    finally:
        dist.destroy_process_group()


def test_methods_that_look_at_norms_are_refused() -> None:
    net = Mlp().double()
    pruner = sc.attach(net, structure=mlp_structure(), method=sc.Magnitude())
    refused(net, pruner, torch.optim.SGD(pruner.param_groups(lr=0.1)), "norms of weights")


@pytest.mark.parametrize("options", [{"checks": 0}, {"chance": 0.0}, {"chance": 1.0}])
def test_settings_out_of_range_are_refused(options: dict[str, float]) -> None:
    _, pruner = shut()
    with pytest.raises(GateError, match=r"shrink: ch(ecks|ance) is "):
        pruner.shrink(torch.optim.SGD(pruner.param_groups(lr=0.1)), **options)  # type: ignore[arg-type]


def test_what_is_no_copy_of_the_gated_model_is_refused() -> None:
    net, pruner = shut()
    optimizer = torch.optim.SGD(pruner.param_groups(lr=0.1))
    refused(net, pruner, optimizer, "holds 0 gated models", ema=Mlp())
    refused(net, pruner, optimizer, "holds the gated model itself", ema=net)
    old = torch.optim.swa_utils.AveragedModel(net)
    assert pruner.shrink(optimizer, checks=1).removed
    refused(net, pruner, optimizer, "has not the shapes of the model", ema=old)
