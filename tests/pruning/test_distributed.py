"""Gates under a wrapper for several processes, in a group of one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import secateur as sc

METHODS = {
    "hard concrete": sc.HardConcrete(init_open=0.6),
    "arm": sc.ARM(init_open=0.6),
    "ar": sc.ARM(init_open=0.6, estimator="ar"),
}
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


class Net(nn.Module):
    """A branch that only some forwards take, and outputs in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.side = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        self.short = False

    def forward(self, x: Tensor) -> dict[str, Tensor | int]:
        y = self.main(x)
        return {"rows": len(x), "y": y if self.short else y + self.side(x)}


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(method: sc.Method, unused: bool | None, *, short: bool, budget: bool) -> list[dict[str, Tensor | None]]:
    torch.manual_seed(0)
    net, x = Net().double(), torch.randn(5, 4).double()
    pruner = sc.attach(
        net, examples=(x,), method=method, seed=1, budget=sc.Budget(keep_params=0.5, steps=4) if budget else None
    )
    run: nn.Module = net if unused is None else DistributedDataParallel(net, find_unused_parameters=unused)
    found = []
    for net.short in (False, short):
        net.zero_grad()
        pruner.backward(lambda: run(x)["y"].square().mean())
        found.append(copy.deepcopy({name: p.grad for name, p in net.named_parameters()}))
        pruner.step()
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("budget", [False, True])
@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_wrapped_gradients_are_the_plain_ones(method: str, unused: bool, budget: bool, group: None) -> None:
    wrapped, plain = (gradients(METHODS[method], wrap, short=unused, budget=budget) for wrap in (unused, None))
    assert len(wrapped) == 2
    for ours, theirs in zip(wrapped, plain, strict=True):
        for name, grad in theirs.items():
            if grad is not None:
                torch.testing.assert_close(ours[name], grad, rtol=1e-12, atol=1e-14)
