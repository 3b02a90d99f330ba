"""The law that every operator rule obeys, as a check: removing units before an operator or after it is the same.

``law`` runs an operator on tensors whose dimensions carry unit ids, solves what its rule said, and then, for random
keep-sets of the units that are still free, runs it again on what is kept: the labels must be the dense ones restricted
to what is kept, and so must the numbers, where units that a weight consumes are zero in that weight.

``check_cut`` does the same from the outside: a whole model, traced, masked and cut.

Patterns: one letter a position of a dimension that carries units, the same letter for positions that go together, a dot
for one that cannot go: ``"abcabc"`` are three units with two positions each, ``"ab..ab"`` two.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_letters
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from secateur.compaction.compact import compact
from secateur.compaction.mask import mask
from secateur.structure.coupling import Coupling, Solution
from secateur.structure.example import Example
from secateur.structure.ids import Factor, Label
from secateur.structure.nested import tensors_in
from secateur.structure.record import Recorder
from secateur.structure.rulings import Rulings
from secateur.structure.structure import Structure
from secateur.structure.tensors import named_tensors
from secateur.structure.trace import trace

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Given:
    """An input of an operator under test.

    Args:
        shape: its shape.
        units: dimensions of which each position is a unit of its own.
        weight: whether it is a parameter; else it is computed from the model's input.
        value: its numbers; normal ones where None.
    """

    shape: tuple[int, ...]
    units: tuple[int, ...] = ()
    weight: bool = False
    value: Tensor | None = None

    def drawn(self, seed: int) -> Tensor:
        if self.value is not None:
            return self.value.clone()
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given(shape: Sequence[int], *units: int, weight: bool = False, value: Tensor | None = None) -> Given:
    """``given((2, 8), 1)`` is an activation of 8 units along dimension 1."""
    return Given(tuple(shape), units, weight, value)


@dataclass(frozen=True)
class Verdict:
    """What a rule said of the units of an operator's inputs."""

    coupling: Coupling
    solution: Solution
    factors: tuple[tuple[Factor, ...], ...]

    def patterns(self) -> tuple[str, ...]:
        """One pattern for every dimension with units, in the order of the inputs."""
        letters: dict[int, str] = {}
        return tuple(
            "".join(self._letter(int(id_), letters) for id_ in factor.ids) for row in self.factors for factor in row
        )

    def _letter(self, id_: int, letters: dict[int, str]) -> str:
        component = int(self.solution.component[id_])
        if self.solution.frozen[component] >= 0:
            return "."
        return letters.setdefault(component, ascii_letters[len(letters)])

    def reasons(self) -> set[str]:
        """Why what cannot go cannot."""
        frozen = {
            int(self.solution.frozen[component])
            for row in self.factors
            for factor in row
            for component in self.solution.component[factor.ids]
        }
        return {self.solution.freezes[number].reason for number in frozen if number >= 0}


def law(operator: Callable[..., Any], *givens: Given, seeds: Iterable[int] = range(4)) -> Verdict:
    """Hold an operator to the law and say what its rule said."""
    coupling = Coupling()
    factors = tuple(tuple(Factor((dim,), coupling.new_ids(one.shape[dim])) for dim in one.units) for one in givens)
    coupling.first_made = coupling.n_ids
    tensors = [one.drawn(number) for number, one in enumerate(givens)]
    _, labels = _recorded(operator, tensors, _labels(givens, factors), coupling)
    verdict = Verdict(coupling, coupling.solve(), factors)
    for seed in seeds:
        stays = _keep(verdict, np.random.default_rng(seed))
        _check_labels_and_numbers(operator, givens, verdict, stays, labels)
    return verdict


def _labels(givens: Sequence[Given], factors: Sequence[tuple[Factor, ...]]) -> list[Label]:
    return [
        Label(
            tuple({**dict(enumerate(one.shape)), **{f.dims[0]: len(f.ids) for f in mine}}.values()),
            mine,
            weight=one.weight,
            data=not one.weight,
        )
        for one, mine in zip(givens, factors, strict=True)
    ]


def _recorded(
    operator: Callable[..., Any], tensors: Sequence[Tensor], labels: Sequence[Label], coupling: Coupling
) -> tuple[list[Tensor], list[Label]]:
    recorder = Recorder(Rulings(coupling))
    for tensor, label in zip(tensors, labels, strict=True):
        recorder.set_label(tensor, label)
    with recorder:
        outputs = tensors_in(operator(*tensors))
    return outputs, [recorder.label(tensor) for tensor in outputs]


