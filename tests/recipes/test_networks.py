"""The networks are what their papers and pages say: sizes, shapes, prune rates."""

import pytest
import torch

import secateur as sc
from secateur.errors import SecateurError
from secateur.recipes.networks import NETWORKS, LeNet5, LeNet300, ResNet7, ResNet20, network


def n_params(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


#: The largest is of the class of a smaller one, which is tested in its place.
TESTED = [name for name in NETWORKS if name != "wrn-28-10"]


@pytest.mark.parametrize("name", TESTED)
def test_maps_its_declared_shape_to_ten_classes(name: str):
    row = network(name)
    assert row.build().eval()(torch.zeros(3, *row.shape)).shape == (3, 10)


def test_the_digits_network_stays_under_its_promised_size():
    assert n_params(ResNet7()) == 48_818
    assert n_params(ResNet7()) <= 60_000


def test_lenets_have_the_papers_sizes():
    assert n_params(LeNet300()) == 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10
    assert n_params(LeNet5()) == 25 * 20 + 20 + 25 * 20 * 50 + 50 + 800 * 500 + 500 + 500 * 10 + 10


def test_resnet20_has_19_convolutions_of_3x3_and_one_linear_layer():
    convolutions = [m for m in ResNet20().modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) == 19


def test_wide_residual_networks_have_the_published_sizes():
    # 36.5 million for WRN-28-10 in the paper, and the units that L0-ARM gates: 12 times the blocks' first channels.
    assert n_params(network("wrn-28-10").build()) == 36_479_194
    model = network("wrn-16-4").build()
    assert [block.conv1.out_channels for block in model.blocks] == [64, 64, 128, 128, 256, 256]
    assert n_params(model) == 2_748_890


@pytest.mark.parametrize(
    ("name", "kept", "percent"),
    [
        ("lenet-300-100", (219, 214, 100), 73.98),
        ("lenet-300-100", (159, 74, 73), 93.28),
        ("lenet-300-100", (784, 300, 100), 0.0),
        ("lenet-5", (20, 25, 45, 462), 91.08),
        ("lenet-5", (6, 10, 39, 11), 99.49),
        ("lenet-5", (20, 50, 800, 500), 0.0),
    ],
)
def test_prune_rates_agree_with_the_published_rows(name: str, kept: tuple[int, ...], percent: float):
    # The tables give two decimals.
    assert 100 * network(name).pruned(kept) == pytest.approx(percent, abs=0.005)


@pytest.mark.parametrize("name", [name for name, row in NETWORKS.items() if row.counted])
def test_counted_dimensions_of_a_dense_network_are_pruned_by_nothing(name: str):
    row = network(name)
    shapes = {key: tuple(value.shape) for key, value in row.build().state_dict().items()}
    assert row.pruned(row.kept(shapes)) == 0.0


def test_an_unknown_network_is_refused_with_the_list_of_those_that_exist():
    with pytest.raises(SecateurError, match=r"unknown network 'lenet'.*resnet-7.*lenet-5"):
        network("lenet")


@pytest.mark.parametrize("name", TESTED)
@pytest.mark.parametrize("share", [0.5, 0.1])
def test_masked_equals_compact_for_every_network(name: str, share: float):
    row = network(name)
    model = row.build().double()
    generator = torch.Generator().manual_seed(0)
    # Statistics, scales and shifts as training leaves them, not as they are initialised.
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(0.5 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.1)
    x = torch.randn(2, *row.shape, generator=generator, dtype=torch.float64)
    structure = sc.trace(model, examples=(x,))
    keep = {
        group.name: torch.randperm(group.size, generator=generator)[: max(1, round(share * group.size))].sort().values
        for group in structure.groups
    }
    masked, small = sc.mask(model, structure, keep), sc.compact(model, structure, keep)
    cost = structure.cost(keep)
    assert n_params(small) == cost.params < n_params(model)
    for module in (masked, small):
        module.eval()
    expected, found = masked(x), small(x)
    assert (expected - found).abs().max() <= 1e-10 * expected.abs().max()
