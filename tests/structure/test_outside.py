"""What a trace leaves outside of the model: nothing, wherever the model's code keeps its tables."""

from __future__ import annotations

import functools
import importlib
import threading
import types
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tests.law import check_cut, linear_net, sizes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import secateur as sc
from secateur.structure.norms import find_rms_norms
from secateur.structure.outside import Outside


def made(n: int) -> Tensor:
    return torch.arange(n).double() / n + 1.0


_cached = functools.lru_cache(maxsize=4)(made)
_kept_for_ever = functools.cache(made)
_several = functools.cache(lambda n: {"sin": (made(n), made(n))})
_table: dict[int, Tensor] = {}
_by_device: dict[str, dict[int, Tensor]] = defaultdict(dict)
_ordered: OrderedDict[int, Tensor] = OrderedDict({1: made(1)})
_list: list[Tensor] = []
_once: Tensor | None = None
_ready = False
_spare = types.SimpleNamespace(kept=None)
_local = threading.local()
_weak: weakref.WeakKeyDictionary[type, Tensor] = weakref.WeakKeyDictionary()


def in_dictionary(n: int) -> Tensor:
    if n not in _table:
        _table[n] = made(n)
    return _table[n]


def in_inner_dictionary(n: int) -> Tensor:
    if n not in _by_device["cpu"]:
        _by_device["cpu"][n] = made(n)
    return _by_device["cpu"][n]


def in_order(n: int) -> Tensor:
    if n not in _ordered:
        _ordered[n] = made(n)
    return _ordered[n]


def in_list(n: int) -> Tensor:
    if not _list:
        _list.append(made(n))
    return _list[0]


def in_global(n: int) -> Tensor:
    global _once, _ready
    if not _ready:
        _once, _ready = made(n), True
    assert _once is not None
    return _once


def in_namespace(n: int) -> Tensor:
    if _spare.kept is None:
        _spare.kept = made(n)
    return _spare.kept


def in_thread(n: int) -> Tensor:
    if not hasattr(_local, "kept"):
        _local.kept = made(n)
    return _local.kept


def in_weak(n: int) -> Tensor:
    if Holder not in _weak:
        _weak[Holder] = made(n)
    return _weak[Holder]


class Holder:
    tables: ClassVar[dict[int, Tensor]] = {}
    one: ClassVar[Tensor | None] = None

    def __init__(self) -> None:
        self.mine: dict[int, Tensor] = {}

    @classmethod
    def in_class(cls, n: int) -> Tensor:
        if cls.one is None:
            cls.one = made(n)
        return cls.one

    @staticmethod
    def in_table(n: int) -> Tensor:
        return Holder.tables.setdefault(n, made(n)) if n not in Holder.tables else Holder.tables[n]

    @staticmethod
    @functools.lru_cache(maxsize=1)
    def in_method_cache(n: int) -> Tensor:
        return made(n)

    def in_object(self, n: int) -> Tensor:
        if n not in self.mine:
            self.mine[n] = made(n)
        return self.mine[n]


_holder = Holder()


