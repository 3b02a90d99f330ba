"""Recurrent layers of torch.nn, which decompose into the products that they are made of."""

from __future__ import annotations

import pytest
import torch
from tests.law import check_cut
from torch import Tensor, nn

import secateur as sc


class Recurrent(nn.Module):
    """A layer before, two recurrent ones, and a classifier on the last step."""

    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.before = nn.Linear(4, 6)
        self.recurrent = kind(6, 5, 2, batch_first=True, **options)
        ways = 2 if options.get("bidirectional") else 1
        self.after = nn.Linear(ways * (options.get("proj_size") or 5), 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.after(self.recurrent(self.before(x))[0][:, -1])
        return made


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_hidden_units_go_with_all_that_is_theirs(kind, options):
    structure = check_cut(Recurrent(kind, **options), torch.randn(2, 7, 4))
    assert sum(group.size for group in structure.groups) >= 6 + 5


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_lstm_is_counted_by_its_equations(device):
    with torch.device(device):
        structure = sc.trace(Recurrent(nn.LSTM), examples=(torch.zeros(2, 7, 4),))
    steps = 7 * (4 * 5 * (6 + 5) + 4 * 5 * (5 + 5))
    assert structure.cost().macs == 2 * (7 * 4 * 6 + steps + 5 * 3)


def test_projected_states_stay_as_they_are_for_torch_tells_them_by_their_width():
    structure = check_cut(Recurrent(nn.LSTM, proj_size=3), torch.randn(2, 7, 4))
    assert [group.name for group in structure.groups] == ["before"]
    assert "proj_size" in structure.why_frozen("recurrent.weight_hr_l0")


def test_gates_on_an_lstm_act_and_are_cut():
    torch.manual_seed(0)
    model, x = Recurrent(nn.LSTM).double(), torch.randn(2, 7, 4, dtype=torch.float64)
    pruner = sc.attach(model, examples=(x,))
    with torch.no_grad():
        for parameter in pruner.gates.parameters():
            parameter.copy_(torch.linspace(-3, 3, len(parameter)))
    gated = model.eval()(x)
    small, report = pruner.finalize()
    torch.testing.assert_close(small.eval()(x), gated, rtol=1e-12, atol=1e-12)
    assert any(kept < size for kept, size in report.widths.values())
    assert torch.backends.mkldnn.enabled
