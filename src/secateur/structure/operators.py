"""What a recorder must know of an operator, read from its schema once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from secateur.structure.rules import RuleEntry, entry_for, operator_name, pointwise_rule

__all__ = ["Operator", "operator_of", "tensors_among"]

#: Arguments that say where and how a result is stored, never what it is.
_STORAGE = frozenset({"device", "layout", "pin_memory", "memory_format", "generator", "non_blocking", "implicit"})
#: Integer arguments that are no sizes, also where an operator's other integers are.
_NEVER_SIZES = frozenset({"dim", "dims", "fill_value", "value", "dim0", "dim1", "padding_idx", "dimension"})
#: The eps of a known RMSNorm follows its width.
_FOLLOWS = frozenset({("secateur::rms_norm", "eps")})
#: Operators that take tensors of one type only, where fake tensors do not look at it.
_ONE_TYPE = frozenset({"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "convolution", "_convolution"})


@dataclass(frozen=True, eq=False)
class Operator:
    """An operator overload.

    Args:
        func: itself.
        name: as `operator_name` gives it.
        namespace: of its library.
        entry: its rule; None where it has none.
        arguments: names, in the order of the schema, each with whether a value of it is compared.
        names: these alone.
        defaults: of arguments that have one.
        written: arguments that it writes to, though not by moving their dimensions in place.
        mutable: whether it writes to any argument.
    """

    func: Any
    name: str
    namespace: str
    entry: RuleEntry | None
    arguments: tuple[tuple[str, bool], ...]
    names: tuple[str, ...]
    defaults: Mapping[str, Any]
    written: tuple[str, ...]
    mutable: bool

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by schema name, defaults filled in."""
        values = dict(zip(self.names, args, strict=False))
        for name in self.names[len(args) :]:
            if name in kwargs:
                values[name] = kwargs[name]
            elif name in self.defaults:
                values[name] = self.defaults[name]
        return values

    def scalars(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """What must be the same in the dense model and a cut one: all arguments but tensors, storage and sizes."""
        kept: list[Any] = []
        sizes = self.entry is not None and self.entry.sizes
        for name, compared in self.arguments:
            given = values.get(name)
            if given is None or not compared or isinstance(given, torch.Tensor):
                continue
            if isinstance(given, (list, tuple)):
                if any(isinstance(item, torch.Tensor) for item in given):
                    continue
                given = tuple(given)
            if sizes and name not in _NEVER_SIZES and _integral(given):
                continue
            kept.append((name, str(given) if isinstance(given, torch.dtype) else given))
        return tuple(kept)

    def check_types(self, values: Mapping[str, Any], tensors: Sequence[torch.Tensor]) -> None:
        """Raise what real tensors of these types would raise."""
        if self.name in _ONE_TYPE:
            types = {tensor.dtype for tensor in tensors}
            if len(types) > 1:
                listed = " and ".join(sorted(str(one).removeprefix("torch.") for one in types))
                raise TypeError(f"{self.name} takes tensors of one dtype, got {listed}")
        elif self.name == "embedding" and values["indices"].dtype not in (torch.int64, torch.int32):
            raise TypeError(f"embedding takes indices of dtype int64 or int32, got {values['indices'].dtype}")


#: By identity, for an overload's own hash is Python and asked for several times a call; `Operator` keeps it alive.
_KNOWN: dict[int, Operator] = {}


def operator_of(func: Any) -> Operator:
    """What is known of an operator overload."""
    known = _KNOWN.get(id(func))
    if known is None:
        known = _KNOWN[id(func)] = _read(func)
    return known


def _read(func: Any) -> Operator:
    schema = func._schema
    name = operator_name(func)
    entry = entry_for(func)
    if entry is None and torch.Tag.pointwise in func.tags:
        entry = RuleEntry(pointwise_rule, sizes=False)
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return Operator(
        func=func,
        name=name,
        namespace=func.namespace,
        entry=entry,
        arguments=tuple((a.name, a.name not in _STORAGE and (name, a.name) not in _FOLLOWS) for a in schema.arguments),
        names=tuple(a.name for a in schema.arguments),
        defaults={a.name: a.default_value for a in schema.arguments if a.has_default_value()},
        written=() if torch.Tag.inplace_view in func.tags else tuple(written),
        mutable=schema.is_mutable,
    )


def tensors_among(values: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors among some arguments or results, and in lists among these."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, torch.Tensor)]
    return found


def _integral(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_integral(item) for item in value)
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
