from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from tests.gated import DTYPE, conv_net, conv_structure, images, mlp

from secateur.gates import Gate, HardConcrete, Layout, Magnitude
from secateur.pruning.gateset import GateSet, Norms, extended


def test_norms_are_those_of_the_slices_that_gates_multiply() -> None:
    net, gates = conv_net(Magnitude())
    _, norms = next(iter(gates))
    found = norms(norms.weights, DTYPE)
    start = 0
    for group in conv_structure().groups:
        for unit in range(group.size):
            total = torch.zeros((), dtype=DTYPE)
            for member in group.gated:
                owner = net.get_submodule(member.tensor.rpartition(".")[0])
                slices = owner.parametrizations.weight.original.index_select(
                    member.dim, torch.from_numpy(member.index[unit])
                )
                total += slices.square().sum()
            torch.testing.assert_close(found[start + unit], total.sqrt())
        start += group.size


def test_norms_differentiate_and_have_gradient_zero_at_zero() -> None:
    groups = conv_structure().groups
    norms = Norms(groups)
    weights = [torch.randn(conv_structure().shapes[name], dtype=DTYPE, requires_grad=True) for name in norms.tensors]
    assert torch.autograd.gradcheck(lambda *w: norms(w, DTYPE), weights)
    zeros = [torch.zeros_like(w, requires_grad=True) for w in weights]
    norms(zeros, DTYPE).sum().backward()
    assert all(not w.grad.any() for w in zeros)


def test_a_copy_measures_its_own_weights() -> None:
    net, gates = conv_net(Magnitude())
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    (_, mine), (_, other) = next(iter(gates)), next(iter(twin.secateur_gates))
    torch.testing.assert_close(other(other.weights, DTYPE), 2 * mine(mine.weights, DTYPE))


def test_norms_of_low_precision_weights_are_summed_in_the_gates_precision() -> None:
    norms = Norms(conv_structure().groups)
    weights = [torch.randn(conv_structure().shapes[name]).bfloat16() for name in norms.tensors]
    expected = norms([w.float() for w in weights], torch.float32)
    assert torch.equal(norms(weights, torch.float32), expected)


def test_questions_go_to_every_rule_in_order() -> None:
    rules = [
        Gate(HardConcrete(init_open=0.2), Layout((2, 3)), torch.Generator().manual_seed(0)),
        Gate(HardConcrete(init_open=0.9), Layout((4,)), torch.Generator().manual_seed(1)),
    ]
    gates = GateSet(rules, [None, None])
    assert gates.total == 9
    assert gates.estimators == {"pathwise"}
    for question in ("prob_open", "fixed", "score"):
        expected = torch.cat([getattr(rule, question)() for rule in rules])
        assert torch.equal(getattr(gates, question)(), expected)
    assert not gates.fixed().requires_grad
    assert gates.prob_open().requires_grad
    assert extended(gates.fixed()).tolist() == [*gates.fixed().tolist(), 1.0]


def test_fixed_with_a_pattern_opens_and_closes_without_a_trace() -> None:
    _, gates = mlp()
    state = {name: v.clone() for name, v in gates.state_dict().items()}
    pattern = torch.tensor([True, False, True, False, True, False])
    assert torch.equal(gates.fixed_with(pattern) != 0, pattern)
    assert gates.state_dict().keys() == state.keys()


def test_pinned_gates_act_until_a_checkpoint_without_them_is_loaded() -> None:
    net, gates = mlp()
    before = {name: v.clone() for name, v in net.state_dict().items()}
    free = gates.fixed()
    gates.pinned = torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0, 0.0], dtype=DTYPE)
    assert torch.equal(gates.fixed(), gates.pinned)
    pinned = net.state_dict()
    other, theirs = mlp()
    other.load_state_dict(pinned)
    assert torch.equal(theirs.fixed(), gates.pinned)
    net.load_state_dict(before)
    assert torch.equal(gates.fixed(), free)


@pytest.mark.parametrize("arguments", [(1,), (1, 2)])
def test_called_as_a_module_it_gives_back_its_input(arguments: tuple[int, ...]) -> None:
    gates = GateSet([Gate(HardConcrete(), Layout((2,)))], [None])
    assert gates(*arguments) == (1 if len(arguments) == 1 else arguments)


@pytest.mark.parametrize(
    "way",
    [
        lambda net: net,
        copy.deepcopy,
        lambda net: pickle.loads(pickle.dumps(net)),
        lambda net: net.to("meta").to_empty(device="cpu"),
        lambda net: net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True) and net,
    ],
    ids=["itself", "copied", "pickled", "emptied", "assigned"],
)
def test_parameters_stay_tagged_whatever_becomes_of_them(way: Callable[[GateSet], GateSet]) -> None:
    gates = way(GateSet([Gate(HardConcrete(), Layout((2,)))], [None]))
    assert [p.secateur_gate for p in gates.parameters()] == [True]  # type: ignore[attr-defined]
    twin = copy.deepcopy(gates)
    twin.load_state_dict(gates.state_dict(), assign=True)
    assert [p.secateur_gate for p in twin.parameters()] == [True]  # type: ignore[attr-defined]


def test_parameters_are_tagged() -> None:
    _, gates = mlp()
    assert all(p.secateur_gate for p in gates.parameters())
    net, _ = conv_net()
    net(images())
    assert [n for n, p in net.named_parameters() if getattr(p, "secateur_gate", False)] == [
        "secateur_gates.rules.0.log_alpha"
    ]
