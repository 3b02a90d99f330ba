from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.gated import DTYPE, ConvNet, conv_structure

from secateur.budgets.costs import CostModel
from secateur.pruning.choose import choose
from secateur.pruning.rule import Rule
from secateur.pruning.units import Units

#: stem 4, inner 6, fc1 5 units; then fc1.inputs 36, fc2.inputs 5
RULES = [Rule(units="inputs", where="fc*"), Rule(where=("stem", "inner"))]


def units(rules: list[Rule] = RULES) -> Units:
    return Units(conv_structure(), choose(ConvNet().double(), conv_structure(), rules, None))


def test_gates_and_units_stand_in_their_own_orders() -> None:
    found = units()
    assert [group.name for group in found.groups] == ["fc1.inputs", "fc2.inputs", "stem", "inner"]
    assert [group.name for group in found.counted.groups] == ["stem", "inner", "fc1", "fc1.inputs", "fc2.inputs"]
    assert found.sizes == (36, 5, 4, 6)


def test_chances_multiply_along_ownership() -> None:
    p = torch.rand(51, dtype=DTYPE)
    fine, fc2, stem, inner = p[:36], p[36:41], p[41:45], p[45:]
    expected = torch.cat([stem, inner, torch.ones(5, dtype=DTYPE), fine * stem.repeat_interleave(9), fc2])
    torch.testing.assert_close(units().chances(p), expected)


def test_a_structured_unit_is_closed_when_all_that_reads_it_is() -> None:
    z = torch.ones(51)
    z[36] = 0.0  # the only input of fc2 that reads the first unit of fc1, which has no gate of its own
    z[:36].view(4, 9)[2] = 0.0  # all that fc1 reads of a channel; but inner reads it too
    z[43:45] = torch.tensor([0.0, 1.0])
    is_open = units().open(z)
    assert is_open[:4].tolist() == [True, True, False, True]  # by its own gate
    assert is_open[10:15].tolist() == [False, True, True, True, True]
    assert is_open[15:51].view(4, 9).any(1).tolist() == [True, True, False, True]
    z[43] = 1.0
    assert units().open(z)[:4].all()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_open_units_are_the_same_whatever_the_default_type(default: torch.dtype) -> None:
    z = (torch.rand(51) < 0.5).float()
    expected = units().open(z)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert torch.equal(units().open(z), expected)
    finally:
        torch.set_default_dtype(before)


@given(st.lists(st.booleans(), min_size=51, max_size=51))
def test_gates_of_an_open_pattern_give_it_again(flags: list[bool]) -> None:
    found = units()
    is_open = found.open(torch.tensor(flags).float())
    assert torch.equal(found.open(found.gates(is_open).float()), is_open)


@given(st.lists(st.booleans(), min_size=51, max_size=51))
def test_kept_units_are_counted_as_cut(flags: list[bool]) -> None:
    found = units(RULES[1:])
    is_open = found.open(torch.tensor(flags[41:]).float())
    assert found.structure.cost(found.keep(is_open)) == CostModel(found.counted).exact(is_open)


def test_scores_of_different_methods_are_ranks_and_what_cannot_flip_is_infinite() -> None:
    scores = torch.cat([torch.linspace(100, 200, 41), torch.linspace(-9, -8, 10)]).double()
    is_open = torch.ones(56, dtype=torch.bool)
    is_open[2] = False  # the third channel
    different = units([RULES[0], Rule(where=("stem", "inner"), method="arm")])
    spread = different.scores(scores, is_open)
    assert spread[10:15].isinf().all()
    assert spread[15:51].isinf().tolist() == [18 <= position < 27 for position in range(36)]
    assert spread[spread.isfinite()].max() < 1
    assert spread[:4].tolist() == [0.0, 0.1, 0.2, 0.3]
    is_open[10:12] = False  # units of fc1, which only gated inputs read
    coarse = units([*RULES, Rule(where="fc1")])
    more = torch.cat([scores, torch.linspace(0, 1, 5).double()])
    assert coarse.scores(more, is_open)[10:15].isinf().tolist() == [True, True, False, False, False]
    alike = units([RULES[0], Rule(where=("stem", "inner"), init_open=0.3)])
    assert torch.equal(alike.scores(scores, is_open)[:4], scores[41:45])


def test_inputs_that_go_with_their_owner_are_no_flips_of_their_own() -> None:
    found = units()
    before = found.open(torch.ones(51))
    z = torch.ones(51)
    z[41] = 0.0
    assert found.flips(before, found.open(z)) == 1
    z[9] = 0.0  # an input of the second channel
    assert found.flips(before, found.open(z)) == 2
    assert found.flips(before, before) == 0


def test_widths_by_group() -> None:
    z = torch.ones(51)
    z[41] = 0.0
    assert units().by_group(units().open(z)) == {
        "stem": (3, 4),
        "inner": (6, 6),
        "fc1": (5, 5),
        "fc1.inputs": (27, 36),
        "fc2.inputs": (5, 5),
    }


@pytest.mark.parametrize("is_open", [[True] * 15, [False] * 4 + [True] * 11])
def test_keep_names_groups_that_lose_units(is_open: list[bool]) -> None:
    keep = units([Rule()]).keep(torch.tensor(is_open))
    assert {name: kept.tolist() for name, kept in keep.items()} == ({} if all(is_open) else {"stem": []})
