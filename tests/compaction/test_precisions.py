"""Low precisions, integer tensors and the meta device pass through trace, mask and compact unchanged."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.compaction.proof import prove
from secateur.structure.tensors import named_tensors

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
DEVICES = ["cpu", "meta"]


class Mixed(nn.Module):
    """Words, a convolution with its count of batches, attention and an RMSNorm: a bit of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 12)
        self.register_buffer("place", torch.arange(6)[None], persistent=False)
        self.places = nn.Embedding(6, 12)
        self.conv, self.bn = nn.Conv1d(12, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.qkv, self.out = nn.Linear(16, 3 * 16), nn.Linear(16, 10)
        self.norm, self.head = nn.RMSNorm(10, eps=1e-3), nn.Linear(10, 3)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places(self.place[:, : words.shape[1]])
        x = self.bn(self.conv(x.transpose(1, 2))).relu().transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.norm(self.out(x)))


class Quantised(nn.Module):
    """Weights as int8 with a scale for each row, and integers that channels are multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 8)
        self.weight = nn.Parameter(torch.randint(-99, 99, (9, 8), dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(9, 1) / 99)
        self.register_buffer("signs", torch.tensor([1, -1, 1, 1, -1, 1, -1, 1, 1]))
        self.register_buffer("seen", torch.tensor([True] * 8))
        self.down = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.where(self.seen, self.up(x).relu(), 0)
        h = F.linear(h, self.weight.to(h.dtype) * self.scale)
        return self.down(F.relu(h * self.signs))


def half(structure: sc.Structure) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {g.name: torch.randperm(g.size, generator=generator)[: max(1, g.size // 2)] for g in structure.groups}


def words(device: str = "cpu") -> Tensor:
    return torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(0)).to(device)


def summary(structure: sc.Structure) -> object:
    groups = [(g.name, g.size, [(m.tensor, m.dim, m.index.tolist()) for m in g.members]) for g in structure.groups]
    return groups, structure.cost(), structure.frozen


@pytest.fixture(scope="module")
def expected() -> object:
    torch.manual_seed(0)
    structure = sc.trace(Mixed(), (words(),))
    assert [g.size for g in structure.groups] == [12, 16, 4, 10]
    return summary(structure)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
class TestFloats:
    def test_the_same_units_are_found(self, dtype: torch.dtype, device: str, expected: object) -> None:
        structure = sc.trace(Mixed().to(device, dtype), (words(device),))
        assert summary(structure) == expected
        assert not structure.notes

    def test_types_and_devices_stay(self, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        net = Mixed().to(device, dtype).eval()
        inputs = (words(device),)
        structure = sc.trace(net, inputs)
        keep = half(structure)
        small = sc.compact(net, structure, keep, examples=inputs)
        before, after = named_tensors(net), named_tensors(small)
        assert before.keys() == after.keys()
        for name, tensor in after.items():
            assert (tensor.dtype, tensor.device) == (before[name].dtype, before[name].device), name
            assert isinstance(tensor, nn.Parameter) == isinstance(before[name], nn.Parameter)
        assert small.bn.num_batches_tracked.dtype == torch.int64
        assert small.place.shape == (1, 6)
        assert small(*inputs).shape == (3, 6, 3)
        assert small(*inputs).dtype == dtype
        n_params = sum(parameter.numel() for parameter in small.parameters())
        assert n_params == structure.cost(keep).params < structure.cost().params
        if device == "cpu":
            proof = prove(net, small, structure, keep, inputs)
            assert proof.redrawn < 1e-12
            # In its own precision the small model differs from the masked one by rounding alone.
            apart = small(*inputs) - sc.mask(net, structure, keep)(*inputs)
            assert apart.abs().max() <= 40 * torch.finfo(dtype).eps


@pytest.mark.parametrize("device", DEVICES)
def test_integer_weights_and_buffers_are_cut(device: str) -> None:
    torch.manual_seed(0)
    net = Quantised().to(device)
    inputs = (torch.randn(4, 5).to(device),)
    structure = sc.trace(net, inputs)
    assert sorted(group.size for group in structure.groups) == [8, 9]
    keep = half(structure)
    small = sc.compact(net, structure, keep, examples=inputs)
    assert (small.weight.dtype, tuple(small.weight.shape)) == (torch.int8, (4, 4))
    assert (small.signs.dtype, small.signs.shape[0]) == (torch.int64, 4)
    assert (small.seen.dtype, small.seen.shape[0]) == (torch.bool, 4)
    assert not small.weight.requires_grad
    masked = sc.mask(net, structure, keep)
    assert masked.weight.dtype == torch.int8
    if device == "cpu":
        assert masked.weight.count_nonzero() <= 9 * 4
        assert torch.allclose(small(*inputs), masked(*inputs), atol=1e-6)


def test_layers_in_different_precisions() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, 12).bfloat16(), nn.BatchNorm1d(12), nn.Linear(12, 2).half()

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.a(x.bfloat16()).float())
            return self.b(h.relu().half()).float()

    net, inputs = Halves(), (torch.randn(5, 6),)
    structure = sc.trace(net, inputs)
    keep = {"a": torch.tensor([0, 3, 7])}
    small = sc.compact(net, structure, keep, examples=inputs)
    assert (small.a.weight.dtype, small.norm.weight.dtype, small.b.weight.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float16,
    )
    assert prove(net, small, structure, keep, inputs).relative < 1e-12


def test_autocast_is_traced_and_proven() -> None:
    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.b(self.a(x).relu()).float()

    net, inputs = Autocast(), (torch.randn(5, 6),)
    structure = sc.trace(net, inputs)
    assert structure.group("a").size == 12
    keep = {"a": torch.tensor([0, 3, 7])}
    small = sc.compact(net, structure, keep, examples=inputs)
    assert torch.allclose(small(*inputs), sc.mask(net, structure, keep)(*inputs), atol=1e-2)


def test_a_model_that_is_far_too_large_is_cut_on_meta() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(50_000, 400_000), nn.ReLU(), nn.Linear(400_000, 50_000))
        inputs = (torch.zeros(2, 50_000),)
    structure = sc.trace(net, inputs)
    assert structure.cost().params == 2 * 50_000 * 400_000 + 450_000
    keep = {"0": torch.arange(7, 200_007)}
    small = sc.compact(net, structure, keep, examples=inputs)
    assert small[2].in_features == 200_000
    assert small[2].weight.is_meta
