from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.gated import DTYPE, Bare, ConvNet, conv_net, conv_structure, gate, images, mlp_structure
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from secateur.errors import GateError
from secateur.gates import DifferentiableSparsification, Gate, HardConcrete, Layout, Method
from secateur.pruning.draws import GATES, gates_of, live_of
from secateur.pruning.gateset import GateSet, extended
from secateur.pruning.loading import accept_dense_keys, refuse_dense_keys
from secateur.pruning.placement import gated_sites, maps_of, place, strip
from secateur.structure.groups import Group, Member
from secateur.structure.trace import trace


def group(name: str, *members: tuple[str, int, list[list[int]]]) -> Group:
    made = tuple(Member(t, d, torch.tensor(index).numpy(), consumer=True, carrier=False) for t, d, index in members)
    return Group(name, len(members[0][2]), made)


def gated(model: nn.Module, groups: list[Group]) -> GateSet:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    gates = GateSet([Gate(HardConcrete(), Layout(tuple(g.size for g in groups)), dtype=DTYPE)], [None])
    place(model, gates, maps_of(groups, shapes))
    return gates


def test_closed_units_are_exactly_zero_where_they_act_and_so_is_their_gradient() -> None:
    net, gates = conv_net()
    z = torch.rand(gates.total, dtype=DTYPE)
    z[::3] = 0.0
    net.eval()
    with live_of(gates).overridden(extended(z)):
        net(images()).square().sum().backward()
        for g, start in zip(conv_structure().groups, gates.rules[0].layout.offsets, strict=True):
            factor = z[start : start + g.size]
            for member in g.consumers:
                owner = net.get_submodule(member.tensor.rpartition(".")[0])
                original = owner.parametrizations.weight.original
                for unit in range(g.size):
                    positions = torch.from_numpy(member.index[unit])
                    slices = owner.weight.index_select(member.dim, positions)
                    dense = original.index_select(member.dim, positions)
                    assert torch.equal(slices, dense * factor[unit])
                    if factor[unit] == 0:
                        assert not slices.any()
                        assert not original.grad.index_select(member.dim, positions).any()
                    else:
                        assert original.grad.index_select(member.dim, positions).any()


def test_coarse_and_fine_gates_multiply_and_two_dimensions_too() -> None:
    net = nn.Sequential(nn.Linear(4, 2, dtype=DTYPE))
    coarse = group("coarse", ("0.weight", 1, [[0, 1], [3, 2]]))
    fine = group("fine", ("0.weight", 1, [[2], [1], [0]]))
    rows = group("rows", ("0.weight", 0, [[1], [0]]))
    gates = gated(net, [coarse, fine, rows])
    c, f, r = torch.tensor([0.5, 0.25]), torch.tensor([3.0, 5.0, 7.0]), torch.tensor([11.0, 13.0])
    with live_of(gates).overridden(extended(torch.cat([c, f, r]).to(DTYPE))):
        factor = net[0].weight / net[0].parametrizations.weight.original
    columns = torch.tensor([0.5 * 7, 0.5 * 5, 0.25 * 3, 0.25], dtype=DTYPE)
    torch.testing.assert_close(factor, torch.tensor([13.0, 11.0], dtype=DTYPE)[:, None] * columns)


@given(st.data())
def test_maps_multiply_every_gate_that_covers_a_position(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 9))
    groups = []
    for number in range(data.draw(st.integers(1, 4))):
        positions = data.draw(st.permutations(range(size)))
        multiplicity = data.draw(st.integers(1, 2))
        units = data.draw(st.integers(1, size // multiplicity))
        index = [list(positions[u * multiplicity : (u + 1) * multiplicity]) for u in range(units)]
        groups.append(group(str(number), ("0.weight", 1, index)))
    total = sum(g.size for g in groups)
    z = torch.rand(total, dtype=DTYPE)
    expected = torch.ones(size, dtype=DTYPE)
    start = 0
    for g in groups:
        for unit in range(g.size):
            expected[g.members[0].index[unit]] *= z[start + unit]
        start += g.size
    rows = maps_of(groups, {"0.weight": (3, size)})["0.weight"][1]
    torch.testing.assert_close(extended(z)[torch.from_numpy(rows)].prod(0), expected)


def state_of(model: nn.Module) -> list[tuple[str, object, list[str], list[int]]]:
    """Everything about a model that gates touch: classes, order of attributes, identities, hooks."""
    found = []
    for path, module in model.named_modules():
        tensors = [id(t) for t in (*module._parameters.values(), *module._buffers.values())]
        hooks = [
            len(value) for key, value in sorted(vars(module).items()) if "hook" in key and hasattr(value, "__len__")
        ]
        found.append((path, type(module), [*vars(module), *module._parameters, *module._buffers], tensors + hooks))
    return found


@pytest.mark.parametrize("build", [ConvNet, Bare, lambda: nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2))])
def test_stripping_leaves_the_model_as_it_was(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = build().double()
    x = images() if isinstance(net, ConvNet) else torch.randn(4, 3 if isinstance(net, Bare) else 2, dtype=DTYPE)
    before, keys, values = state_of(net), list(net.state_dict()), [v.clone() for v in net.state_dict().values()]
    parameters = list(net.parameters())
    gate(net, trace(net, (x,)))
    accept_dense_keys(net)
    assert list(net.state_dict()) != keys
    net.eval()(x)
    net.train()
    strip(net)
    refuse_dense_keys(net)
    assert state_of(net) == before
    assert list(net.state_dict()) == keys
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), values, strict=True))


