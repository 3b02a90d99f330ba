"""Every architecture of the zoo, traced without a line about it: what is cut is exact, what is counted is so.

The default run takes a few small ones; ``-m slow`` takes all.
"""

from __future__ import annotations

import pytest
import torch
from tests.zoo import EXPECTED, ZOO, Row, missing
from tests.zoo_exam import Exam, counted_macs, half, held_back, one_each, uneven

#: Largest difference that the rounding of a rescaled weight to its float32 may make (RMSNorm over a cut dimension).
ROUNDING = 1e-5


def rows(*, causal: bool = False) -> list[object]:
    return [
        pytest.param(row, id=row.name, marks=() if row.quick else pytest.mark.slow)
        for row in ZOO.values()
        if row.causal or not causal
    ]


def examined(row: Row) -> Exam:
    if lacking := missing(row):
        pytest.skip(f"needs {' and '.join(lacking)}: pip install 'secateur[zoo]' -c constraints.txt")
    torch.manual_seed(0)
    return Exam(*row.tiny())


@pytest.fixture(scope="module", params=rows())
def exam(request: pytest.FixtureRequest) -> tuple[Row, Exam]:
    return request.param, examined(request.param)


def test_masked_equals_compact_at_half_of_every_group(exam):
    assert exam[1].proof().relative < ROUNDING


def test_masked_equals_compact_at_other_counts_in_every_group(exam):
    assert exam[1].proof_uneven().relative < ROUNDING


def test_the_cut_changes_what_the_model_computes(exam):
    row, found = exam
    assert bool(found.structure.groups) == (found.effect() > 1e-6), row.name


def test_cost_is_the_number_of_parameters(exam):
    _, found = exam
    dense = sum(parameter.numel() for parameter in found.model.parameters())
    assert found.structure.cost().params == dense
    assert found.structure.cost(found.keep).params == found.n_params()
    assert sum(held_back(found.structure).values()) == found.structure.cost(one_each(found.structure)).params


def test_macs_are_what_torch_counts(exam):
    row, found = exam
    if row.uncounted:
        return
    assert counted_macs(found.model, found.example) == found.structure.cost().macs
    assert counted_macs(found.small, found.example) == found.structure.cost(found.keep).macs


def test_no_less_can_go_than_could(exam):
    row, found = exam
    expected = EXPECTED[row.name]
    assert len(found.structure.groups) >= expected["groups"]
    assert found.units >= expected["units"]
    assert found.gone >= expected["gone"]


@pytest.mark.parametrize("row", rows(causal=True))
def test_masked_and_compact_generate_the_same_words_with_a_cache(row):
    same, apart = examined(row).generated()
    assert same
    assert apart < ROUNDING


def test_macs_of_an_lstm_are_those_of_its_equations():
    layers, time, batch = 2, 9, 2
    gates = 4 * 20 * (12 + 20) + (layers - 1) * 4 * 20 * (20 + 20)
    head = 20 * 14 + 14 * 4
    torch.manual_seed(0)
    assert Exam(*ZOO["lstm"].tiny()).structure.cost().macs == batch * (time * gates + head)


def test_the_zoo_holds_what_it_should():
    assert len(ZOO) >= 55
    assert {row.origin for row in ZOO.values()} == {"own", "torchvision", "timm", "transformers"}
    assert len({(row.origin, row.family) for row in ZOO.values()}) >= 40
    assert set(EXPECTED) <= set(ZOO)


def test_keep_sets_are_what_they_say():
    torch.manual_seed(0)
    structure = Exam(*ZOO["unet"].tiny()).structure
    for group in structure.groups:
        assert len(half(structure)[group.name]) == group.size // 2
        assert 1 <= len(uneven(structure)[group.name]) < group.size
    assert len({len(kept) for kept in uneven(structure).values()}) > 3