def remembered(function: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    known: dict[int, Tensor] = {}

    @functools.wraps(function)
    def ask(n: int) -> Tensor:
        if n not in known:
            known[n] = function(n)
        return known[n]

    return ask


def counted(function: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    last = None

    def ask(n: int) -> Tensor:
        nonlocal last
        last = function(n) if last is None else last
        return last

    return ask


def in_default(n: int, known: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006 - what code does
    if n not in known:
        known[n] = made(n)
    return known[n]


def in_function(n: int) -> Tensor:
    if not hasattr(in_function, "kept"):
        in_function.kept = made(n)  # type: ignore[attr-defined]
    return in_function.kept  # type: ignore[attr-defined, no-any-return]


_in_closure = remembered(made)
_in_variable = counted(made)

KEEPERS: dict[str, Callable[[int], Any]] = {
    "lru_cache": _cached,
    "cache": _kept_for_ever,
    "cache of containers": lambda n: _several(n)["sin"][1],
    "cache of a method": Holder.in_method_cache,
    "dictionary": in_dictionary,
    "dictionary of dictionaries": in_inner_dictionary,
    "ordered dictionary": in_order,
    "list": in_list,
    "two globals": in_global,
    "namespace": in_namespace,
    "thread's own": in_thread,
    "weak dictionary": in_weak,
    "class": Holder.in_class,
    "class's dictionary": Holder.in_table,
    "object": _holder.in_object,
    "closure's dictionary": _in_closure,
    "closure's variable": _in_variable,
    "default": in_default,
    "function": in_function,
}


class Net(nn.Module):
    """Adds a table that lies elsewhere to hidden units' sums; ``looks``: at a value, so that no fake tensor does."""

    def __init__(self, table: Callable[[int], Tensor], *, looks: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.table, self.looks = table, looks

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu()) * self.table(3).to(x.dtype)
        return h.clone() if self.looks and bool(x.sum() > 0) else h


def fresh(name: str) -> Callable[[int], Tensor]:
    """A keeper that keeps nothing yet."""
    global _once, _ready
    for cache in (_cached, _kept_for_ever, _several, Holder.in_method_cache):
        cache.cache_clear()
    for kept in (_table, _by_device, _list, Holder.tables, _holder.mine, _local.__dict__, vars(in_function), _weak):
        kept.clear()
    _ordered.pop(3, None)
    in_default.__defaults__[0].clear()  # type: ignore[index]
    _once, _ready, _spare.kept, Holder.one = None, False, None, None
    for function in (_in_closure, _in_variable):
        for cell in function.__closure__ or ():  # type: ignore[attr-defined]
            if isinstance(cell.cell_contents, dict):
                cell.cell_contents.clear()
            elif isinstance(cell.cell_contents, Tensor):
                cell.cell_contents = None
    return KEEPERS[name]


@pytest.mark.parametrize("looks", [False, True], ids=["fake", "real"])
@pytest.mark.parametrize("name", KEEPERS)
def test_a_table_outside_of_the_model_is_neither_left_there_nor_in_the_way(name: str, looks: bool) -> None:
    net = Net(fresh(name), looks=looks)
    structure = sc.trace(net, (torch.rand(2, 4),))
    assert sizes(structure) == [8]
    found = net(torch.rand(2, 4))
    assert not isinstance(found, FakeTensor)
    assert torch.equal(KEEPERS[name](3), made(3))
    # Once it is filled, with numbers, a trace reads it and leaves it.
    kept = KEEPERS[name](3)
    assert sizes(check_cut(net, torch.rand(2, 4))) == [8]
    assert KEEPERS[name](3) is kept


def test_tables_of_a_package_that_has_no_class_of_the_model_are_taken_back(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "kept_elsewhere.py").write_text("""
import torch
TABLES = {}
def table(n):
    if n not in TABLES:
        TABLES[n] = torch.arange(n) / n + 1.0
    return TABLES[n]
""")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(globals(), "elsewhere", elsewhere := importlib.import_module("kept_elsewhere"))
    assert sizes(sc.trace(Net(elsewhere.table), (torch.rand(2, 4),))) == [8]
    assert not elsewhere.TABLES


def test_what_a_failing_forward_left_is_taken_back() -> None:
    def fails(n: int) -> Tensor:
        in_dictionary(n)
        raise RuntimeError("not today")

    fresh("dictionary")
    with pytest.raises(sc.TraceError, match="not today"):
        sc.trace(Net(fails), (torch.rand(2, 4),))
    assert not _table


def test_units_that_escape_are_frozen_and_what_holds_them_is_emptied() -> None:
    fresh("list")

    def keeps(net: nn.Module, h: Tensor) -> Tensor:
        _list.append(h)
        return h

    structure = sc.trace(linear_net(keeps), (torch.rand(2, 4),))
    assert "escapes" in structure.why_frozen("a.weight")
    assert not _list


def test_what_hooks_keep_is_not_left_with_them() -> None:
    seen: list[Tensor] = []
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    net[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    net[1].register_forward_pre_hook(Watcher().note)
    net[2].register_forward_hook(functools.partial(noted, seen))
    structure = sc.trace(net, (torch.rand(2, 4),))
    assert "escapes" in structure.why_frozen("0.weight")
    assert not seen
    assert not Watcher.seen
    assert not _table


class Watcher:
    seen: ClassVar[list[Tensor]] = []

    def note(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        _table[0] = inputs[0].detach()
        self.seen.append(inputs[0])


def noted(seen: list[Tensor], module: nn.Module, inputs: Any, output: Tensor) -> None:
    seen.append(output)


def test_what_has_nothing_to_do_with_a_run_stays() -> None:
    fresh("dictionary")
    outside = Outside(Net(in_dictionary))
    other, mine = made(2), made(3)
    _table[2] = other
    outside.take_back(lambda value: value is mine)
    assert _table[2] is other
    _list.append(mine)
    outside.take_back(lambda value: value is mine)
    assert not _list
    # What says which tables there are goes with them.
    assert not _table


def test_values_of_every_kind_lie_beside_and_are_not_asked_for_what_they_make() -> None:
    structure = sc.trace(Net(made), (torch.rand(2, 4),))
    assert sizes(structure) == [8]
    assert not Lazy.asked


class Lazy(OrderedDict[str, Any]):
    asked: ClassVar[list[str]] = []

    def __getitem__(self, key: str) -> Any:
        Lazy.asked.append(key)
        return super().__getitem__(key)


class Closed:
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("not even its class")


_lazy = Lazy(a=1)
_odd = [list[int], types.MappingProxyType({}), Closed(), weakref.ref(Closed), iter([]), functools.partial(made, 2)]


def by_type(x: Tensor) -> Tensor:
    """A table for a number of examples, in the type of the first that asked."""
    if len(x) not in _table:
        _table[len(x)] = torch.ones(len(x), 1, dtype=x.dtype)
    return _table[len(x)]


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * by_type(x)


class Norm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return in_type(x) * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


def in_type(x: Tensor) -> Tensor:
    if x.shape[-1] not in _table:
        _table[x.shape[-1]] = torch.ones(x.shape[-1], dtype=x.dtype)
    return _table[x.shape[-1]]


@pytest.mark.parametrize("rules", [None, [sc.Rule("activations", where="1")]], ids=["units", "activations"])
def test_proofs_in_float64_leave_no_tables_of_it(rules: list[sc.Rule] | None) -> None:
    fresh("dictionary")
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Scale(), nn.Linear(8, 3))
    pruner = sc.attach(net, examples=(torch.rand(2, 4),), gates=rules, budget=sc.Budget(keep_params=0.6))
    small, _ = pruner.finalize()
    assert all(table.dtype == torch.float32 for table in _table.values())
    assert small(torch.rand(4, 4)).dtype == torch.float32


def test_what_another_thread_puts_there_meanwhile_is_not_taken_from_it() -> None:
    fresh("list")
    with Outside(Net(in_list)).nothing_left():
        _list.append(torch.rand(2))
    assert len(_list) == 1
    fresh("list")


def test_compact_and_the_search_for_norms_leave_none_either() -> None:
    fresh("dictionary")
    normed = nn.Sequential(nn.Linear(4, 8), Norm(8), nn.Linear(8, 3))
    assert list(find_rms_norms(normed, Outside(normed).nothing_left)) == ["1"]
    assert not _table
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Scale(), nn.Linear(8, 3))
    structure = sc.trace(net, (torch.rand(2, 4),))
    small = sc.compact(net, structure, {structure.groups[0].name: torch.arange(3)}, examples=(torch.rand(2, 4),))
    assert not _table
    assert small(torch.rand(2, 4)).dtype == torch.float32


class Rope:
    """Two places that go together: what there is, and how much of it."""

    tables: ClassVar[dict[str, Tensor]] = {}
    longest: ClassVar[int] = 0

    @classmethod
    def of(cls, n: int) -> Tensor:
        if n > cls.longest:
            cls.tables["cos"], cls.longest = made(n), n
        return cls.tables["cos"][:n]


def test_what_says_which_tables_there_are_goes_with_them() -> None:
    net = Net(Rope.of)
    assert sizes(sc.trace(net, (torch.rand(2, 4),))) == [8]
    assert not Rope.tables
    assert Rope.longest == 0
    assert not isinstance(net(torch.rand(2, 4)), FakeTensor)


def test_an_interrupted_trace_leaves_nothing() -> None:
    fresh("dictionary")

    def interrupted(n: int) -> Tensor:
        in_dictionary(n)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sc.trace(Net(interrupted), (torch.rand(2, 4),))
    assert not _table


@functools.cache
def registry() -> Holder:
    return Holder()


def test_one_object_for_all_that_a_cache_holds_stays_that_object() -> None:
    kept = registry()
    kept.mine[7] = table = made(7)
    assert sizes(sc.trace(Net(lambda n: registry().in_object(n)), (torch.rand(2, 4),))) == [8]
    assert registry() is kept
    assert list(kept.mine) == [7]
    assert kept.mine[7] is table


_current: ContextVar[Tensor | None] = ContextVar("current", default=None)


def in_context(n: int) -> Tensor:
    if (found := _current.get()) is None:
        _current.set(found := made(n))
    return found


def test_what_cannot_be_taken_back_is_said() -> None:
    assert any("could not be taken back" in note for note in sc.trace(Net(in_context), (torch.rand(2, 4),)).notes)
    _current.set(None)
    net = Net(in_context)
    net(torch.rand(2, 4))
    structure = sc.trace(net, (torch.rand(2, 4),))
    assert sizes(structure) == [8]
    assert not structure.notes
    _current.set(None)


_center = torch.ones(3)


@pytest.mark.parametrize("looks", [False, True], ids=["fake", "real"])
def test_tensors_that_a_forward_writes_to_have_their_numbers_back(looks: bool) -> None:
    def moved(n: int) -> Tensor:
        return _center.mul_(0.5)

    sc.trace(Net(moved, looks=looks), (torch.rand(2, 4),))
    assert torch.equal(_center, torch.ones(3))
