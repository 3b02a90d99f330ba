"""Places where code keeps values: how each kind is read and set back, past whatever a subclass makes of it.

A place is a dictionary (the variables of a module and the attributes of an object among them), a list, a set, a deque,
a cell of a closure, a class, or an object with slots.
"""

from __future__ import annotations

import functools
import gc
import operator
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["PLAIN", "contents", "differs", "parts", "places_of", "put_back", "undo"]

_GONE = object()
#: Kinds of values that hold nothing that changes.
PLAIN = frozenset({int, float, complex, bool, str, bytes, type(None), types.CodeType, types.BuiltinFunctionType})
_CONTAINERS = (dict, list, set, deque)
_CLASS_ITEMS = type.__dict__["__dict__"]
_MRO = type.__dict__["__mro__"]
_DESCRIPTORS = (types.GetSetDescriptorType, types.MemberDescriptorType)


def places_of(value: Any) -> Iterator[Any]:
    """The places that a value is: itself, and the attributes that it keeps in a dictionary or in slots."""
    kind = type(value)
    if kind in PLAIN:
        return
    if issubclass(kind, _CONTAINERS) or kind is types.CellType or issubclass(kind, type):
        yield value
    if issubclass(kind, type):
        return
    if issubclass(kind, threading.local):
        yield threading.local.__getattribute__(value, "__dict__")
        return
    getter, slots = _attributes_of(kind)  # type: ignore[arg-type]
    if getter is not None and type(found := getter.__get__(value)) is dict:
        yield found
    if slots:
        yield _Slots(value, slots)


@functools.lru_cache(maxsize=4096)
def _attributes_of(kind: type) -> tuple[Any, tuple[Any, ...]]:
    """What reads the dictionary of a class's objects, or None; and what reads their slots."""
    getter, slots = None, []
    for one in _MRO.__get__(kind):
        items: Any = _CLASS_ITEMS.__get__(one)
        if getter is None and isinstance(items.get("__dict__"), _DESCRIPTORS):
            getter = items["__dict__"]
        if "__slots__" in items:
            slots += [item for item in items.values() if type(item) is types.MemberDescriptorType]
    return getter, tuple(slots)


class _Slots:
    """The slots of an object."""

    def __init__(self, owner: Any, slots: tuple[Any, ...]) -> None:
        self.owner, self.slots = owner, slots


def contents(place: Any) -> Any:
    """A shallow copy: a list of a list, a deque or a set, else a dictionary."""
    kind = type(place)
    if kind is dict:
        return place.copy()  # at once, whatever other threads do to it
    if issubclass(kind, dict):
        return dict(dict.items(place))
    for listed in (list, set, deque):
        if issubclass(kind, listed):
            return list(listed.__iter__(place))
    if kind is types.CellType:
        try:
            return {"cell_contents": place.cell_contents}
        except ValueError:  # not yet assigned
            return {}
    if kind is _Slots:
        return {slot: found for slot in place.slots if (found := _slot(slot, place.owner)) is not _GONE}
    return dict(_CLASS_ITEMS.__get__(place))


def _slot(slot: Any, owner: Any) -> Any:
    try:
        return slot.__get__(owner)
    except AttributeError:
        return _GONE


def differs(now: Any, before: Any) -> bool:
    """Whether two copies of a place hold other objects."""
    if len(now) != len(before):
        return True
    if isinstance(now, list):
        return not all(map(operator.is_, now, before))
    same = all(map(operator.is_, now.keys(), before.keys())) and all(map(operator.is_, now.values(), before.values()))
    return not same


def put_back(place: Any, before: Any) -> None:
    """Make a place what it was. What was imported meanwhile stays, for Python imports it only once."""
    kind = type(place)
    if isinstance(before, list):
        if issubclass(kind, list):
            list.__setitem__(place, slice(None), before)
        elif issubclass(kind, deque):
            deque.clear(place)
            deque.extend(place, before)
        else:
            set.clear(place)
            set.update(place, before)
        return
    now = contents(place)
    changed = [key for key in {**before, **now} if before.get(key, _GONE) is not now.get(key, _GONE)]
    for key in changed:
        if not issubclass(type(now.get(key)), types.ModuleType):
            undo(place, key, before.get(key, _GONE))


def undo(place: Any, key: Any, value: Any = _GONE) -> None:
    """Set one item of a place that is no list; without a value, take it away."""
    kind, gone = type(place), value is _GONE
    if kind is _Slots:
        key.__delete__(place.owner) if gone else key.__set__(place.owner, value)
    elif kind is types.CellType:
        if gone:
            del place.cell_contents
        else:
            place.cell_contents = value
    elif issubclass(kind, type):
        type.__delattr__(place, key) if gone else type.__setattr__(place, key, value)
    else:
        # An ordered dictionary keeps its order beside its items.
        raw: Any = OrderedDict if issubclass(kind, OrderedDict) else dict
        raw.__delitem__(place, key) if gone else raw.__setitem__(place, key, value)


def parts(value: Any) -> Iterable[Any]:
    """What a value holds, keys among it."""
    kind = type(value)
    if kind in PLAIN:
        return ()
    if kind is types.FunctionType:  # without its globals, which are no part of it
        return [*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__, value.__dict__]
    found: list[Any] = []
    for place in places_of(value):
        held = contents(place)
        found += held if isinstance(held, list) else [*held.keys(), *held.values()]
    if not issubclass(kind, (type, types.ModuleType, *_CONTAINERS)):
        found += gc.get_referents(value)
    return found
