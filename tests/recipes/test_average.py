"""The moving average against its closed form."""

import pytest
import torch
from torch import nn

from secateur.recipes.average import Average


def test_it_is_the_weighted_mean_of_its_closed_form_and_goes_on_from_a_saved_state():
    model, memory = nn.Linear(3, 2).double(), 0.9
    values = [torch.randn(2, 3, dtype=torch.float64) for _ in range(7)]
    average = Average(memory)
    for number, value in enumerate(values):
        with torch.no_grad():
            model.weight.copy_(value)
        average.update(model)
        if number == 3:
            saved, average = average.state_dict(), Average(memory)
            average.load_state_dict(saved)
    weights = torch.tensor([memory ** (6 - i) for i in range(7)], dtype=torch.float64)
    expected = (weights[:, None, None] * torch.stack(values)).sum(0) / weights.sum()
    average.end(model)
    assert model.weight.detach().numpy() == pytest.approx(expected.numpy(), abs=1e-12)


def test_without_an_update_the_model_stays_as_it_is():
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    Average(0.9).end(model)
    assert torch.equal(model.weight, before)
