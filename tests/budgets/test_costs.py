"""Costs against enumeration over all patterns, finite differences, and a network counted by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.polynomials import Polynomials, chain, convolutional, group
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.budgets.costs import KINDS, CostModel
from secateur.errors import BudgetError
from secateur.structure.groups import Axis, Cost, Term


@st.composite
def polynomials(draw: st.DrawFn) -> Polynomials:
    """At most 7 units in at most 3 groups; axes of several groups, terms that meet a group up to three times."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3).filter(lambda sizes: sum(sizes) <= 7))
    positions = st.integers(0, len(sizes) - 1)
    entries = st.lists(st.tuples(positions, st.integers(0, 3)), max_size=3).map(tuple)
    axes = draw(st.lists(st.builds(Axis, st.integers(0, 2), entries), min_size=1, max_size=4))
    factors = st.lists(st.integers(0, len(axes) - 1), max_size=3).map(tuple)
    terms = st.lists(st.builds(Term, st.integers(0, 4).map(float), factors, st.just("t")), max_size=4).map(tuple)
    groups = tuple(group(s, f"g{i}") for i, s in enumerate(sizes))
    return Polynomials(groups, tuple(axes), draw(terms), draw(terms), draw(terms))


def counted(structure: Polynomials, n_open: list[int]) -> tuple[int, ...]:
    """The definition, in Python integers."""
    sizes = [axis.fixed + sum(m * n_open[g] for g, m in axis.per_group) for axis in structure.axes]
    totals = []
    for terms in structure.terms:
        total = 0
        for term in terms:
            product = int(term.coefficient)
            for axis in term.axes:
                product *= sizes[axis]
            total += product
        totals.append(total)
    return tuple(totals)


def enumerated(structure: Polynomials, chances: Tensor) -> Tensor:
    """Expectation over all patterns of independent units."""
    sizes = [g.size for g in structure.groups]
    starts = list(itertools.accumulate(sizes, initial=0))
    total = torch.zeros(len(KINDS), dtype=torch.float64)
    for pattern in itertools.product((0, 1), repeat=sum(sizes)):
        weight = 1.0
        for bit, chance in zip(pattern, chances.tolist(), strict=True):
            weight *= chance if bit else 1.0 - chance
        n_open = [sum(pattern[a:b]) for a, b in itertools.pairwise(starts)]
        total += weight * torch.tensor(counted(structure, n_open), dtype=torch.float64)
    return total


@settings(max_examples=60)
@given(structure=polynomials(), seed=st.integers(0, 1000))
def test_expectation_is_that_of_all_patterns(structure: Polynomials, seed: int) -> None:
    costs = CostModel(structure)
    chances = torch.rand(costs.total, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(costs.expected_vector(chances), enumerated(structure, chances), rtol=1e-11, atol=1e-11)


@settings(max_examples=25)
@given(structure=polynomials(), seed=st.integers(0, 1000))
def test_gradient_is_that_of_finite_differences(structure: Polynomials, seed: int) -> None:
    costs = CostModel(structure)
    generator = torch.Generator().manual_seed(seed)
    chances = torch.rand(costs.total, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(costs.expected_vector, (chances,))
    assert torch.autograd.gradcheck(lambda p: costs.expected(p, "macs"), (chances,))


@settings(max_examples=25)
@given(structure=polynomials(), seed=st.integers(0, 1000))
def test_slopes_are_the_gradients(structure: Polynomials, seed: int) -> None:
    costs = CostModel(structure)
    generator = torch.Generator().manual_seed(seed)
    chances = torch.rand(costs.total, dtype=torch.float64, generator=generator).requires_grad_()
    values, slopes = costs.slopes(chances)
    assert not slopes.requires_grad
    for row, kind in enumerate(KINDS):
        value = costs.expected(chances, kind)
        (gradient,) = torch.autograd.grad(value, chances)
        torch.testing.assert_close(slopes[row], gradient)
        torch.testing.assert_close(values[row], value.detach())


@given(structure=polynomials(), seed=st.integers(0, 1000))
def test_a_certain_pattern_costs_what_it_counts(structure: Polynomials, seed: int) -> None:
    costs = CostModel(structure)
    is_open = torch.rand(costs.total, generator=torch.Generator().manual_seed(seed)) < 0.5
    n_open = [int(part.sum()) for part in is_open.split(list(costs.sizes))]
    assert costs.count(n_open) == Cost(*counted(structure, n_open))
    assert costs.n_open(is_open).tolist() == n_open
    expected = costs.expected_vector(is_open.double())
    assert [round(value) for value in expected.tolist()] == list(counted(structure, n_open))
    assert costs.exact(is_open) == Cost(*counted(structure, [max(n, 1) for n in n_open]))


def test_a_square_recurrent_weight_uses_that_bits_are_their_own_squares() -> None:
    structure = Polynomials((group(3),), (Axis(0, ((0, 1),)),), (Term(1.0, (0, 0), "weight_hh"),), ())
    chances = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64)
    # E[n^2] = (E n)^2 + Var n = 2.25 + 0.75, not 2.25
    assert CostModel(structure).expected(chances).item() == pytest.approx(3.0)


def test_a_convolutional_network_counted_by_hand() -> None:
    costs = CostModel(convolutional())
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1),
        torch.nn.BatchNorm2d(4),
        torch.nn.Conv2d(4, 5, 3, padding=1),
        torch.nn.Linear(5, 10),
    )
    assert costs.dense.params == sum(parameter.numel() for parameter in net.parameters())
    assert costs.dense.macs == 64 * 27 * 4 + 64 * 9 * 4 * 5 + 50
    is_open = torch.tensor([True, False, False, True, True, True, True, False, False])
    assert costs.exact(is_open) == Cost(params=2 * 30 + 9 * 2 * 3 + 11 * 3 + 10, macs=64 * 27 * 2 + 64 * 9 * 6 + 30)
    assert costs.least == Cost(params=30 + 9 + 11 + 10, macs=64 * 27 + 64 * 9 + 10)
    assert costs.exact(torch.zeros(9, dtype=torch.bool)) == costs.least
    assert costs.largest_term == {"params": "conv1.weight", "macs": "conv1", "latency": ""}


