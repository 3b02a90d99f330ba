from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from secateur.errors import GateError
from secateur.pruning.optimizers import GATE_RATE, check_groups, groups_in_use, parameter_groups


def parameters(n: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2)) for _ in range(n)]


def test_weights_take_the_options_and_gates_their_own_rate_without_decay() -> None:
    weights, gates = parameters(3), parameters(2)
    first, second = parameter_groups(weights, gates, 0.1, None, {"weight_decay": 0.5, "betas": (0.8, 0.9)})
    assert first == {"params": weights, "lr": 0.1, "weight_decay": 0.5, "betas": (0.8, 0.9)}
    assert second == {"params": gates, "lr": GATE_RATE * 0.1, "weight_decay": 0.0, "betas": (0.8, 0.9)}
    assert parameter_groups(weights, gates, 0.1, 0.3, {})[1]["lr"] == 0.3
    check_groups(torch.optim.AdamW([first, second]).param_groups, gates)


def test_methods_without_parameters_need_no_group() -> None:
    weights = parameters(2)
    assert parameter_groups(weights, [], 0.1, None, {}) == [{"params": weights, "lr": 0.1}]


def test_weight_decay_on_gates_is_refused() -> None:
    weights, gates = parameters(1), parameters(1)
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": gates}], weight_decay=0.1)
    with pytest.raises(GateError, match=r"weight decay 0\.1.*param_groups"):
        check_groups(optimizer.param_groups, gates)


def test_gates_left_out_are_refused() -> None:
    weights, gates = parameters(1), parameters(3)
    with pytest.raises(GateError, match="leaves out 2 of the 3"):
        check_groups(torch.optim.SGD([*weights, gates[0]], lr=0.1).param_groups, gates)


def test_a_shared_group_is_warned_about() -> None:
    weights, gates = parameters(1), parameters(1)
    with pytest.warns(UserWarning, match="share an optimizer group"):
        check_groups(torch.optim.SGD([*weights, *gates], lr=0.1).param_groups, gates)


def test_living_optimizers_are_found_by_what_they_train() -> None:
    mine, other = parameters(2), parameters(1)
    first = torch.optim.SGD(mine[:1], lr=0.1)
    second = torch.optim.Adam([{"params": mine[1:]}, {"params": other}])
    assert groups_in_use(mine) == [*first.param_groups, *second.param_groups]
    assert groups_in_use(other) == list(second.param_groups)
    assert groups_in_use(parameters(1)) == []
    del first, second
    gc.collect()
    assert groups_in_use(mine) == []
