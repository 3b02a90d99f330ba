"""What rules said, each thing once.

A rule looks at the operator, at its arguments other than tensors, at the labels of its tensors and at the shapes of
its results, and at nothing else. So where all of these are the same again, as they mostly are in the second mode of a
model, it would say the same: to the coupling nothing new, and of its results the same labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from secateur.structure.coupling import Coupling, Product
from secateur.structure.ids import Label
from secateur.structure.operators import Operator
from secateur.structure.rules import Call, Uncovered

__all__ = ["Ruling", "Rulings"]

#: Rules that look at more than the above: at strides, at the types of indices, and at numbers that the code writes out.
_LOOK_CLOSER = frozenset(
    {
        *("as_strided", "lift_fresh", "lift_fresh_copy"),
        *("index", "_unsafe_index", "index_put", "_index_put_impl", "_unsafe_index_put"),
    }
)


@dataclass(frozen=True, eq=False)
class Ruling:
    """What was said of one executed operator.

    Args:
        labels: of the tensors that it returned.
        scalars: its arguments that are neither tensors nor sizes, and the sizes that flow into its numbers.
        products: that it added to the costs; None where these were not counted.
    """

    labels: tuple[Label, ...]
    scalars: tuple[Any, ...]
    products: tuple[Product, ...] | None


class Rulings:
    """The rules at work on one labelling of a model.

    Args:
        coupling: where they write.
    """

    def __init__(self, coupling: Coupling) -> None:
        self.coupling = coupling
        self._made: dict[Any, Ruling] = {}
        self._labels: dict[Any, Label] = {}

    def one(self, label: Label) -> Label:
        """The one label object that says this; the ids of its factors are told apart by identity."""
        factors = tuple([(factor.dims, id(factor.ids)) for factor in label.factors])
        key = (label.shape, factors, label.uniform, label.weight, label.data, label.vanishes, label.zero)
        known = self._labels.get(key)
        if known is None:
            self._labels[key] = known = label
            for factor in label.factors:
                if factor.ids.ndim > 1:
                    self.coupling.rectangle(factor.ids)
        return known

    def on(self, operator: Operator, call: Call, inputs: tuple[Label, ...]) -> Ruling:
        """Apply the operator's rule, or say again what it said."""
        coupling = self.coupling
        key = _key(operator, call, inputs)
        known = self._made.get(key) if key is not None else None
        if known is not None and not (coupling.count_products and known.products is None):
            if coupling.count_products and known.products:
                coupling.products.extend(replace(product, label=coupling.module) for product in known.products)
            return known
        before = (coupling.n_ids, len(coupling.normalised))
        counted = len(coupling.products)
        data = any(label.data for label in inputs)
        labels = [label if label.data == data else replace(label, data=data) for label in self._apply(operator, call)]
        scalars = (*operator.scalars(call.values), *(("size", number) for number in call.numbers))
        products = tuple(coupling.products[counted:]) if coupling.count_products else None
        ruling = Ruling(tuple(map(self.one, labels)), scalars, products)
        # Ids made for one tensor are no other's, and an RMSNorm is known by the module at work.
        if key is not None and before == (coupling.n_ids, len(coupling.normalised)):
            self._made[key] = ruling
        return ruling

    def _apply(self, operator: Operator, call: Call) -> Sequence[Label]:
        entry, outputs = operator.entry, call.outputs
        if entry is None:
            for label in call.all_labels():  # for all that is known, it counts them, as bincount does
                call.counts_equal(label)
            self.freeze(call.all_labels(), f"meets the operator {operator.name}, which has no rule")
            return [Label(tuple(t.shape)) for t in outputs]
        try:
            ruled = entry.apply(self.coupling, call)
        except Uncovered:
            ruled = []
        made = [ruled] if isinstance(ruled, Label) else ruled
        if len(made) != len(outputs) or any(m.shape != tuple(t.shape) for m, t in zip(made, outputs, strict=True)):
            self.freeze(call.all_labels(), f"meets a form of the operator {operator.name} that its rule does not cover")
            return [Label(tuple(t.shape)) for t in outputs]
        return made

    def freeze(self, labels: Sequence[Label], reason: str) -> None:
        """Freeze all units of some labels."""
        for label in labels:
            for factor in label.factors:
                self.coupling.freeze(factor.ids, reason)


def _key(operator: Operator, call: Call, inputs: tuple[Label, ...]) -> Any:
    """All that a rule looks at; None where it looks at more, or there is no tensor that it could know again."""
    if not inputs or call.name in _LOOK_CLOSER:
        return None
    key = (
        operator,
        inputs,
        tuple([_plain(value) for value in call.values.values()]),
        tuple([tensor.shape for tensor in call.outputs]),
    )
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.Tensor
    if isinstance(value, (list, tuple)):
        return tuple([_plain(item) for item in value])
    return type(value), value
