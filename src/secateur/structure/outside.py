"""What a run leaves outside of its copy of the model, taken back: tables in caches, in globals and in classes.

Code keeps tables that many layers share (positions, masks) where no copy of the model reaches them. A run on fake
tensors would leave tables without numbers there, for the model itself to find; and a second run, which finds what the
first one left, does something else than the first.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

__all__ = ["Outside"]

#: How deep containers within containers are followed, how large ones are looked into, and how large ones are copied.
_DEPTH, _SEARCHED, _COPIED = 3, 1_000, 100_000
#: Packages that keep no tables of a model.
_NEVER = sys.stdlib_module_names | {"torch", "numpy", "secateur"}
#: Modules of Python whose objects hold what others put there: weak dictionaries, namespaces, a thread's own.
_HOLDERS = frozenset({"weakref", "types", "_thread"})
_CACHE = type(functools.lru_cache(maxsize=1)(len))
#: What hands calls on to others, and to which.
_WRAPPED: dict[type, Callable[[Any], Iterable[Any]]] = {
    staticmethod: lambda one: (one.__func__,),
    classmethod: lambda one: (one.__func__,),
    MethodType: lambda one: (one.__func__, one.__self__),
    functools.partial: lambda one: (one.func, *one.args, *one.keywords.values()),
}
_GONE = object()


class Outside:
    """The namespaces and containers that the code of a model writes to without the model, as they are now.

    These are the globals of all modules of the packages that its classes are from, of what those import, and of its
    hooks; their classes and objects, what their functions close over, and dictionaries and lists in any of them; and
    the caches of ``functools``, wherever they are.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module) -> None:
        kinds = {kind for module in model.modules() for kind in type(module).__mro__}
        packages = {_top(kind.__module__) for kind in kinds} - _NEVER
        self._before: dict[int, tuple[Any, Any]] = {}
        self._caches: list[Any] = []
        self._misses: dict[Any, int] = {}
        self._n_modules = 0
        level: list[Any] = [module for name, module in list(sys.modules.items()) if _top(name) in packages]
        level += kinds  # those defined within functions are in no module
        level += _functions(model)
        for _ in range(_DEPTH + 1):
            level = [one for value in level for one in self._remember(value)]

    def take_back(self, left: Iterable[torch.Tensor]) -> None:
        """Undo what put these tensors where they outlive a run.

        Args:
            left: tensors that a run has made.
        """
        mine = {id(tensor) for tensor in left}

        def is_mine(value: Any) -> bool:
            return id(value) in mine

        for space, before in self._before.values():
            _restore(space, before, is_mine)
        for cache in self._filled():
            if any(_holds(one, is_mine) for one in gc.get_referents(cache)):
                cache.cache_clear()
                self._misses[cache] = 0

    def _remember(self, value: Any) -> Iterator[Any]:
        """Copy the places of a value; what is in them, where that can be places again."""
        for space in _spaces(value):
            if id(space) in self._before or (issubclass(type(space), dict | list) and len(space) > _COPIED):
                continue
            before = _contents(space)
            self._before[id(space)] = space, before
            if len(before) <= _SEARCHED:
                yield from before.values() if isinstance(before, dict) else before

    def _filled(self) -> list[Any]:
        """Caches of functools that may have taken something in since this was asked last."""
        if self._n_modules != len(sys.modules):
            # To search all objects is slow; forwards seldom define caches, but they import modules that do.
            self._n_modules = len(sys.modules)
            found = [one for one in gc.get_objects() if type(one) is _CACHE]
            self._caches = [one for one in found if _top(getattr(one, "__module__", "")) not in _NEVER]
        filled = []
        for cache in self._caches:
            info = cache.cache_info()
            if info.currsize and self._misses.get(cache) != info.misses:
                filled.append(cache)
            self._misses[cache] = info.misses
        return filled


