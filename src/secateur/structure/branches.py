"""Residual branches: modules whose output is added to the stream that they read.

A module is a branch if, in a run of the model,

- it is called once, with a tensor first, and returns one tensor as large,
- it multiplies by weights,
- what it returns is an operand of an addition,
- the other operand is what it took, or what that was made of by modules without products of matrices (a norm, a
  dropout, an activation), or a sum that this is part of.

Sums that a module makes within itself are found where a module inside it is the branch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Branches"]

#: Operators that add two tensors.
SUMS = frozenset({"add"})
#: Operators that multiply with weights, or activations with one another.
PRODUCTS = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear", "convolution", "embedding", "einsum", "matmul"}
)


class _Call(NamedTuple):
    module: str
    taken: int
    returned: int
    alike: bool
    products: int


class Branches:
    """Notes calls and additions of one run, and says which modules are branches."""

    def __init__(self) -> None:
        self._numbers: MutableMapping[torch.Tensor, int] = WeakIdKeyDictionary()  # type: ignore[no-untyped-call, unused-ignore]
        self._made = 0
        self._products = 0
        self._open: list[tuple[str, int, torch.Size, int]] = []
        self._calls: list[_Call] = []
        self._sums: list[tuple[int, int]] = []
        self._summands: dict[int, tuple[int, int]] = {}

    def ran(self, operator: str, inputs: list[torch.Tensor], output: Any) -> None:
        """An operator made its output of these tensors."""
        if operator in SUMS and len(inputs) == 2 and inputs[0].shape == inputs[1].shape:
            operands = self._number(inputs[0]), self._number(inputs[1])
            self._sums.append(operands)
            self._summands.setdefault(self._number(output), operands)
        elif operator in PRODUCTS:
            self._products += 1

    def entered(self, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is called."""
        first = next((item for item in (*args, *kwargs.values()) if isinstance(item, torch.Tensor)), None)
        number, shape = (0, torch.Size()) if first is None else (self._number(first), first.shape)
        self._open.append((module, number, shape, self._products))

    def left(self, module: str, output: Any) -> None:
        """A module returned."""
        while self._open:
            name, taken, shape, before = self._open.pop()
            if name == module:
                if taken and isinstance(output, torch.Tensor):
                    done = self._products - before
                    self._calls.append(_Call(name, taken, self._number(output), output.shape == shape, done))
                return

    def found(self) -> Iterator[str]:
        """Paths of the branches, in the order in which they were called; the outermost where one is another's whole."""
        often = Counter(call.module for call in self._calls)
        # A dropout in evaluation, or an identity, returns what it took.
        way_back = {
            call.returned: call.taken for call in self._calls if not call.products and call.returned != call.taken
        }
        made_by: dict[int, list[_Call]] = {}
        # Calls end from the inside out, so that the last is the outermost.
        for call in reversed(self._calls):
            if call.products and call.alike and often[call.module] == 1:
                made_by.setdefault(call.returned, []).append(call)
        seen: set[int] = set()
        for branch, stream in [pair for a, b in self._sums for pair in ((b, a), (a, b))]:
            for call in made_by.get(branch, ()):
                if branch not in seen and self._holds(stream, _origins(call.taken, way_back)):
                    seen.add(branch)
                    yield call.module

    def _holds(self, stream: int, origins: set[int]) -> bool:
        """Whether a tensor is one of some, or a sum that one of these is part of."""
        seen: set[int] = set()
        left = [stream]
        while left:
            one = left.pop()
            if one in origins:
                return True
            if one not in seen:
                seen.add(one)
                left += self._summands.get(one, ())
        return False

    def _number(self, tensor: torch.Tensor) -> int:
        known = self._numbers.get(tensor)
        if known is None:
            self._made += 1
            known = self._numbers[tensor] = self._made
        return known


def _origins(taken: int, way_back: Mapping[int, int]) -> set[int]:
    """A tensor, and what it was made of by modules without products."""
    origins: set[int] = set()
    while taken not in origins:
        origins.add(taken)
        taken = way_back.get(taken, taken)
    return origins
