"""Measurements against numbers worked out by hand."""

import pytest
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.recipes.measure import accuracy, largest_difference, latencies, n_bytes, n_macs, n_params


class Sign(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([-x, x], dim=1)


def test_accuracy_is_the_share_of_right_classes_in_percent():
    x = torch.tensor([-1.0, -2.0, 3.0, 4.0])
    assert accuracy(Sign(), x, torch.tensor([0, 0, 1, 0])) == 75.0


def test_accuracy_is_taken_in_evaluation_mode():
    dropping = nn.Sequential(nn.Dropout(p=1.0), Sign()).train()
    assert accuracy(dropping, torch.tensor([1.0, -1.0]), torch.tensor([1, 0])) == 100.0


def test_parameters_and_macs_of_a_small_net_are_those_counted_by_hand():
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(3 * 16, 5))
    assert n_params(net) == 3 * 2 * 9 + 3 + 48 * 5 + 5
    assert n_macs(net, torch.zeros(1, 2, 4, 4)) == 16 * 3 * 2 * 9 + 48 * 5


def test_shared_parameters_count_once():
    layer = nn.Linear(3, 3)
    assert n_params(nn.Sequential(layer, layer)) == 12


def test_bytes_are_the_tensors_and_a_header():
    net = nn.Linear(100, 100)
    assert 4 * 10_100 < n_bytes(net) < 4 * 10_100 + 300


def test_largest_difference_sees_one_output_of_one_example():
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        b.bias[1] += 0.25
    x = torch.randn(7, 3)
    assert largest_difference(a, a, x, torch.float64) == 0.0
    assert largest_difference(a, b, x, torch.float64) == pytest.approx(0.25, abs=1e-7)
    assert a.weight.dtype == torch.float32


def test_latencies_are_ordered_quartiles_for_every_model():
    found = latencies({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}, torch.zeros(2, 4), rounds=8)
    assert list(found) == ["a", "b"]
    assert all(0 < each.low <= each.median <= each.high for each in found.values())


def test_one_round_has_no_spread_and_is_refused():
    with pytest.raises(SecateurError, match="rounds=1"):
        latencies({"a": nn.Linear(4, 4)}, torch.zeros(2, 4), rounds=1)
