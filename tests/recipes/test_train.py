"""The training loop: its length, its rates, its order of examples."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.recipes.data import Images
from secateur.recipes.train import Epoch, Phase, train


@pytest.fixture
def images() -> Images:
    """Two classes that a line separates, of images of 1 x 1 pixel in four channels."""
    x = torch.randn(60, 4, 1, 1)
    y = (x[:, 0, 0, 0] > 0).long()
    return Images("line", x, y, x, y, classes=2)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))


def test_it_learns_and_tells_about_every_epoch(images: Images):
    seen: list[Epoch] = []
    train(net(), images, Phase("dense", epochs=20, batch=20, lr=0.02), seen.append)
    assert [epoch.number for epoch in seen] == list(range(1, 21))
    assert seen[-1].loss < 0.5 * seen[0].loss
    assert seen[0].expected is None


def test_a_phase_of_no_epochs_changes_nothing(images: Images):
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, images, Phase("none", epochs=0, batch=20, lr=0.1), lambda epoch: None)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", ["hard-concrete", "arm"])
def test_a_gated_network_is_told_with_its_costs_and_ends_near_its_budget(images: Images, method: str):
    model, phase = net(), Phase("gated", epochs=40, batch=10, lr=0.01, gate_lr=0.05)
    steps = phase.steps(len(images.y))
    budget = sc.Budget(keep_params=0.4, steps=steps)
    pruner = sc.attach(model, examples=(images.x[:2],), method=method, budget=budget)
    seen: list[Epoch] = []
    train(model, images, phase, seen.append, pruner)
    assert steps == 240
    last = seen[-1]
    assert last.dense == pruner.costs.dense
    assert last.expected == pruner.expected
    assert last.exact == pruner.exact
    assert last.exact.params < 0.6 * last.dense.params


def test_the_same_seed_gives_the_same_weights_whatever_the_global_generator(images: Images):
    ends = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model = net()
        torch.manual_seed(noise)
        train(model, images, Phase("dense", epochs=2, batch=20, lr=0.02, seed=seed), lambda epoch: None)
        ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_the_weights_rate_falls_to_nothing_and_the_gates_stays(images: Images, monkeypatch: pytest.MonkeyPatch):
    rates: list[list[float]] = []
    step = torch.optim.AdamW.step

    def noting(self: torch.optim.AdamW, *args: object) -> object:
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    model = net()
    pruner = sc.attach(model, examples=(images.x[:2],), budget=sc.Budget(keep_params=0.9))
    train(model, images, Phase("gated", epochs=10, batch=20, lr=0.02, gate_lr=0.07), lambda epoch: None, pruner)
    weights, gates = zip(*rates, strict=True)
    assert weights[0] == 0.02
    assert list(weights) == sorted(weights, reverse=True)
    assert weights[-1] < 0.01 * weights[0]
    assert set(gates) == {0.07}