def _functions(model: nn.Module) -> Iterator[Any]:
    """What modules call besides each other: hooks, and functions that are attributes."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks") and value:
                yield from value.values()
            elif type(value) in (FunctionType, MethodType, functools.partial):
                yield value


def _top(name: Any) -> str:
    """The package of a module's name; Python's own where there is none."""
    return name.partition(".")[0] if isinstance(name, str) else "builtins"


def _spaces(value: Any) -> Iterator[Any]:
    """The places of a value where others can be kept: itself, its attributes, its variables."""
    kind = type(value)
    if issubclass(kind, dict | list):
        yield value
    elif kind is FunctionType:
        yield from _places_of(value)
    elif kind in _WRAPPED:
        for one in _WRAPPED[kind](value):
            yield from _spaces(one)
    elif issubclass(kind, ModuleType):
        if _top(vars(value).get("__name__")) not in _NEVER:
            yield vars(value)
    elif issubclass(kind, type):
        if _ours(value):
            yield value
    elif _ours(kind) or kind.__module__ in _HOLDERS:
        yield from _attributes(value)


def _places_of(function: FunctionType) -> Iterator[Any]:
    """Its globals, the variables that it closes over, containers among its defaults, and its attributes."""
    if _ours(function):
        yield function.__globals__
    yield from function.__closure__ or ()
    yield from [one for one in function.__defaults__ or () if issubclass(type(one), dict | list)]
    yield function.__dict__


def _ours(value: Any) -> bool:
    """Whether a class or a function is neither Python's nor torch's."""
    return _top(value.__module__) not in _NEVER


def _attributes(value: Any) -> Iterator[Any]:
    """The attributes of an object, past whatever its class makes of them; none where it keeps them otherwise."""
    try:
        # A thread's own are made by asking.
        found = vars(value) if type(value) is threading.local else object.__getattribute__(value, "__dict__")
    except AttributeError:
        return
    if type(found) is dict:
        yield found


def _contents(space: Any) -> Any:
    """A shallow copy of a place: a list as a list, all else as a dictionary."""
    if type(space) is CellType:
        try:
            return {"cell_contents": space.cell_contents}
        except ValueError:  # not yet assigned
            return {}
    if isinstance(space, type):
        return dict(type.__getattribute__(space, "__dict__"))
    if type(space) is dict:
        return space.copy()  # at once, whatever other threads do to it
    # Past what a subclass makes of its items: some make them when they are asked.
    return dict(dict.items(space)) if issubclass(type(space), dict) else list.copy(space)


def _restore(space: Any, before: Any, is_mine: Callable[[Any], bool]) -> None:
    """Make a place what it was, if a tensor of the run has come to it."""
    now = _contents(space)
    if isinstance(now, list):
        same = len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))
        if not same and any(_holds(one, is_mine) for one in now):
            space[:] = before
        return
    changed = [key for key in {**before, **now} if before.get(key, _GONE) is not now.get(key, _GONE)]
    if any(_holds(now.get(key), is_mine) for key in changed):
        for key in changed:
            _set(space, key, before.get(key, _GONE))


def _set(space: Any, key: Any, value: Any) -> None:
    if type(space) is CellType or isinstance(space, type):
        if value is _GONE:
            delattr(space, key)
        else:
            setattr(space, key, value)
    elif value is _GONE:
        del space[key]
    else:
        space[key] = value


def _holds(value: Any, is_mine: Callable[[Any], bool], depth: int = _DEPTH) -> bool:
    """Whether a value is a tensor of the run, or a container or an object with one in it."""
    if isinstance(value, torch.Tensor):
        return is_mine(value)
    return depth > 0 and any(_holds(one, is_mine, depth - 1) for one in _parts(value))


def _parts(value: Any) -> Iterator[Any]:
    kind = type(value)
    if issubclass(kind, dict):
        yield from dict.values(value)
    elif issubclass(kind, list | tuple | set | frozenset):
        yield from value
    elif not issubclass(kind, type | ModuleType) and kind.__module__ not in _NEVER:
        for attributes in _attributes(value):
            yield from dict.values(attributes)