def test_groups_without_gates_enter_with_chance_one() -> None:
    costs = CostModel(convolutional())
    chances = torch.ones(9, dtype=torch.float64)
    assert costs.expected_vector(chances).tolist() == [costs.dense.params, costs.dense.macs, 0.0]


def test_counts_beyond_the_reach_of_floats_are_exact() -> None:
    odd = float(2**40 + 1)
    structure = Polynomials((group(3),), (Axis(0, ((0, 2**20 + 1),)),), (), (Term(odd, (0,), "big"),))
    assert CostModel(structure).dense.macs == (2**40 + 1) * 3 * (2**20 + 1)


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)],
)
def test_precision_of_the_result(given_dtype: torch.dtype, dtype: torch.dtype) -> None:
    chances = torch.full((9,), 0.5, dtype=given_dtype, requires_grad=True)
    value = CostModel(convolutional()).expected(chances)
    assert value.dtype == dtype
    value.backward()
    assert chances.grad is not None
    assert chances.grad.dtype == given_dtype


def test_sums_do_not_lose_units_in_half_precision() -> None:
    structure = Polynomials((group(5000),), (Axis(0, ((0, 1),)),), (Term(1.0, (0,), "wide"),), ())
    assert CostModel(structure).expected(torch.ones(5000, dtype=torch.bfloat16)).item() == 5000.0


class Operators(TorchDispatchMode):
    """Counts what is executed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_the_number_of_operators_does_not_grow_with_the_network() -> None:
    counts = []
    for layers in (3, 60):
        costs = CostModel(chain([8] * layers))
        chances = torch.full((costs.total,), 0.5)
        costs.at(chances).pull(torch.ones(3))
        with Operators() as operators:
            costs.at(chances).pull(torch.ones(3))
        counts.append(operators.count)
    assert counts[0] == counts[1]
    assert counts[0] < 40


def test_no_groups_at_all() -> None:
    costs = CostModel(Polynomials((), (), (Term(12.0, (), "fc"),), ()))
    assert costs.dense == costs.least == Cost(12, 0)
    assert costs.expected_vector(torch.ones(0)).tolist() == [12.0, 0.0, 0.0]


@pytest.mark.parametrize("wrong", [torch.ones(8), torch.ones(9, 1), torch.ones(())])
def test_vectors_of_another_shape_are_refused(wrong: Tensor) -> None:
    costs = CostModel(convolutional())
    with pytest.raises(BudgetError, match=r"expected \(9,\)"):
        costs.expected(wrong)
    with pytest.raises(BudgetError, match=r"expected \(9,\)"):
        costs.exact(wrong > 0)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(BudgetError, match="expected one of params, macs"):
        CostModel(convolutional()).expected(torch.ones(9), "flops")


def test_terms_that_do_not_fit_together_are_refused_all_at_once() -> None:
    broken = Polynomials(
        (group(2),),
        (Axis(-1, ((0, 1),)), Axis(0, ((3, 1),))),
        (Term(-1.0, (0,), "a"), Term(1.0, (5,), "b")),
        (),
    )
    with pytest.raises(BudgetError) as caught:
        CostModel(broken)
    message = str(caught.value)
    assert "axis 0 has a negative count" in message
    assert "axis 1 names a group outside" in message
    assert "term 'a' has coefficient -1.0" in message
    assert "term 'b' names an axis outside" in message
