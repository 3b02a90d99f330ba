"""Fits of times that follow a known polynomial, and what a fit promises of any times."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.latency.ticking import Net, example, nanoseconds, tick

import secateur as sc
from secateur.latency.fit import fitted, predicted
from secateur.latency.measure import Measured, measure, widths
from secateur.structure.example import Example
from secateur.structure.structure import Structure


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def structure(net: Net) -> Structure:
    return sc.trace(net, examples=(example(),))


def of(net: Net, structure: Structure) -> Measured:
    n_open = widths(structure, 4, np.random.default_rng(0), grid=True)
    return measure(net, structure, n_open, Example((example(),)), torch.device("cpu"), seconds=0.01)


@pytest.mark.parametrize("mark", [0.0, 7.0])
def test_a_known_polynomial_is_found_whatever_watching_takes(
    net: Net, structure: Structure, monkeypatch: pytest.MonkeyPatch, mark: float
) -> None:
    tick(monkeypatch, mark)
    terms = fitted(structure, of(net, structure))
    unseen = np.array([[16, 8], [1, 8], [16, 1], [9, 3], [2, 5]])
    exact = [nanoseconds(*n) + mark for n in unseen.tolist()]
    assert predicted(structure.axes, terms, unseen) == pytest.approx(exact, rel=1e-6 if mark == 0.0 else 2e-2)
    if mark == 0.0:
        alone = [term for term in terms if term.label == "rest.1"]
        assert predicted(structure.axes, alone, unseen[3:4]) == pytest.approx([1000.0 + 3.5 * 27 + 20.0 * 3], rel=1e-6)


def test_noise_never_makes_an_open_unit_cheaper(
    net: Net, structure: Structure, monkeypatch: pytest.MonkeyPatch
) -> None:
    tick(monkeypatch)
    found = of(net, structure)
    generator = np.random.default_rng(0)
    noisy = found.own * generator.uniform(0.2, 3.0, found.own.shape)
    measured = Measured(
        found.n_open, noisy.sum(1), found.twice, found.layers, found.calls, noisy, found.shapes, found.rounds
    )
    terms = fitted(structure, measured)
    assert all(term.coefficient > 0 for term in terms)
    for n_open in found.n_open:
        fewer = np.maximum(n_open - np.eye(2, dtype=np.int64), 0)
        assert (predicted(structure.axes, terms, fewer) <= predicted(structure.axes, terms, n_open[None])).all()


def test_work_outside_of_layers_is_found_by_the_tensors_around_it() -> None:
    class Sum(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 12), torch.nn.Linear(12, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]

    model, x = Sum(), torch.randn(3, 4)
    structure = sc.trace(model, examples=(x,))
    n_open = np.array([[12], [9], [6], [3], [1]])
    found = measure(model, structure, n_open, Example((x,)), torch.device("cpu"), seconds=0.01)
    own = np.stack([50.0 + 3.0 * n_open[:, 0], 5.0 + n_open[:, 0], 9.0 + 2.0 * n_open[:, 0]], axis=1)
    assert found.layers == ("", "a", "b")
    measured = Measured(n_open, own.sum(1), found.twice, found.layers, found.calls, own, found.shapes, 1)
    root = [term for term in fitted(structure, measured) if not term.label]
    assert predicted(structure.axes, root, np.array([[5]])) == pytest.approx([65.0], rel=1e-6)