def _keep(verdict: Verdict, generator: np.random.Generator) -> np.ndarray:
    """Which ids stay: free units go with an even chance, but some of every dimension stay."""
    component, frozen = verdict.solution.component, verdict.solution.frozen
    stays = (generator.random(len(frozen)) < 0.5) | (frozen >= 0)
    for row in verdict.factors:
        for factor in row:
            mine = component[factor.ids]
            if not stays[mine].any():
                stays[generator.choice(mine)] = True
    return stays[component]


def _check_labels_and_numbers(
    operator: Callable[..., Any], givens: Sequence[Given], verdict: Verdict, stays: np.ndarray, labels: Sequence[Label]
) -> None:
    kept = [tuple(Factor(f.dims, f.ids[stays[f.ids]]) for f in row) for row in verdict.factors]
    small, closed = [], []
    consumed = _consumed(verdict)
    for number, (one, row) in enumerate(zip(givens, verdict.factors, strict=True)):
        narrow, wide = one.drawn(number), one.drawn(number)
        for factor in row:
            narrow = narrow.index_select(factor.dims[0], torch.from_numpy(np.flatnonzero(stays[factor.ids])))
            gone = ~stays[factor.ids] & consumed[factor.ids] & one.weight
            wide = wide.index_fill(factor.dims[0], torch.from_numpy(np.flatnonzero(gone)), 0)
        small.append(narrow)
        closed.append(wide)
    deaf = Coupling(recording=False, crossings=verdict.coupling.crossings)
    found, narrow_labels = _recorded(operator, small, _labels(givens, kept), deaf)
    expected = tensors_in(operator(*closed))
    assert len(found) == len(expected)
    for wide_label, narrow_label, a, b in zip(labels, narrow_labels, expected, found, strict=True):
        restricted = a
        want: dict[tuple[int, ...], np.ndarray] = {}
        for factor in wide_label.factors:
            if verdict.coupling.made(factor.ids):
                continue  # only what the given tensors carry is cut here
            mask_ = stays[factor.ids]
            along = [
                np.flatnonzero(mask_.any(axis=tuple(k for k in range(mask_.ndim) if k != axis)))
                for axis in range(mask_.ndim)
            ]
            assert mask_[np.ix_(*along)].all(), "the units that go are no whole slices"
            want[factor.dims] = factor.ids[np.ix_(*along)]
            for dim, positions in zip(factor.dims, along, strict=True):
                restricted = restricted.index_select(dim, torch.from_numpy(positions))
        assert tuple(b.shape) == tuple(restricted.shape), f"shape {tuple(b.shape)}, expected {tuple(restricted.shape)}"
        assert _plain(narrow_label.factors) == _plain(Factor(dims, ids) for dims, ids in want.items())
        torch.testing.assert_close(b, restricted, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


def _consumed(verdict: Verdict) -> np.ndarray:
    """Ids whose slices of a weight are zero when their unit is closed: those consumed, and those joined to them."""
    consumed = np.zeros(verdict.coupling.n_ids, dtype=bool)
    for ids in verdict.coupling.consumed:
        consumed[ids.ravel()] = True
    for _ in verdict.coupling.joined:
        for a, b in verdict.coupling.joined:
            consumed[a] = consumed[b] = consumed[a] | consumed[b]
    consumed[0] = False
    return consumed


def _plain(factors: Iterable[Factor]) -> dict[tuple[int, ...], list[int]]:
    """Factors as plain values, without dimensions along which nothing changes."""
    plain: dict[tuple[int, ...], list[int]] = {}
    for factor in factors:
        dims, ids = factor.dims, factor.ids
        for axis in reversed(range(len(dims))):
            if bool((ids == ids.take([0], axis=axis)).all()):
                dims, ids = dims[:axis] + dims[axis + 1 :], ids.take(0, axis=axis)
        if dims and ids.any():
            plain[dims] = ids.ravel().tolist()
    return plain


@dataclass(frozen=True)
class Row:
    """One form of an operator, and what must become of its units.

    Args:
        operator: takes a tensor for each given.
        givens: its inputs.
        patterns: one for each dimension with units.
        reason: part of a reason for which some are frozen; none may be where it is "".
        trial: whether sizes are written into the operator, which only a trace of a model sees: all its units freeze.
    """

    operator: Callable[..., Any]
    givens: tuple[Given, ...]
    patterns: tuple[str, ...]
    reason: str = ""
    trial: bool = False


def row(operator: Callable[..., Any], *parts: Given | str, trial: bool = False) -> Row:
    """``row(operator, given, ..., pattern, ..., reason)``: a reason is a string with a space in it."""
    givens = tuple(part for part in parts if isinstance(part, Given))
    words = [part for part in parts if isinstance(part, str)]
    return Row(
        operator,
        givens,
        tuple(word for word in words if " " not in word),
        next((word for word in words if " " in word), ""),
        trial,
    )


def hold(one: Row) -> None:
    """Hold an operator to the law."""
    verdict = law(one.operator, *one.givens)
    assert verdict.patterns() == one.patterns
    reasons = verdict.reasons()
    assert bool(reasons) == bool(one.reason), reasons
    assert any(one.reason in reason for reason in reasons) or not one.reason, reasons


def hold_in_a_model(one: Row) -> None:
    """Put an operator between producers and consumers, trace, and compare masked with cut."""
    model = Around(one)
    structure = check_cut(model, *model.inputs(), seeds=range(2))
    if one.trial:
        assert not structure.groups
        assert any(one.reason in frozen.reason for frozen in structure.frozen), {f.reason for f in structure.frozen}
    elif all(len(given.units) <= 1 or given.weight for given in one.givens):
        assert sum(group.size for group in structure.groups) == _n_units(one.patterns)


def alone(rows: Mapping[str, Row]) -> list[Any]:
    """Parameters of the test that calls `hold`."""
    return [pytest.param(one, id=name) for name, one in rows.items() if not one.trial]


def in_models(rows: Mapping[str, Row]) -> list[Any]:
    """Parameters of the test that calls `hold_in_a_model`."""
    return [pytest.param(one, id=name) for name, one in rows.items()]


def _n_units(patterns: Sequence[str]) -> int:
    """Units that a model can lose: one that is the only one of its kind must stay."""
    owned: dict[str, tuple[int, ...]] = {}
    for letter in sorted(set("".join(patterns)) - {"."}):
        owned[letter] = tuple(pattern.count(letter) for pattern in patterns)
    kinds = list(owned.values())
    return sum(kinds.count(kind) > 1 for kind in kinds)


class Around(nn.Module):
    """A model of one operator: producers for the activations that carry units, consumers for what comes out."""

    def __init__(self, one: Row) -> None:
        super().__init__()
        self.one = one
        coupling = Coupling()
        factors = tuple(tuple(Factor((d,), coupling.new_ids(g.shape[d])) for d in g.units) for g in one.givens)
        coupling.first_made = coupling.n_ids
        _, labels = _recorded(
            one.operator, [g.drawn(k) for k, g in enumerate(one.givens)], _labels(one.givens, factors), coupling
        )
        self.dims = [
            [factor.dims for factor in label.factors if not coupling.made(factor.ids)] for label in labels
        ]  # what the operator made itself is no unit of anything, and has no consumer
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

        self.makers = nn.ParameterList(
            parameter(*g.shape) if g.weight else parameter(3, *(g.shape[d] for d in g.units)) for g in one.givens
        )
        self.readers = nn.ParameterList(
            parameter(math.prod(label.shape[d] for d in dims), 2)
            for label, each in zip(labels, self.dims, strict=True)
            for dims in each
        )

    def inputs(self) -> list[Tensor]:
        """One input for each given that is no weight: what its producer reads, or what it is itself."""
        return [
            g.drawn(k)
            if not g.units
            else torch.randn(
                [3 if d == g.units[0] else s for d, s in enumerate(g.shape) if d not in g.units[1:]]
            ).double()
            for k, g in enumerate(self.one.givens)
            if not g.weight
        ]

    def forward(self, *xs: Tensor) -> list[Tensor]:
        rest = list(xs)
        tensors = []
        for g, maker in zip(self.one.givens, self.makers, strict=True):
            if g.weight:
                tensors.append(maker)
            elif not g.units:
                tensors.append(rest.pop(0))
            else:
                made = torch.tensordot(rest.pop(0), maker.flatten(1), dims=([g.units[0]], [0]))
                made = made.unflatten(-1, maker.shape[1:])
                tensors.append(made.movedim(tuple(range(-len(g.units), 0)), g.units))
        readers = iter(self.readers)
        outputs = []
        for made, each in zip(tensors_in(self.one.operator(*tensors)), self.dims, strict=True):
            out = (torch.view_as_real(made) if made.is_complex() else made).to(torch.float64)
            left = list(range(out.dim()))
            for dims in each:
                places = [left.index(d) for d in dims]
                moved = out.movedim(places, tuple(range(-len(dims), 0)))
                out = moved.flatten(-len(dims)) @ next(readers)
                left = [*(d for d in left if d not in dims), -1]
            outputs.append(out)
        return outputs


class Net(nn.Module):
    """``b(between(a(x)))``: a producer, the operators under test, a consumer.

    Args:
        a: makes the units.
        between: takes this module and what ``a`` made.
        b: reads the units.
        parts: further parameters, modules and values, as attributes.
    """

    def __init__(self, a: nn.Module, between: Callable[..., Any], b: nn.Module, **parts: Any) -> None:
        super().__init__()
        self.a, self.b = a, b
        self.between = between
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor, *more: Any) -> Any:
        return self.b(self.between(self, self.a(x), *more))


