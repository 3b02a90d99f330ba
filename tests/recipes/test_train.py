"""The training loop: its length, its rates, its order of examples."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.recipes.checkpoint import Checkpoint
from secateur.recipes.images import Images
from secateur.recipes.train import Epoch, Objective, Phase, train


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


class KilledError(Exception):
    """A run that was stopped from outside."""


@pytest.mark.parametrize("method", [None, "hard-concrete", "arm", "magnitude"])
@pytest.mark.parametrize("optimizer", ["adam", "fused", "sgd"])
def test_a_killed_training_goes_on_bit_for_bit(images: Images, tmp_path: Path, method: str | None, optimizer: str):
    phase = Phase("one", epochs=5, batch=20, lr=0.02, gate_lr=0.05, seed=3, fused=optimizer == "fused", average=0.9)
    phase = replace(phase, optimizer="sgd" if optimizer == "sgd" else "adam")
    dropping = Objective(lambda model, index: F.cross_entropy(model(F.dropout(images.x[index], 0.2)), images.y[index]))

    def trained(file: str, killed_after: int) -> tuple[list[torch.Tensor], tuple[Epoch, ...]]:
        model = net()
        pruner = None
        if method is not None:
            budget = None if method == "magnitude" else sc.Budget(keep_params=0.5, steps=15)
            pruner = sc.attach(model, examples=(images.x[:2],), method=method, budget=budget)

        def watch(epoch: Epoch) -> None:
            if epoch.number == killed_after:
                raise KilledError

        epochs = train(
            model,
            images,
            phase,
            watch,
            pruner,
            objective=dropping,
            error=lambda model: next(iter(model.parameters())).sum().item(),
            checkpoint=Checkpoint(tmp_path / file),
        )
        return [tensor.clone() for tensor in model.state_dict().values()], epochs

    whole, epochs = trained("whole.pt", 0)
    with pytest.raises(KilledError):
        trained("killed.pt", 3)
    torch.rand(7)  # what else drew numbers in between
    resumed, again = trained("killed.pt", 0)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert epochs == again
    assert len(again) == 5
    assert trained("killed.pt", 0)[1] == epochs  # a finished one is not trained again


def test_rates_warm_up_fall_along_a_cosine_or_drop_at_milestones():
    cosine = Phase("a", epochs=10, batch=10, lr=1.0, warm_up=0.1)
    assert [cosine.rate(step, 100) for step in (0, 4, 9, 10, 55, 100)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.5, 0.0])
    drops = Phase("b", epochs=10, batch=10, lr=1.0, milestones=(6, 8), drop=0.2)
    assert [drops.rate(step, 100) for step in (0, 59, 60, 80)] == pytest.approx([1.0, 1.0, 0.2, 0.04])


def test_the_average_ends_the_phase_and_is_what_is_measured(images: Images):
    seen: list[float] = []
    model = net()

    def first(model: nn.Module) -> float:
        seen.append(next(iter(model.parameters())).sum().item())
        return seen[-1]

    phase = Phase("dense", epochs=3, batch=20, lr=0.1, average=0.8)
    train(model, images, phase, lambda epoch: None, error=first)
    assert next(iter(model.parameters())).sum().item() == seen[-1]


def test_a_term_beside_the_loss_is_minimised_too(images: Images):
    model = net()
    weight = next(iter(model.parameters()))
    shrinking = Objective(lambda model, index: 0 * model(images.x[index]).sum(), lambda: weight.square().sum())
    before = weight.square().sum().item()
    train(model, images, Phase("dense", epochs=5, batch=20, lr=0.02), lambda epoch: None, objective=shrinking)
    assert weight.square().sum().item() < before


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_closed_units_leave_a_gated_network_while_it_trains(images: Images, tmp_path: Path, optimizer: str):
    phase = Phase("gated", 16, 10, 0.01, 0.1, seed=1, optimizer=optimizer, average=0.5, checks=40)

    def start() -> tuple[nn.Module, sc.Pruner]:
        model = net()
        budget = sc.Budget(keep_params=0.4, steps=phase.steps(len(images.y)))
        return model, sc.attach(model, examples=(images.x[:2],), budget=budget)

    def stop(epoch: Epoch) -> None:
        if epoch.number == 13:
            raise KeyboardInterrupt

    model, pruner = start()
    whole = train(model, images, phase, lambda epoch: None, pruner)
    dense = pruner.costs.dense.params
    assert whole[0].left is not None
    assert whole[-1].left is not None
    assert whole[0].left.params == dense
    assert whole[12].left is not None
    assert 0.4 * dense <= whole[-1].left.params <= whole[12].left.params < dense
    assert all(epoch.step_ms > 0 for epoch in whole)

    first, second = start(), start()
    with pytest.raises(KeyboardInterrupt):
        train(first[0], images, phase, stop, first[1], checkpoint=Checkpoint(tmp_path / "run.pt"))
    assert (
        train(second[0], images, phase, lambda epoch: None, second[1], checkpoint=Checkpoint(tmp_path / "run.pt"))
        == whole
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), second[0].parameters(), strict=True))


def test_checks_are_spread_evenly():
    phase = Phase("gated", 2, 10, 0.01, checks=3)
    assert [step for step in range(1, phase.steps(60) + 1) if phase.is_check(step, 60)] == [4, 8, 12]
    assert not any(Phase("gated", 2, 10, 0.01).is_check(step, 60) for step in range(1, 13))


def test_a_checkpoint_that_knows_less_of_an_epoch_is_gone_on_from(images: Images, tmp_path: Path):
    phase, path = Phase("dense", epochs=3, batch=20, lr=0.02), tmp_path / "run.pt"
    whole = train(net(), images, phase, lambda epoch: None, checkpoint=Checkpoint(path))
    content = torch.load(path, weights_only=True)
    content["state"]["epochs"] = [
        {key: value for key, value in row.items() if key not in {"left", "step_ms"}}
        for row in content["state"]["epochs"]
    ]
    torch.save(content, path)
    assert train(net(), images, phase, lambda epoch: None, checkpoint=Checkpoint(path)) == whole
