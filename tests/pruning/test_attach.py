from __future__ import annotations

import copy

import pytest
import torch
from tests.gated import DTYPE, Bare, ConvNet, Mlp, conv_structure, images, mlp_structure
from tests.pruning.test_placement import state_of
from torch import Tensor, nn
from torch.nn.utils import parametrize

import secateur as sc
from secateur.errors import BudgetError, GateError, TraceError
from secateur.gates import ARM, HardConcrete, Magnitude
from secateur.pruning.attach import attach
from secateur.pruning.draws import GATES, gates_of
from secateur.pruning.rule import Rule


def test_attaches_in_place_and_keeps_every_parameter() -> None:
    net = ConvNet().double()
    parameters = dict(net.named_parameters())
    pruner = attach(net, examples=(images(),))
    assert pruner.model is net
    kept = {id(p) for p in net.parameters()}
    assert all(id(p) in kept for p in parameters.values())
    assert pruner.structure.groups == pruner.groups
    assert repr(pruner) == "Pruner(ConvNet, groups=3, units=15)"


def test_gates_have_at_least_single_precision_and_the_weights_device() -> None:
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        net = Mlp().to(dtype)
        pruner = attach(net, structure=mlp_structure())
        assert {p.dtype for p in pruner.gates.parameters()} == {expected}
        assert net(torch.zeros(2, 3, dtype=dtype)).dtype == dtype


def test_seed_decides_start_and_draws() -> None:
    def outputs(seed: int) -> Tensor:
        torch.manual_seed(0)
        net = Mlp().double()
        attach(net, structure=mlp_structure(), seed=seed)
        torch.rand(seed + 1)  # torch's own generator has no part in it
        return torch.cat([net(torch.ones(1, 3, dtype=DTYPE)) for _ in range(3)])

    assert torch.equal(outputs(1), outputs(1))
    assert not torch.equal(outputs(1), outputs(2))


def test_torchs_generator_is_left_alone() -> None:
    net = Mlp().double()
    state = torch.get_rng_state()
    attach(net, examples=(torch.zeros(2, 3, dtype=DTYPE),), method=ARM())
    net(torch.zeros(2, 3, dtype=DTYPE))
    assert torch.equal(torch.get_rng_state(), state)


def test_methods_that_look_at_weights_see_them_from_the_start() -> None:
    net = ConvNet().double()
    attach(net, structure=conv_structure(), gates=[Rule(where="fc1", method=Magnitude()), Rule(exclude="fc1")])
    (_, norms), (_, none) = gates_of(net)
    assert none is None
    expected = net.fc2.parametrizations.weight.original.norm(dim=0)
    torch.testing.assert_close(norms(norms.weights, DTYPE), expected)


def wrapped_in_data_parallel() -> nn.Module:
    return nn.DataParallel(Mlp())


class OptimizedModule(nn.Module):
    """Stands for what torch.compile returns, without importing the compiler."""


class DistributedDataParallel(nn.Module):
    """Stands for the wrapper, without a process group."""


def gated() -> nn.Module:
    net = Mlp().double()
    attach(net, structure=mlp_structure())
    return net


def parametrized() -> nn.Module:
    net = Mlp().double()
    parametrize.register_parametrization(net.fc1, "bias", nn.Identity())
    return net


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: "net", "got str, expected a torch.nn.Module"),
        (wrapped_in_data_parallel, r"a DataParallel cannot take gates; attach to model\.module before"),
        (DistributedDataParallel, r"attach to model\.module before"),
        (OptimizedModule, r"attach to model\._orig_mod"),
        (gated, r"gated already; call detach\(\)"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "lazy module"),
        (parametrized, r"fc1 has parametrizations .*remove_parametrizations first"),
    ],
)
def test_models_that_cannot_take_gates(build: object, message: str) -> None:
    net = build()
    before = state_of(net) if isinstance(net, nn.Module) else None
    with pytest.raises((GateError, TraceError), match=message):
        attach(net, examples=(torch.zeros(4, 3, dtype=DTYPE),))
    assert before is None or state_of(net) == before


def test_a_scripted_model() -> None:
    scripted = torch.jit.trace(Mlp(), torch.zeros(2, 3))
    with pytest.raises(GateError, match=r"attach before torch\.jit"):
        attach(scripted, examples=(torch.zeros(2, 3),))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, GateError, r"needs examples=\(x,\)"),
        ({"examples": torch.zeros(4, 3)}, TraceError, "examples"),
        ({"examples": (torch.zeros(4, 99, dtype=DTYPE),)}, TraceError, "does not run"),
        ({"structure": conv_structure}, GateError, "structure is not of this model"),
        ({"gates": [Rule(where="nowhere")]}, GateError, "finds nothing"),
        ({"method": "none"}, GateError, "no gate method"),
        ({"budget": lambda: sc.Budget(keep_params=0.001)}, BudgetError, "."),
        (
            {"budget": lambda: sc.Budget(keep_params=0.5), "penalty": lambda: sc.Penalty(1.0, unit="density")},
            GateError,
            "not both",
        ),
    ],
)
def test_arguments_that_do_not_fit_leave_the_model_alone(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    net = Mlp().double()
    before = state_of(net)
    made = {name: value() if callable(value) else value for name, value in arguments.items()}
    if arguments and "examples" not in made and "structure" not in made:
        made["structure"] = mlp_structure()
    with pytest.raises(error, match=message):
        attach(net, **made)
    assert state_of(net) == before


def test_a_model_with_nothing_to_prune() -> None:
    with pytest.raises(GateError, match="nothing to prune"):
        attach(nn.Sequential(nn.Linear(3, 2)), examples=(torch.zeros(4, 3),))


class Kept(Mlp):
    """Computes with a list of its weights that it keeps beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.fc2.weight]

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc1(x)) @ self.weights[0].T


def test_a_gate_that_is_not_read_is_refused_and_everything_undone() -> None:
    net = Kept().double()
    before = state_of(net)
    with pytest.raises((GateError, TraceError)):
        attach(net, examples=(torch.randn(4, 3, dtype=DTYPE),))
    assert state_of(net) == before


def test_modules_with_parameters_of_their_own() -> None:
    net = Bare().double()
    pruner = attach(net, examples=(torch.randn(4, 3, dtype=DTYPE),))
    assert [group.size for group in pruner.groups] == [5]
    assert "parametrizations.v.original" in net.state_dict()
    assert not any(key.startswith(f"{GATES}.rules.0.forced") for key in net.state_dict())


def test_copies_of_a_traced_model_share_a_structure() -> None:
    first = ConvNet().double()
    second = copy.deepcopy(first)
    pruners = [attach(net, structure=conv_structure(), method=HardConcrete()) for net in (first, second)]
    assert gates_of(first) is not gates_of(second)
    assert pruners[0].structure is pruners[1].structure


@pytest.mark.parametrize("method", ["diff-sparse", "magnitude"])
def test_a_single_unit_and_a_method_that_always_leaves_one_do_not_fit(method: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.one(x)
            return x + self.other(x)

    x = torch.randn(3, 4)
    with pytest.raises(GateError, match=r"always leaves one unit .* one\.block can never close"):
        attach(Two(), examples=(x,), gates=[Rule("blocks", where="one")], method=method)
    # Blocks of one rule are one group to their method.
    pruner = attach(Two(), examples=(x,), gates=[Rule("blocks", where=("one", "other"))], method=method)
    assert pruner.gates.rules[0].layout.sizes == (2,)
