from __future__ import annotations

import copy

import pytest
import torch
from tests.gated import DTYPE, Bare, ConvNet, conv_net, gate, images
from torch import nn

from secateur.pruning.draws import GATES
from secateur.pruning.loading import accept_dense_keys, refuse_dense_keys
from secateur.structure.trace import trace


def loadable() -> tuple[ConvNet, dict[str, torch.Tensor]]:
    net, _ = conv_net()
    accept_dense_keys(net)
    dense = {
        name: torch.randn_like(v) if v.is_floating_point() else v for name, v in ConvNet().double().state_dict().items()
    }
    for name in ("bn1.running_var", "bn2.running_var"):
        dense[name] = dense[name].abs()
    return net, dense


def test_dense_state_dicts_load_and_leave_gates_alone() -> None:
    net, dense = loadable()
    gates = {name: v.clone() for name, v in net.state_dict().items() if name.startswith(GATES)}
    given = dict(dense)
    assert str(net.load_state_dict(dense)) == "<All keys matched successfully>"
    assert dense == given
    state = net.state_dict()
    for name, value in dense.items():
        found = state[name] if name in state else state[name.replace("weight", "parametrizations.weight.original")]
        assert torch.equal(found, value)
    assert all(torch.equal(state[name], value) for name, value in gates.items())


def test_dense_parts_load_into_modules_that_hold_gated_weights() -> None:
    net, dense = loadable()
    part = {name.removeprefix("fc1."): v for name, v in dense.items() if name.startswith("fc1.")}
    net.fc1.load_state_dict(part)
    assert torch.equal(net.fc1.parametrizations.weight.original, dense["fc1.weight"])
    wrapped = nn.ModuleDict({"inner": net})
    wrapped.load_state_dict({f"inner.{name}": v for name, v in dense.items()})
    assert torch.equal(net.fc2.parametrizations.weight.original, dense["fc2.weight"])


def test_dense_keys_by_assignment() -> None:
    net, dense = loadable()
    gate_parameter = next(p for n, p in net.named_parameters() if n.startswith(GATES))
    net.load_state_dict(dense, assign=True)
    assert net.fc1.parametrizations.weight.original.data_ptr() == dense["fc1.weight"].data_ptr()
    assert any(p is gate_parameter for p in net.parameters())


def test_gated_state_dicts_load_as_any_other() -> None:
    net, _ = loadable()
    other, _ = loadable()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    net.load_state_dict(other.state_dict())
    x = images()
    assert torch.equal(net.eval()(x), other.eval()(x))


def test_what_neither_kind_has_is_missed_as_usual() -> None:
    net, dense = loadable()
    gated = {name: v for name, v in net.state_dict().items() if not name.startswith(GATES)}
    with pytest.raises(RuntimeError, match=f"Missing key.*{GATES}"):
        net.load_state_dict(gated)
    del dense["fc1.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*fc1\.parametrizations\.weight\.original"):
        net.load_state_dict(dense)


def test_a_root_that_holds_gated_weights_itself() -> None:
    net = Bare().double()
    dense = {name: torch.randn_like(v) for name, v in net.state_dict().items()}
    gate(net, trace(net, (torch.randn(4, 3, dtype=DTYPE),)))
    accept_dense_keys(net)
    net.load_state_dict(dense)
    assert torch.equal(net.parametrizations.v.original, dense["v"])


def test_copies_load_into_themselves() -> None:
    net, dense = loadable()
    twin = copy.deepcopy(net)
    before = net.fc1.parametrizations.weight.original.clone()
    twin.load_state_dict(dense)
    assert torch.equal(twin.fc1.parametrizations.weight.original, dense["fc1.weight"])
    assert torch.equal(net.fc1.parametrizations.weight.original, before)


def test_undone() -> None:
    net, dense = loadable()
    refuse_dense_keys(net)
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict(dense)