def test_stripping_a_copy_leaves_the_original_gated() -> None:
    net, gates = conv_net()
    twin = copy.deepcopy(net)
    strip(twin)
    net.eval()
    x = images()
    expected = net(x)
    assert gates_of(net) is gates
    assert torch.equal(net(x), expected)
    assert type(twin.fc1) is nn.Linear
    strip(net)
    assert not torch.equal(net(x), expected)


def test_copies_outlive_the_gates_of_the_original() -> None:
    net, _ = conv_net()
    twin = copy.deepcopy(net.eval())
    x = images()
    expected = twin(x)
    strip(net)
    assert torch.equal(twin(x), expected)


def test_gates_stand_once_in_the_tree() -> None:
    net, gates = conv_net()
    assert [name for name, module in net.named_modules(remove_duplicate=False) if module is gates] == [GATES]
    names = [name for name, _ in net.named_parameters(remove_duplicate=False) if "log_alpha" in name]
    assert names == [f"{GATES}.rules.0.log_alpha"]
    assert all(p.secateur_gate for p in gates.parameters())
    assert not any(hasattr(p, "secateur_gate") for n, p in net.named_parameters() if GATES not in n)


def test_a_sequential_still_computes_what_it_did() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.Sigmoid(), nn.Linear(6, 2)).double()
    x = torch.randn(4, 3, dtype=DTYPE)
    expected = net(x)
    gates = gate(net, trace(net, (x,)))
    with live_of(gates).overridden(torch.ones(gates.total + 1, dtype=DTYPE)):
        assert torch.equal(net(x), expected)


class Tied(nn.Module):
    """A table that embeds and, transposed in role, decodes; its columns are also carriers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.decode = nn.Linear(4, 7, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decode(self.embed(tokens))


def test_a_tied_weight_is_gated_under_all_names_and_stays_tied() -> None:
    net = Tied().double()
    gates = gated(net, [group("units", ("embed.weight", 1, [[0], [1], [2], [3]]))])
    assert [site.name for site in gated_sites(net)] == ["embed.weight", "decode.weight"]
    first, second = (m.parametrizations.weight.original for m in (net.embed, net.decode))
    assert first is second
    z = torch.tensor([0.0, 1.0, 0.5, 1.0], dtype=DTYPE)
    tokens = torch.arange(7)
    with live_of(gates).overridden(extended(z)):
        torch.testing.assert_close(net(tokens), (first * z) @ (first * z).T)
    strip(net)
    assert net.embed.weight is net.decode.weight


def test_a_shared_module_is_gated_once() -> None:
    layer = nn.Linear(4, 4, dtype=DTYPE)
    net = nn.ModuleDict({"first": layer, "second": layer})
    gates = gated(net, [group("units", ("first.weight", 1, [[0], [2]]))])
    with live_of(gates).overridden(torch.tensor([0.5, 0.0, 1.0], dtype=DTYPE)):
        factor = layer.weight / layer.parametrizations.weight.original
    torch.testing.assert_close(factor[0], torch.tensor([0.5, 1.0, 0.0, 1.0], dtype=DTYPE))


def test_parametrized_weights_and_gated_models_are_refused_untouched() -> None:
    net = ConvNet().double()
    parametrize.register_parametrization(net.fc1, "bias", nn.Identity())
    before = state_of(net)
    with pytest.raises(GateError, match=r"fc1\.weight: the ParametrizedLinear .* parametrized already \(on bias\)"):
        gate(net, conv_structure())
    assert state_of(net) == before
    net, _ = conv_net()
    with pytest.raises(GateError, match=GATES):
        gate(net, mlp_structure())


def test_missing_weights_are_refused() -> None:
    with pytest.raises(GateError, match=r"fc2\.weight: the model has no such parameter"):
        gate(nn.Sequential(nn.Linear(3, 3)), mlp_structure())


def test_gates_follow_the_weights_precision_and_device() -> None:
    net, _ = conv_net()
    net.eval()
    x = images()
    expected = net(x)
    half = copy.deepcopy(net).to(torch.bfloat16)
    assert half.fc1.weight.dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).double(), expected, rtol=0.1, atol=0.1)
    meta = copy.deepcopy(net).to("meta")
    assert meta(x.to("meta")).shape == expected.shape
    mixed = copy.deepcopy(net)
    gates_of(mixed).to(torch.float32)
    assert mixed.fc1.weight.dtype == DTYPE


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("method", [HardConcrete(init_open=0.6), DifferentiableSparsification(form="independent")])
def test_the_average_of_a_model_that_stands_still_is_that_model(method: Method, use_buffers: bool) -> None:
    net, gates = conv_net(method)
    with torch.no_grad():
        for p in gates.trained:
            p.add_(torch.linspace(-1.0, 1.0, p.numel(), dtype=DTYPE))
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=use_buffers)
    for _ in range(20):
        average.update_parameters(net)
    x = images()
    torch.testing.assert_close(average.eval()(x), net.eval()(x))
