"""What a run leaves outside of its copy of the model, taken back: tables in caches, in globals and in classes.

Code keeps tables that many layers share (positions, masks) where no copy of the model reaches them. A run on fake
tensors would leave tables without numbers there, for the model itself to find, and a run in float64 tables of
float64; and a second run, which finds what the first one left, does something else than the first.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from secateur.structure.places import PLAIN, contents, differs, parts, places_of, put_back, undo

__all__ = ["Outside", "nothing_left"]

#: How many values are looked at in all, and in one container; namespaces and classes are always taken whole.
_IN_ALL, _IN_ONE = 200_000, 20_000
#: How far is gone in other packages than those of the model's classes: variables, what they hold, and what that holds.
_FAR = 3
#: How many values are searched for a tensor in what has changed.
_SEARCHED = 10_000
#: Packages that keep no tables of a model: Python's, torch and what it needs, and what runs tests.
_NEVER = (
    sys.stdlib_module_names
    | {"torch", "numpy", "sympy", "mpmath", "networkx", "jinja2", "fsspec", "secateur"}
    | {"pytest", "_pytest", "pluggy", "xdist", "hypothesis"}
)
#: What of Python's and torch's holds what others put there, and what hands on to it.
_HOLDERS = (nn.Module, SimpleNamespace, threading.local, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
#: Types of numbers that proofs compute in.
_WIDE = frozenset({torch.float64, torch.complex128})
_CACHE = type(functools.lru_cache(maxsize=1)(len))
_CARRIERS = frozenset(
    {
        tuple,
        CellType,
        MethodType,
        staticmethod,
        classmethod,
        property,
        functools.partial,
        functools.partialmethod,
        _CACHE,
    }
)
_MODULE_NAME = type.__dict__["__module__"]


class Outside:
    """The places that the code of a model writes to without the model, as they are now.

    These are the globals of the modules that its classes are from, and what can be reached from them and from its
    hooks: other modules, classes and objects, variables that functions close over, containers in any of them; and the
    caches of ``functools``, wherever they are.

    Args:
        model: any module.

    Attributes:
        suspects: tensors of runs that were still there when these had been taken back.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before: dict[int, tuple[Any, Any, str]] = {}
        self._met: dict[int, Any] = {}
        self._caches: dict[int, Any] = {}
        self._misses: dict[int, int] = {}
        self._known: dict[int, frozenset[int]] = {}
        self._n_modules = 0
        self.suspects: list[weakref.ref[torch.Tensor]] = []
        own = {id(module) for module in model.modules()}
        kinds = {kind for module in model.modules() for kind in type(module).__mro__}
        packages = {_package(kind) for kind in kinds} - _NEVER
        homes = {kind.__module__ for kind in kinds if _package(kind) in packages}
        roots: list[Any] = [sys.modules[name] for name in homes if name in sys.modules]
        roots += [kind for kind in kinds if _package(kind) in packages]
        roots += _functions(model)
        self._look(deque((one, "", 0) for one in roots), packages, own)

    def take_back(self, is_left: Callable[[Any], bool]) -> None:
        """Undo what put values where they outlive a run.

        Where one is found, all that has changed in that package is undone: sizes and flags say what tables there are.

        Args:
            is_left: whether a value is one that a run has made.
        """
        changed: list[tuple[Any, Any, str, bool]] = []
        for place, before, owner in self._before.values():
            with suppress(Exception):  # whatever values of the user's raise when they are looked at
                now = contents(place)
                if differs(now, before):
                    changed.append((place, before, owner, _holds(_new(now, before), is_left)))
        owners = {owner for _, _, owner, held in changed if held}
        for place, before, owner, held in changed:
            if held or owner in owners:
                with suppress(Exception):  # a place that cannot be set back does not keep others from it
                    put_back(place, before)
        for cache in self._filled():
            _empty(cache, is_left, self._known.get(id(cache), frozenset()))
            self._misses[id(cache)] = cache.cache_info().misses

    def kept(self) -> bool:
        """Whether one of the suspects, tensors that could not be found anywhere here, is still there."""
        if all(one() is None for one in self.suspects):
            return False
        gc.collect()  # most are held by reference cycles alone
        return any(one() is not None for one in self.suspects)

    @contextmanager
    def nothing_left(self) -> Iterator[None]:
        """Take back tensors of float64 that come to lie there meanwhile, for copies of the model run in it.

        Others are as the model itself would have made them, or another thread's. Of the caches of ``functools`` only
        those are looked at that can be reached.
        """
        searched, self._n_modules = self._n_modules, len(sys.modules)
        for cache in self._filled():
            self._known[id(cache)] = frozenset(id(one) for found in _results(cache) for one in found.values())
        try:
            yield
        finally:
            self.take_back(lambda value: issubclass(type(value), torch.Tensor) and value.dtype in _WIDE)
            self._n_modules = searched
            self._known.clear()

    def _look(self, queue: deque[tuple[Any, str, int]], packages: set[str], own: set[int]) -> None:
        """Copy all places that can be reached, the nearest first; in other packages than the model's those alone."""
        left = _IN_ALL
        while queue and left > 0:
            value, owner, far = queue.popleft()
            if id(value) in self._met or id(value) in own:
                continue
            self._met[id(value)] = value
            with suppress(Exception):  # whatever values of the user's raise when they are looked at
                kind = type(value)
                if not owner:  # the model's own, or a hook's
                    owner = _home(value)
                    packages.add(owner)
                elif kind is FunctionType or issubclass(kind, ModuleType):
                    owner = _home(value)
                    far = 0 if owner in packages else max(far, 1)
                held: list[Any] = []
                for place in places_of(value):
                    held += self._copy(place, owner, whole=issubclass(kind, ModuleType | type))
                left -= len(held)
                if kind is FunctionType:
                    held += [value.__globals__, *(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__]
                elif kind in _CARRIERS:
                    held += gc.get_referents(value)
                else:
                    held.append(kind)
                if kind is _CACHE:
                    self._caches[id(value)] = value
                further = far + (far > 0)
                if further <= _FAR:
                    queue.extend((one, owner, further) for one in held if _followed(one))

    def _copy(self, place: Any, owner: str, *, whole: bool) -> list[Any]:
        """Copy a place; what it holds."""
        if id(place) in self._before:
            return []
        before = contents(place)
        if len(before) > _IN_ONE and not whole:
            return []
        self._before[id(place)] = place, before, owner
        return list(before.values()) if isinstance(before, dict) else before

    def _filled(self) -> list[Any]:
        """Caches of functools that may have taken something in since this was asked last."""
        if self._n_modules != len(sys.modules):
            # To search all objects is slow; forwards seldom define caches, but they import modules that do.
            self._n_modules = len(sys.modules)
            found = {id(one): one for one in gc.get_objects() if type(one) is _CACHE}
            self._caches.update((key, one) for key, one in found.items() if _of_users(one))
        filled = []
        for key, cache in self._caches.items():
            info = cache.cache_info()
            # Not by its size: a result whose key cannot be compared stays in a cache that counts none.
            if self._misses.get(key, 0) != info.misses:
                filled.append(cache)
            self._misses[key] = info.misses
        return filled


def nothing_left(model: nn.Module) -> AbstractContextManager[None]:
    """`Outside.nothing_left` of a model that computes in less than proofs do; of another they leave what it leaves."""
    floating = [one.dtype for one in model.parameters() if one.is_floating_point() or one.is_complex()]
    return nullcontext() if floating and _WIDE.issuperset(floating) else Outside(model).nothing_left()


def _followed(value: Any) -> bool:
    """Whether places can be reached from a value: it is of the user's, or it holds what others put there."""
    kind = type(value)
    if kind in PLAIN:
        return False
    if issubclass(kind, type):
        return _package(value) not in _NEVER
    if kind is FunctionType or issubclass(kind, ModuleType):
        return _home(value) not in _NEVER
    if issubclass(kind, torch.Tensor):
        return False
    if issubclass(kind, dict | list | tuple | set | deque):
        return bool(kind.__len__(value)) or not issubclass(kind, tuple)
    return kind in _CARRIERS or issubclass(kind, _HOLDERS) or _package(kind) not in _NEVER


def _home(value: Any) -> str:
    """The package of a module, a function, a class or an object."""
    kind = type(value)
    if kind is FunctionType:
        return _top(value.__module__)
    if issubclass(kind, ModuleType):
        return _top(ModuleType.__getattribute__(value, "__dict__").get("__name__"))
    return _package(value if issubclass(kind, type) else kind)


def _functions(model: nn.Module) -> Iterator[Any]:
    """What modules call besides each other: hooks, and functions that are attributes or in containers of these."""
    for name, value in vars(torch_module).items():
        if name.startswith("_global") and name.endswith("_hooks") and value:
            yield from value.values()
    for module in model.modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks") and value:
                yield from value.values()
            elif name not in _OF_TORCH and _followed(value):
                yield value


_OF_TORCH = frozenset(vars(nn.Module()))


def _package(kind: type) -> str:
    """The package of a class, past its metaclass."""
    return _top(_MODULE_NAME.__get__(kind))


def _top(name: Any) -> str:
    """The package of a module's name; Python's own where there is none."""
    return name.partition(".")[0] if isinstance(name, str) else "builtins"


def _of_users(cache: Any) -> bool:
    """Whether a cache may be of a function of the user's: those of partial objects and of builtins say nothing."""
    function = cache.__wrapped__
    return type(function) is not FunctionType or _top(function.__module__) not in _NEVER


def _empty(cache: Any, is_left: Callable[[Any], bool], known: Set[int]) -> None:
    """Take from a cache what a run has made: single results where it can be told, else all of them."""
    for results in _results(cache):
        fresh = [key for key, result in results.items() if id(result) not in known]
        for key in fresh:
            if _holds([key, results[key]], is_left):
                undo(results, key)
        return
    if _holds(
        [one for one in gc.get_referents(cache) if one is not cache.__wrapped__ and type(one) is not dict], is_left
    ):
        cache.cache_clear()


def _results(cache: Any) -> list[dict[Any, Any]]:
    """The results of a cache without bound, by what was asked; none of another, which keeps them otherwise."""
    if cache.cache_parameters()["maxsize"] is not None:
        return []
    return [one for one in gc.get_referents(cache) if type(one) is dict and one is not vars(cache)]


def _new(now: Any, before: Any) -> list[Any]:
    """What a place holds that it did not hold before, keys among it."""
    if isinstance(now, list):
        known = {id(one) for one in before}
        return [one for one in now if id(one) not in known]
    fresh = [(key, one) for key, one in now.items() if before.get(key, before) is not one]
    return [one for pair in fresh for one in pair]


def _holds(values: list[Any], is_left: Callable[[Any], bool]) -> bool:
    """Whether one of some values is of the run, or holds one that is."""
    queue, seen = deque(values), set[int]()
    while queue and len(seen) < _SEARCHED:
        value = queue.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if is_left(value):
            return True
        if not issubclass(type(value), type | ModuleType) and _followed(value):
            queue.extend(parts(value))
    return False
