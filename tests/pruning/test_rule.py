from __future__ import annotations

import pytest
import torch
from tests.gated import ConvNet, conv_structure
from torch import nn

from secateur.errors import GateError
from secateur.gates import ARM, DiffPrune, HardConcrete, Magnitude
from secateur.pruning.choose import UNITS, choose
from secateur.pruning.rule import Rule
from secateur.structure.groups import Group
from secateur.structure.trace import trace

NAMES = ("stem", "inner", "fc1")


def names(*rules: Rule) -> list[tuple[str, ...]]:
    chosen = choose(ConvNet().double(), conv_structure(), rules, None)
    return [tuple(group.name for group in one.groups) for one in chosen]


def test_every_group_by_default() -> None:
    assert names(Rule()) == [NAMES]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("fc*", ("fc1",)),
        ("*n*", ("inner",)),
        (nn.Linear, ("fc1",)),
        (nn.Conv2d, ("stem", "inner")),
        (lambda group: group.size > 4, ("inner", "fc1")),
        (("stem", nn.Linear), ("stem", "fc1")),
    ],
)
def test_where_narrows_by_name_class_and_predicate(where: object, expected: tuple[str, ...]) -> None:
    assert names(Rule(where=where)) == [expected]
    assert names(Rule(exclude=where)) == [tuple(name for name in NAMES if name not in expected)]


def test_where_for_inputs_is_about_layers() -> None:
    assert names(Rule(units="inputs", where="fc*")) == [("fc1.inputs", "fc2.inputs")]
    assert names(Rule(units="inputs", where=nn.Conv2d)) == [("stem.inputs", "inner.inputs", "outer.inputs")]
    assert names(Rule(units="inputs", where=("stem", "fc2"))) == [("stem.inputs", "fc2.inputs")]
    assert len(names(Rule(units="inputs"))[0]) == 5


def test_rules_with_methods_of_their_own() -> None:
    rules = [Rule(where="stem", method=ARM(), init_open=0.7), Rule(exclude="stem"), Rule("inputs", method="diffprune")]
    first, second, third = choose(ConvNet().double(), conv_structure(), rules, Magnitude())
    assert first.method == ARM(init_open=0.7)
    assert second.method == Magnitude()
    assert isinstance(third.method, DiffPrune)
    assert choose(ConvNet().double(), conv_structure(), [Rule()], None)[0].method == HardConcrete()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "no rule"),
        (["fc1"], r"gates\[0\] is a str, expected an sc.Rule"),
        ([Rule(where="nowhere")], "finds nothing; the groups are stem; inner; fc1"),
        ([Rule(), Rule(where="fc1")], r"gated twice: 'fc1' by gates\[0\] and gates\[1\]"),
        ([Rule(units="inputs", where="nowhere")], "finds nothing; the linear and convolutional layers are stem"),
        ([Rule(method=3)], "method=3; expected a gate method"),
        ([Rule(method="hard")], "no gate method 'hard'"),
        ([Rule(method=Magnitude(), init_open=0.5)], "Magnitude has no init_open"),
        ([Rule(init_open=1.5)], "init_open"),
        ([Rule(where=3)], "where=3; expected a pattern"),
    ],
)
def test_rules_that_do_not_fit_are_refused(rules: list[Rule], message: str) -> None:
    with pytest.raises(GateError, match=message):
        choose(ConvNet().double(), conv_structure(), rules, None)


@pytest.mark.parametrize("units", ["neurons", "channels", 3])
def test_kinds_that_there_are_not_name_those_that_there_are(units: str) -> None:
    with pytest.raises(GateError, match="expected one of 'structured', 'heads', 'inputs', 'weights'"):
        Rule(units=units)
    assert {"structured", "inputs", "weights"} <= set(UNITS)


def test_a_model_with_nothing_to_prune_says_why() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    structure = trace(net, (torch.zeros(2, 3),))
    with pytest.raises(GateError, match=r"nothing to prune.*0\.weight: .*(input|output)"):
        choose(net, structure, [Rule()], None)


def test_a_predicate_sees_the_group() -> None:
    seen: list[Group] = []
    names(Rule(where=lambda group: bool(seen.append(group)) or True))
    assert tuple(group.name for group in seen) == NAMES
