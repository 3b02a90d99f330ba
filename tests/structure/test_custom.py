"""Groups of a user's making: unions of traced units, with everything that is coupled to them."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.budgets.costs import CostModel
from secateur.compaction.compact import compact, mask
from secateur.compaction.proof import prove
from secateur.pruning.inputs import with_inputs
from secateur.structure.groups import Group, Member
from secateur.structure.structure import Structure


class Attention(nn.Module):
    """Attention of six heads of four features, and a residual feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.qkv = nn.Linear(12, 3 * 24)
        self.out = nn.Linear(24, 12)
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        h = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.down(torch.sigmoid(self.up(x)))


class Net(nn.Module):
    """Convolutions whose channels become four features each, and two hidden layers of the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc1, self.fc2, self.fc3 = nn.Linear(8 * 4, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x))).flatten(1)
        return self.fc3(torch.sigmoid(self.fc2(torch.sigmoid(self.fc1(x)))))


IMAGES = (torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0)),)
WORDS = (torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0)),)


@functools.cache
def net_structure() -> Structure:
    with torch.random.fork_rng():
        return sc.trace(Net(), IMAGES)


@functools.cache
def attention_structure() -> Structure:
    with torch.random.fork_rng():
        return sc.trace(Attention(), WORDS)


def blocks_of(n: int, width: int) -> np.ndarray:
    return np.arange(n).reshape(-1, width)


def equal(net: nn.Module, structure: Structure, keep: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> nn.Module:
    """The cut model, after it was held to the masked one and to its cost."""
    small = compact(net, structure, keep)
    proof = prove(net, small, structure, keep, inputs)
    assert proof.redrawn < 1e-12
    assert proof.relative < 1e-12
    assert sum(parameter.numel() for parameter in small.parameters()) == structure.cost(keep).params
    return small


def members_of(group: Group) -> dict[tuple[str, int], list[list[int]]]:
    return {(member.tensor, member.dim): member.index.tolist() for member in group.members}


class TestMaking:
    def test_blocks_of_channels_bring_all_that_is_coupled(self) -> None:
        group = net_structure().custom("pairs", {"conv": blocks_of(8, 2)})
        assert (group.name, group.size, group.kind) == ("pairs", 4, "custom")
        members = members_of(group)
        assert {("conv.weight", 0), ("bn.weight", 0), ("bn.running_mean", 0), ("fc1.weight", 1)} <= members.keys()
        assert members["conv.weight", 0] == [[0, 1], [2, 3], [4, 5], [6, 7]]
        assert members["fc1.weight", 1][1] == list(range(8, 16))
        assert [member.tensor for member in group.gated] == ["fc1.weight"]

    def test_positions_name_the_units_that_own_them(self) -> None:
        by_name = net_structure().custom("pairs", {"conv": blocks_of(8, 2)})
        by_rows = net_structure().custom("pairs", {("conv.weight", 0): blocks_of(8, 2)})
        by_reader = net_structure().custom("pairs", {("fc1.weight", 1): torch.arange(32).reshape(4, 8)})
        by_both = net_structure().custom("pairs", {("conv.weight", 0): blocks_of(8, 2), "conv": blocks_of(8, 2)})
        for other in (by_rows, by_reader, by_both):
            assert members_of(other) == members_of(by_name)

    def test_units_of_two_layers_together(self) -> None:
        group = net_structure().custom("both", {"fc1": [[3], [0]], "fc2": [[5], [7]]})
        assert members_of(group)["fc1.bias", 0] == [[3], [0]]
        assert members_of(group)["fc2.bias", 0] == [[5], [7]]
        assert members_of(group)["fc2.weight", 1] == [[3], [0]]

    def test_units_along_one_dimension_from_two_groups_are_one_member(self) -> None:
        class Cat(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(8, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.c(torch.cat([self.a(x).sin(), self.b(x).cos()], -1))

        net, x = Cat(), torch.randn(2, 3)
        structure = sc.trace(net, (x,))
        group = structure.custom("pairs", {"a": [[0], [2], [3]], "b": [[1], [0], [3]]})
        assert members_of(group)["c.weight", 1] == [[0, 5], [2, 4], [3, 7]]
        equal(net, structure.regrouped([group]), {"pairs": torch.tensor([2])}, (x,))


class TestUse:
    def test_blocks_are_masked_cut_and_counted(self) -> None:
        net, structure = Net(), net_structure()
        new = structure.regrouped([structure.custom("quads", {"fc1": blocks_of(12, 4)})])
        assert [group.name for group in new.groups] == ["conv", "quads", "fc2"]
        assert new.cost() == structure.cost()
        keep = {"quads": torch.tensor([0, 2]), "fc2": torch.arange(5)}
        small = equal(net, new, keep, IMAGES)
        assert small.fc1.out_features == 8
        whole = structure.cost({"fc1": torch.tensor([0, 1, 2, 3, 8, 9, 10, 11]), "fc2": torch.arange(5)})
        assert new.cost(keep) == whole
        assert mask(net, new, keep).fc2.weight[:, 4:8].count_nonzero() == 0

    def test_units_that_no_custom_group_takes_stay_a_group(self) -> None:
        net, structure = Net(), net_structure()
        new = structure.regrouped([structure.custom("some", {"fc1": [[1, 4], [7, 8]]})])
        left = new.group("fc1")
        assert left.size == 8
        assert left.members[0].index.ravel().tolist() == [0, 2, 3, 5, 6, 9, 10, 11]
        small = equal(net, new, {"some": torch.tensor([1]), "fc1": torch.tensor([0, 7])}, IMAGES)
        assert torch.equal(small.fc1.bias, net.fc1.bias[[0, 7, 8, 11]])

    def test_a_single_unit_that_is_left_over_stays(self) -> None:
        structure = net_structure()
        rest = np.arange(1, 12).reshape(1, 11)
        new = structure.regrouped([structure.custom("most", {"fc1": rest})])
        assert [group.name for group in new.groups] == ["conv", "most", "fc2"]
        assert "left over" in new.why_frozen("fc1")
        assert equal(Net(), new, {"most": torch.tensor([], dtype=int)}, IMAGES).fc1.out_features == 2

    def test_a_whole_layers_heads_are_one_unit_that_can_go(self) -> None:
        net, structure = Attention(), attention_structure()
        heads = next(group for group in structure.groups if group.size == 6)
        attention = structure.custom("attention", {heads.name: np.arange(6).reshape(1, 6)})
        assert (attention.size, attention.least) == (1, 0)
        new = structure.regrouped([attention])
        closed = {"attention": torch.tensor([], dtype=torch.int64)}
        small = equal(net, new, closed, WORDS)
        assert small.out.in_features == 4
        assert not small.out.weight.any()
        assert new.cost(closed) == structure.cost({heads.name: torch.arange(1)})
        assert new.cost({"attention": torch.tensor([0])}) == new.cost() == structure.cost()
        costs = CostModel(new)
        flags = torch.ones(costs.total, dtype=torch.bool)
        assert costs.exact(flags) == structure.cost()
        flags[0] = False
        assert costs.exact(flags) == new.cost(closed)
        # Its chance enters linearly, so the expectation lies between both ends.
        half = flags.double().index_fill(0, torch.tensor([0]), 0.5)
        middle = (structure.cost().params + new.cost(closed).params) / 2
        assert float(costs.expected(half)) == pytest.approx(middle)

    def test_layers_that_share_one_unit_count_their_product_exactly(self) -> None:
        structure = net_structure()
        new = structure.regrouped([structure.custom("both", {"fc1": blocks_of(12, 3), "fc2": blocks_of(12, 3)})])
        costs = CostModel(new)
        assert costs.dense == structure.cost()
        chances = torch.ones(costs.total, dtype=torch.float64)
        chances[8:] = 0.5
        # 4 units of 3 rows each in fc2, 3 columns each: E[n^2] = 4 p (1 - p) + (4 p)^2 for what lies in both.
        n, square = 2.0, 4 * 0.25 + 4.0
        expected = 2 * 8 * 9 + 8 + 16 + 32 * 3 * n + 3 * n + 9 * square + 3 * n + 9 * n + 3
        assert float(costs.expected(chances)) == pytest.approx(expected)
        for n_open in (1, 3, 4):
            keep = {"both": torch.arange(n_open)}
            assert new.cost(keep) == structure.cost({"fc1": torch.arange(3 * n_open), "fc2": torch.arange(3 * n_open)})
            equal(Net(), new, keep, IMAGES)

    def test_with_single_inputs_beside_them(self) -> None:
        net, structure = Net(), net_structure()
        new = structure.regrouped([structure.custom("half", {"fc1": [[0, 1, 2, 3, 4, 5]]})])
        member = Member("fc2.weight", 1, np.arange(12).reshape(-1, 1), consumer=True, carrier=False)
        both = with_inputs(new, (Group("fc2.inputs", 12, (member,), kind="inputs"),))
        for kept in ([0], []):
            half = torch.tensor(kept, dtype=torch.int64)
            keep = {"half": half, "fc2.inputs": torch.tensor([2, 3, 7, 9])}
            small = compact(net, both, keep, examples=IMAGES)
            assert small.fc2.in_features == (4 if kept else 2)
            assert prove(net, small, both, keep, IMAGES).relative < 1e-12

    def test_widths_of_blocks_are_rounded(self) -> None:
        net, structure = Net(), net_structure()
        new = structure.regrouped([structure.custom("pairs", {"fc1": blocks_of(12, 2)})])
        small = compact(net, new, {"pairs": torch.tensor([4])}, round_to=4, examples=IMAGES)
        assert small.fc1.out_features == 4

    def test_gates_of_custom_groups_train_and_finalize(self) -> None:
        torch.manual_seed(0)
        net, structure = Net().double(), net_structure()
        quads = structure.custom("quads", {"fc1": blocks_of(12, 4)})
        rules = [sc.Rule(units=[quads], method=sc.DiffPrune(init_open=0.5)), sc.Rule()]
        x = IMAGES[0].double()
        pruner = sc.attach(net, structure=structure, examples=(x,), gates=rules)
        assert [(group.name, group.size) for group in pruner.groups] == [("quads", 3), ("conv", 8), ("fc2", 12)]
        with torch.no_grad():
            for parameter in pruner.gates.parameters():
                parameter.add_(3 * torch.randn_like(parameter))
        pruner.backward(lambda: net(x).square().mean())
        assert all(parameter.grad is not None for parameter in pruner.gates.parameters())
        pruner.step()
        expected = net.eval()(x)
        small, report = pruner.finalize()
        torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-12)
        assert small.fc1.out_features == 4 * report.widths["quads"][0]
        assert report.compact == pruner.exact

    @pytest.mark.parametrize("is_open", [True, False])
    def test_a_budget_closes_and_opens_a_single_unit(self, is_open: bool) -> None:
        net, structure = Attention().double(), attention_structure()
        (heads, up) = structure.groups
        attention = structure.custom("attention", {heads.name: np.arange(6).reshape(1, 6)})
        pruner = sc.attach(
            net,
            structure=structure,
            examples=(WORDS[0].double(),),
            gates=[sc.Rule(units=[attention]), sc.Rule(where=up.name)],
            budget=sc.Budget(keep_params=1.0 if is_open else 0.2),
        )
        with torch.no_grad():
            for gate, value in zip(pruner.gates.rules, (-3.0 if is_open else 3.0, 4.0), strict=True):
                gate.log_alpha.fill_(value)
        small, report = pruner.finalize()
        assert report.widths["attention"] == (int(is_open), 1)
        assert small.out.in_features == (24 if is_open else 4)
        assert report.compact.params <= (1.0 if is_open else 0.2) * report.dense.params
        assert report.difference_float64 <= 1e-12

    def test_a_group_put_together_by_hand_is_completed(self) -> None:
        net = Net().double()
        member = Member("fc1.bias", 0, blocks_of(12, 6), consumer=False, carrier=True)
        hand = Group("halves", 2, (member,))
        pruner = sc.attach(net, structure=net_structure(), gates=[sc.Rule(units=[hand])])
        assert {m.tensor for m in pruner.groups[0].members} == {"fc1.weight", "fc1.bias", "fc2.weight"}

    def test_traced_groups_can_be_named_too(self) -> None:
        structure = net_structure()
        pruner = sc.attach(Net(), structure=structure, gates=[sc.Rule(units=structure.groups[:1])])
        assert [group.name for group in pruner.groups] == ["conv"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("parts", "message"),
        [
            ({("fc1.weight", 1): [[0, 1], [4, 5]]}, r"unit 0 splits unit 0 of 'conv': it names 2 of the positions"),
            (
                {("fc3.weight", 0): [[0], [1]]},
                r"positions \[0, 1\] along dimension 0 of fc3.weight are frozen: each is a",
            ),
            ({("conv.weight", 2): [[0], [1]]}, "are frozen: each is a kernel dimension"),
            ({"fc9": [[0], [1]]}, "'fc9': no such group; the groups are conv; fc1; fc2"),
            ({"fc1.weight": [[0], [1]]}, r"a tensor is named with its dimension: \(\"fc1.weight\", 0\)"),
            ({("fc1.weight", 2): [[0], [1]]}, "and one of its dimensions"),
            ({("fc9.weight", 0): [[0], [1]]}, "the name of a parameter or buffer"),
            ({"fc1": [[0], [12]]}, r"units from 0 to 12, expected them in \[0, 12\)"),
            ({"fc1": [[0], [-1]]}, r"units from -1 to 0"),
            ({"fc1": [[0, 1], [1, 2]]}, "a number is named twice"),
            ({"fc1": [0, 1]}, "one row for each unit"),
            ({"fc1": [[0], [1, 2]]}, "all rows equally long"),
            ({"fc1": [[0.0], [1.0]]}, "expected integers"),
            ({"fc1": [[True], [False]]}, "expected integers"),
            ({"fc1": [[0], [1]], "fc2": [[0]]}, "its parts have 1, 2 rows; expected one for each unit in all"),
            ({"fc1": [[0], [1]], ("fc1.bias", 0): [[2], [0]]}, "unit 0 of 'fc1' is in its unit 0 and in its unit 1"),
            ({"fc1": [[0], [1]], ("fc1.bias", 0): [[0], [2]]}, "hold from 1 to 2 units of 'fc1'"),
            ({"fc1": [[4]]}, "its only unit holds one unit of fc1"),
            ({}, "no parts; expected what its units are made of"),
        ],
    )
    def test_units_that_are_no_unions_of_alike_traced_units(self, parts: dict, message: str) -> None:
        with pytest.raises(sc.TraceError, match=message):
            net_structure().custom("mine", parts)

    def test_names_are_unique(self) -> None:
        structure = net_structure()
        with pytest.raises(sc.TraceError, match="the structure has a group of that name"):
            structure.custom("fc1", {"fc1": blocks_of(12, 2)})
        group = structure.custom("mine", {"fc1": blocks_of(12, 2)})
        other = structure.custom("mine", {"fc2": blocks_of(12, 2)})
        with pytest.raises(sc.TraceError, match="two custom groups are named 'mine'"):
            structure.regrouped([group, other])

    def test_a_unit_is_in_one_group(self) -> None:
        structure = net_structure()
        groups = [structure.custom(name, {"fc1": [[0, 5], [2, 3]]}) for name in ("a", "b")]
        with pytest.raises(sc.TraceError, match="unit 0 of 'fc1' is in the custom groups 'a' and 'b'"):
            structure.regrouped(groups)

    def test_groups_are_of_the_structure(self) -> None:
        structure = net_structure()
        group = structure.custom("mine", {"fc1": [[3, 5], [6, 7]]})
        new = structure.regrouped([structure.custom("other", {"fc1": [[0], [1]]})])
        with pytest.raises(sc.TraceError, match="made from another structure"):
            new.regrouped([group])
        with pytest.raises(sc.TraceError, match="'conv' is no custom group"):
            structure.regrouped([structure.group("conv")])

    def test_two_places_of_closing_are_not_one_gate(self) -> None:
        class Normed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up, self.norm, self.mid, self.down = (
                    nn.Linear(4, 6), nn.RMSNorm(6, eps=1e-5), nn.Linear(6, 6), nn.Linear(6, 3)
                )  # fmt: skip

            def forward(self, x: Tensor) -> Tensor:
                return self.down(torch.sigmoid(self.mid(self.norm(self.up(x)))))

        net, x = Normed(), torch.randn(2, 4)
        structure = sc.trace(net, (x,))
        with pytest.raises(
            sc.TraceError, match=r"an RMSNorm averages over the units of 'up'.* one gate cannot do both"
        ):
            structure.custom("mixed", {"up": blocks_of(6, 1), "mid": blocks_of(6, 1)})
        halves = structure.custom("halves", {"up": blocks_of(6, 3)})
        assert halves.at_producers
        x = x.double()
        equal(net.double(), structure.regrouped([halves]), {"halves": torch.tensor([1])}, (x,))

    def test_rules_name_groups_once(self) -> None:
        structure = net_structure()
        mine = structure.custom("mine", {"fc1": blocks_of(12, 2)})
        with pytest.raises(sc.GateError, match="gated twice: 'mine'"):
            sc.attach(Net(), structure=structure, gates=[sc.Rule(units=[mine]), sc.Rule(units=[mine])])
        with pytest.raises(sc.GateError, match="gated twice: 'conv'"):
            sc.attach(Net(), structure=structure, gates=[sc.Rule(units=[structure.group("conv")]), sc.Rule()])
        with pytest.raises(sc.GateError, match="leaves none of the groups mine"):
            sc.attach(Net(), structure=structure, gates=[sc.Rule(units=[mine], where="x")])
        stolen = Group("conv", 6, attention_structure().groups[0].members)
        with pytest.raises(sc.GateError, match="not that of this structure"):
            sc.attach(Net(), structure=structure, gates=[sc.Rule(units=[stolen])])
        for bad in ([], ["mine"], None, 3, mine):
            with pytest.raises(sc.GateError, match="or groups"):
                sc.Rule(units=bad)
