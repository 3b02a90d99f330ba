"""Attributes that hold sizes: found by need, and never the size of two groups at once."""

from __future__ import annotations

import warnings

import pytest
import torch
from tests.law import check_cut
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from secateur.compaction.compact import compact
from secateur.structure.trace import trace


class OneStep(nn.Module):
    """One step of a recurrent cell from zeros: its state and its output are two groups, which share hidden_size."""

    def __init__(self, cell: nn.Module, hidden: int) -> None:
        super().__init__()
        self.before, self.cell, self.after = nn.Linear(3, 5), cell, nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.after(self.cell(self.before(x)))
        return made


class TwoHeads(nn.Module):
    """Two widths that one attribute is the size of, in code of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.a, self.b, self.c = nn.Linear(4, width), nn.Linear(4, width), nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).reshape(-1, self.width), self.b(x).reshape(-1, self.width)
        made: Tensor = self.c(torch.cat([a.relu(), b.tanh()], 1))
        return made


@pytest.mark.parametrize("hidden", [2, 3, 4, 9])
@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell])
def test_a_cell_that_runs_once_is_cut_or_frozen(kind, hidden):
    structure = check_cut(OneStep(kind(5, hidden), hidden), torch.randn(4, 3), seeds=range(12))
    assert "before" in {group.name for group in structure.groups}


@pytest.mark.parametrize("width", [2, 3, 4, 9])
def test_an_attribute_that_two_groups_need_is_the_size_of_neither(width):
    structure = check_cut(TwoHeads(width), torch.randn(4, 4), seeds=range(12))
    assert len({group.name for group in structure.groups} & {"a", "b"}) < 2


class Decoder(nn.Module):
    """Attention to itself and to a memory, whose heads one attribute numbers, with a feed-forward layer between."""

    def __init__(self, n_head: int, split: nn.Module | None = None) -> None:
        super().__init__()
        width = 2 * n_head
        self.n_head, self.split = n_head, split
        self.embed, self.remember = nn.Linear(3, 6), nn.Linear(5, 6)
        for name in ("own", "memory"):
            for part in ("query", "key", "value"):
                setattr(self, f"{name}_{part}", nn.Linear(6, width))
            setattr(self, f"{name}_out", nn.Linear(width, 6))
        self.wide, self.narrow = nn.Linear(6, 20), nn.Linear(20, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 2)

    def heads(self, x: Tensor) -> Tensor:
        if self.split is not None:
            return self.split(x)
        return x.view(x.shape[0], x.shape[1], self.n_head, -1).transpose(1, 2)

    def attend(self, name: str, x: Tensor, memory: Tensor) -> Tensor:
        query = self.heads(self.get_submodule(f"{name}_query")(x))
        key, value = (self.heads(self.get_submodule(f"{name}_{part}")(memory)) for part in ("key", "value"))
        attended = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        made: Tensor = self.get_submodule(f"{name}_out")(attended)
        return made

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x, memory = self.embed(x), self.remember(memory)
        x = self.norm(x + self.attend("own", x, x))
        x = x + self.narrow(self.wide(x).relu())
        made: Tensor = self.head(x + self.attend("memory", x, memory))
        return made


class Split(nn.Module):
    """Heads from a width, in a module without parameters that layers share."""

    def __init__(self, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.n_head, -1).transpose(1, 2)


class Layers(nn.Module):
    """Layers whose heads the root numbers."""

    def __init__(self, n_head: int, n_layer: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.embed, self.head = nn.Linear(3, 6), nn.Linear(6, 2)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(6, 9 * n_head), "out": nn.Linear(3 * n_head, 6)}) for _ in range(n_layer)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            q, k, v = (
                part.reshape(*x.shape[:2], self.n_head, -1).transpose(1, 2) for part in layer["qkv"](x).chunk(3, -1)
            )
            x = x + layer["out"](scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        made: Tensor = self.head(x)
        return made


@pytest.mark.parametrize("shares_a_module", [False, True])
@pytest.mark.parametrize("n_head", [2, 3, 4, 8])
def test_two_attentions_of_one_number_of_heads_lose_them_together(n_head, shares_a_module):
    model = Decoder(n_head, Split(n_head) if shares_a_module else None)
    structure = check_cut(model, torch.randn(2, 5, 3), torch.randn(2, 4, 5), seeds=range(12))
    heads = [group for group in structure.groups if group.size == n_head]
    assert len(heads) == 1
    assert {"own_query.weight", "memory_value.weight"} <= {member.tensor for member in heads[0].members}
    name = "split.n_head" if shares_a_module else "n_head"
    assert [rule.name for rule in structure.attributes] == [name]


@pytest.mark.parametrize("n_head", [2, 4, 8])
def test_layers_whose_heads_the_root_numbers_lose_them_together(n_head):
    structure = check_cut(Layers(n_head, 3), torch.randn(2, 5, 3), seeds=range(6))
    heads = [group for group in structure.groups if group.size == n_head]
    assert len(heads) == 1
    assert {f"layers.{k}.qkv.weight" for k in range(3)} <= {member.tensor for member in heads[0].members}


class Conditioned(nn.Module):
    """A recurrent layer with input and first state of widths that can be cut: its code checks both in a row."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed, self.first = nn.Linear(3, 6), nn.Linear(4, 7)
        self.layer, self.head = kind(6, 7, batch_first=True), nn.Linear(7, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        first = self.first(condition).tanh()[None]
        state = (first, torch.zeros_like(first)) if isinstance(self.layer, nn.LSTM) else first
        made: Tensor = self.head(self.layer(self.embed(x), state)[0])
        return made


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_two_sizes_that_are_checked_in_a_row_both_follow(kind):
    structure = check_cut(Conditioned(kind), torch.randn(2, 5, 3), torch.randn(2, 4), seeds=range(6))
    assert {6, 7} <= {group.size for group in structure.groups}


class AddsWhereItFits(nn.Module):
    """Adds two tensors if they happen to be of one shape, which the dense ones are not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu()
        b = self.b(a).relu()
        made: Tensor = self.c(a + b if a.shape == b.shape else b)
        return made


def test_shapes_that_only_a_cut_makes_equal_are_not_made_equal():
    structure = check_cut(AddsWhereItFits(), torch.randn(4, 3), seeds=range(60))
    assert len(structure.groups) == 1


@pytest.mark.parametrize(
    "norm",
    [
        nn.InstanceNorm2d,
        lambda n: nn.InstanceNorm2d(n, affine=True),
        lambda n: nn.BatchNorm2d(n, affine=False, track_running_stats=False),
    ],
)
def test_norms_without_tensors_say_how_many_features_are_left(norm):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 6, 3), norm(6), nn.ReLU())
    model.append(nn.Conv2d(6, 2, 3))
    x = torch.randn(2, 3, 9, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        structure = trace(model, (x,))
    check_cut(model, x, structure=structure)
    small = compact(model, structure, {"0": torch.arange(3), "3": torch.arange(4)})
    assert (small[1].num_features, small[4].num_features) == (3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small(x)


class OtherwiseWithFew(nn.Module):
    """Normalises where there are enough channels for that."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        made: Tensor = self.b(x.square() if x.shape[-1] > 3 else x)
        return made


def test_code_that_does_otherwise_with_few_units_is_seen():
    assert not check_cut(OtherwiseWithFew(), torch.randn(4, 3), seeds=range(6)).groups
