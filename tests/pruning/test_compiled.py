"""Gated models that torch compiles: the gradients of gates and weights are those of the model as it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc

METHODS: dict[str, sc.Method] = {
    "hard concrete": sc.HardConcrete(),
    "arm": sc.ARM(),
    "ar": sc.ARM(estimator="ar"),
    "diffprune": sc.DiffPrune(),
    "diffprune, stochastic": sc.DiffPrune(mode="stochastic"),
    "diff-sparse": sc.DifferentiableSparsification(),
    "straight-through": sc.StraightThrough(),
}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.one, self.two = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn(self.stem(x)).relu()
        return self.head((h + self.two(self.one(h).relu())).relu().mean((2, 3)))


def mlp() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)]
    return nn.Sequential(*layers), torch.randn(32, 8)


def residual() -> tuple[nn.Module, Tensor]:
    return Residual(), torch.randn(16, 1, 6, 6)


@pytest.fixture(autouse=True)
def _forgets() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gradients(
    build: Callable[[], tuple[nn.Module, Tensor]], method: sc.Method, rules: list[sc.Rule] | None, *, compiled: bool
) -> dict[str, Tensor]:
    """Gradients of two steps, from the same draws."""
    torch.manual_seed(0)
    model, x = build()
    model, x = model.double(), x.double()
    y = torch.randint(3, (len(x),))
    pruner = sc.attach(model, examples=(x[:2],), method=method, gates=rules, seed=0)
    called = torch.compile(model, backend="aot_eager") if compiled else model
    for _ in range(2):
        pruner.backward(lambda: F.cross_entropy(called(x), y))
    named = {**dict(model.named_parameters()), **{f"gate {k}": p for k, p in enumerate(pruner.gates.parameters())}}
    return {name: p.grad.clone() for name, p in named.items() if p.grad is not None}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [mlp, residual])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_the_model_as_it_was_written(
    name: str, build: Callable[[], tuple[nn.Module, Tensor]]
) -> None:
    plain = gradients(build, METHODS[name], None, compiled=False)
    found = gradients(build, METHODS[name], None, compiled=True)
    assert plain.keys() == found.keys()
    assert any(name.startswith("gate ") and bool(grad.any()) for name, grad in plain.items())
    for key, grad in plain.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("units", ["inputs", "weights", "activations"])
def test_gates_on_other_units_have_theirs(units: str) -> None:
    rules = [sc.Rule(units, where={"activations": "1"}.get(units, "*"))]
    plain = gradients(mlp, METHODS["hard concrete"], rules, compiled=False)
    found = gradients(mlp, METHODS["hard concrete"], rules, compiled=True)
    for key, grad in plain.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-9, atol=1e-12)
