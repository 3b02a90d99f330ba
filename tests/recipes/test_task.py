"""The parts of a run; the whole of it is tested through the command line."""

import pytest
import torch

import secateur as sc
from secateur.recipes.data import DATA_SETS
from secateur.recipes.networks import NETWORKS, network
from secateur.recipes.settings import Settings
from secateur.recipes.task import fresh, fresh_compact, gates_for
from secateur.structure.structure import Structure


def structure_of(name: str) -> Structure:
    return sc.trace(fresh(name, 0), examples=(torch.zeros(1, *network(name).shape),))


def test_fresh_networks_depend_on_their_seed_alone_and_leave_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = fresh("resnet-7", 0), fresh("resnet-7", 0), fresh("resnet-7", 1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.stem.weight, again.stem.weight)
    assert not torch.equal(first.stem.weight, other.stem.weight)


@pytest.mark.parametrize("name", ["resnet-7", "lenet-5"])
def test_scratch_networks_have_the_cut_widths_and_the_initial_scale_of_those_widths(name: str):
    structure = structure_of(name)
    keep = {group.name: torch.arange(3, group.size, 7) for group in structure.groups}
    small = fresh_compact(name, structure.plan(keep), seed=0)
    assert sum(parameter.numel() for parameter in small.parameters()) == structure.cost(keep).params
    for module in small.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            fan_in = module.weight[0].numel()
            # torch draws these weights uniformly within 1 / sqrt(fan in).
            assert module.weight.abs().max() <= fan_in**-0.5
            if module.weight.numel() > 30:
                assert module.weight.abs().max() > 0.8 * fan_in**-0.5


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "wrn-28-10"])
def test_networks_that_read_pixels_or_positions_get_gates_on_them(name: str):
    row = network(name)
    data = next(data for data, each in DATA_SETS.items() if each.shape == row.shape)
    model = fresh(name, 0)
    rules = gates_for(Settings(data=data, net=name, keep_params=0.5))
    pruner = sc.attach(model, examples=(torch.zeros(1, *row.shape),), gates=rules)
    groups = {group.name: group.size for group in pruner.groups if group.kind == "inputs"}
    assert groups == {f"{layer}.inputs": getattr(model, layer).in_features for layer in row.inputs}


def test_live_inputs_are_counted_as_the_papers_do():
    model = fresh("lenet-300-100", 0)
    rules = gates_for(Settings(data="mnist", net="lenet-300-100", keep_params=0.05))
    x = torch.randn(2, 1, 28, 28)
    pruner = sc.attach(model, examples=(x,), gates=rules, budget=sc.Budget(keep_params=0.05))
    small, report = pruner.finalize()
    row = network("lenet-300-100")
    kept = row.kept({name: tuple(tensor.shape) for name, tensor in small.state_dict().items()})
    assert kept == tuple(report.widths[name][0] for name in ("fc1.inputs", "fc1", "fc2"))
    biases = kept[1] + kept[2] + 10
    assert row.pruned(kept) == pytest.approx(1 - (report.compact.params - biases) / 266_200)
