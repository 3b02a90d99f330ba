"""The table of operator rules, and the call that a rule looks at.

A rule takes the coupling and one executed operator and gives the labels of its outputs. The law it
obeys: it commutes with removal. For every keep-set that the final groups admit, the operator with its
literal arguments on ``ids[keep]`` equals the result on ``ids``, restricted to keep.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Factor, Label

__all__ = [
    "Call",
    "Rule",
    "RuleEntry",
    "Uncovered",
    "entry_for",
    "freeze_all",
    "known_operators",
    "operator_name",
    "rule",
    "set_factors",
]

Rule = Callable[[Coupling, "Call"], "Label | Sequence[Label]"]


class Uncovered(Exception):  # noqa: N818 - no error: the recorder answers it by freezing
    """A rule does not cover this form of its operator: all units that meet it are frozen."""


@dataclass(frozen=True)
class RuleEntry:
    """A rule and what the trial must know of its operator.

    Args:
        apply: the rule.
        sizes: whether the operator's integer arguments are sizes or positions, which may differ
            between the dense model and a cut one; its effect then shows in the labels.
    """

    apply: Rule
    sizes: bool


class Call:
    """One executed ATen operator, its arguments by schema name.

    Args:
        func: the operator overload.
        name: the operator's, as `operator_name` gives it.
        values: every argument by its schema name, defaults filled in.
        outputs: the tensors that it returned.
        label_of: gives the label of any tensor.
    """

    def __init__(
        self,
        func: Any,
        name: str,
        values: dict[str, Any],
        outputs: list[torch.Tensor],
        label_of: Callable[[torch.Tensor], Label],
    ) -> None:
        self.func = func
        self.name = name
        self.values = values
        self.outputs = outputs
        self.numbers: list[int] = []
        self._label_of = label_of

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the only, or the first, output."""
        return tuple(self.outputs[0].shape)

    def __getitem__(self, argument: str) -> Any:
        if argument not in self.values:
            raise Uncovered(argument)
        return self.values[argument]

    def get(self, argument: str, default: Any = None) -> Any:
        """An argument's value, or ``default`` where the overload has no such argument."""
        return self.values.get(argument, default)

    def counts(self, size: int) -> None:
        """Say that a size flows into the operator's numbers: the trial compares it."""
        self.numbers.append(int(size))

    def counts_equal(self, label: Label, dims: Collection[int] | None = None) -> None:
        """Say that the operator adds up what is equal along these dimensions (all of them where none are given)."""
        for dim in sorted(label.uniform if dims is None else label.uniform.intersection(dims)):
            self.counts(label.shape[dim])

    def has(self, argument: str) -> bool:
        """Whether that argument is a tensor in this call."""
        return isinstance(self.values.get(argument), torch.Tensor)

    def label(self, argument: str) -> Label:
        """The label of a tensor argument."""
        tensor = self[argument]
        if not isinstance(tensor, torch.Tensor):
            raise Uncovered(argument)
        return self._label_of(tensor)

    def labels(self, argument: str) -> list[Label]:
        """The labels of an argument that is a list of tensors."""
        return [self._label_of(tensor) for tensor in self[argument]]

    def labels_of(self, tensors: Iterable[torch.Tensor]) -> list[Label]:
        """The labels of given tensors."""
        return [self._label_of(tensor) for tensor in tensors]

    def tensors(self) -> Iterable[torch.Tensor]:
        """All tensor arguments, lists included."""
        for value in self.values.values():
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, (list, tuple)):
                yield from (item for item in value if isinstance(item, torch.Tensor))

    def all_labels(self) -> list[Label]:
        """Labels of all tensor arguments."""
        return [self._label_of(tensor) for tensor in self.tensors()]

    def dim(self, argument: str = "dim", of: str = "self") -> int:
        """A dimension argument, counted from the front."""
        n = max(len(self.label(of).shape), 1)
        return int(self[argument]) % n

    def dims(self, argument: str = "dim", of: str = "self") -> tuple[int, ...]:
        """A list of dimensions, counted from the front; all of them where none or an empty list is given."""
        n = len(self.label(of).shape)
        listed = self.values.get(argument)
        if listed is None or (isinstance(listed, (list, tuple)) and not listed):
            return tuple(range(n))
        listed = listed if isinstance(listed, (list, tuple)) else [listed]
        return tuple(sorted(int(dim) % max(n, 1) for dim in listed))


_RULES: dict[str, RuleEntry] = {}


def rule(*names: str, sizes: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for operators by name (namespace ``aten`` unless written out)."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in _RULES:
                raise ValueError(f"operator {name} has a rule already")
            _RULES[name] = RuleEntry(function, sizes)
        return function

    return register


@functools.cache
def operator_name(func: Any) -> str:
    """``aten::relu_`` and ``aten::relu`` as "relu"; other namespaces keep theirs."""
    namespace, name = func._schema.name.split("::")
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return name if namespace == "aten" else f"{namespace}::{name}"


def entry_for(func: Any) -> RuleEntry | None:
    """The rule of an operator overload, or None where there is none."""
    return _RULES.get(operator_name(func))


def known_operators() -> tuple[str, ...]:
    """Names of all operators with a rule of their own."""
    return tuple(sorted(_RULES))


def set_factors(
    label: Label, shape: Iterable[int], factors: Iterable[Factor | None], uniform: Iterable[int] = ()
) -> Label:
    """A label of another shape; absent factors are left out."""
    return label.with_factors(tuple(shape), [factor for factor in factors if factor is not None], uniform)


def freeze_all(c: Coupling, labels: Iterable[Label], reason: str) -> None:
    """Freeze every unit of some tensors."""
    for label in labels:
        for factor in label.factors:
            c.freeze(factor.ids, reason)
