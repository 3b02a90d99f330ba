"""Whether a model's own code does the same in training as in evaluation mode.

Then one trial cut speaks for both. What torch's own layers do otherwise in training, BatchNorm and dropout, does not
depend on sizes, and dropout in functional form is known by its random mask; all other operators must be the same, in
the same modules, with the same numbers, on the same labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

from torch import nn

from secateur.structure.record import Entry
from secateur.structure.trial import Recorded

__all__ = ["worth_trying"]

#: A mask is made, drawn, scaled and put on.
_DROPOUT = [
    [made, "bernoulli", "div", "mul"] for made in ("empty", "empty_like", "new_empty", "empty_strided", "zeros_like")
]


def worth_trying(model: nn.Module, recorded: Sequence[Recorded]) -> list[Recorded]:
    """The runs without those in training mode that execute the same code as the run on the same example before."""
    own = {path for path, module in model.named_modules() if type(module).__module__.startswith("torch.nn.modules.")}
    left: list[Recorded] = []
    for one in recorded:
        if not (one.setting.training and left and _same(left[-1], one, own)):
            left.append(one)
    return left


def _same(first: Recorded, second: Recorded, own: set[str]) -> bool:
    alike = first.setting.example is second.setting.example and first.setting.fake == second.setting.fake
    pairs = zip_longest(_of_the_model(first.run.entries, own), _of_the_model(second.run.entries, own))
    return alike and all(a is not None and b is not None and _said(a) == _said(b) for a, b in pairs)


def _said(entry: Entry) -> tuple[object, ...]:
    return entry.operator, entry.module, entry.scalars, entry.labels, entry.inputs


def _of_the_model(entries: Sequence[Entry], own: set[str]) -> Iterator[Entry]:
    """The operators of a model's own code, without dropout."""
    at = 0
    while at < len(entries):
        entry = entries[at]
        if entry.module in own or entry.operator == "native_dropout":
            at += 1
        elif [later.operator for later in entries[at : at + 4]] in _DROPOUT:
            at += 4
        else:
            at += 1
            yield entry