def linear_net(between: Callable[..., Any], width: int = 8, reads: int | None = None, **parts: Any) -> Net:
    """A :class:`Net` of linear layers, for inputs of 4 features."""
    return Net(nn.Linear(4, width), between, nn.Linear(width if reads is None else reads, 3), **parts)


def conv_net(between: Callable[..., Any], width: int = 8, reads: int | None = None, n: int = 2, **parts: Any) -> Net:
    """A :class:`Net` of pointwise convolutions over ``n`` dimensions, for inputs of 3 channels."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    return Net(conv(3, width, 1), between, conv(width if reads is None else reads, 3, 1), **parts)


def redraw_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all floating tensors of a model anew, in float64: no layer is zero, no variance negative."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                drawn = drawn / math.sqrt(max(1, tensor[0].numel() if tensor.dim() > 1 else 1))
                tensor.copy_(drawn.abs() + 0.5 if "var" in name else drawn)
    return model


def keep_some(structure: Structure, seed: int) -> dict[str, Tensor]:
    """Random kept units of every group; seed 0 keeps a single one of each."""
    generator = torch.Generator().manual_seed(seed)
    keep: dict[str, Tensor] = {}
    for group in structure.groups:
        count = 1 if seed == 0 else int(torch.randint(1, group.size + 1, (), generator=generator))
        keep[group.name] = torch.randperm(group.size, generator=generator)[:count].sort().values
    return keep


def raised(value: Any) -> Any:
    """Floating tensors in float64, everything else as it is."""
    if isinstance(value, Tensor):
        return value.to(torch.complex128 if value.is_complex() else torch.float64) if not _exact(value) else value
    if isinstance(value, Mapping):
        return {key: raised(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(raised(item) for item in value)
    return value


def _exact(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex())


def check_cut(
    model: nn.Module,
    *inputs: Any,
    structure: Structure | None = None,
    seeds: Iterable[int] = range(3),
    modes: Iterable[bool] = (False, True),
    **kwargs: Any,
) -> Structure:
    """Trace a model; masked and cut must agree for several keep-sets, in both modes, and the cost must be exact."""
    if structure is None:
        structure = trace(model, Example(inputs, kwargs))
    model = redraw_(copy.deepcopy(model))
    inputs, kwargs = raised(inputs), raised(kwargs)
    for seed in seeds if structure.groups else ():
        keep = keep_some(structure, seed)
        masked, small = mask(model, structure, keep), compact(model, structure, keep)
        assert sum(p.numel() for p in small.parameters()) == structure.cost(keep).params
        for training in modes:
            outputs = []
            for one in (masked, small):
                torch.manual_seed(seed)
                with torch.no_grad():
                    outputs.append(tensors_in(copy.deepcopy(one).train(training)(*inputs, **kwargs)))
            for a, b in zip(*outputs, strict=True):
                torch.testing.assert_close(b, a, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
    return structure


def sizes(structure: Structure) -> list[int]:
    """Sizes of all groups, ascending."""
    return sorted(group.size for group in structure.groups)
