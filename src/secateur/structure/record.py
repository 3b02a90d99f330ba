"""One recorded run of a model: every operator it executed, with the labels of what it returned."""

from __future__ import annotations

import gc
from collections.abc import Callable, Container, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from secateur.structure.branches import Branches
from secateur.structure.coupling import Coupling
from secateur.structure.ids import Label, make_factor
from secateur.structure.rules import Call, RuleEntry, Uncovered, entry_for, operator_name, pointwise_rule

__all__ = ["Entry", "Leaving", "Recorder", "is_cache", "tensors_in", "watch"]

#: Arguments that say where and how a result is stored, never what it is.
_STORAGE = frozenset({"device", "layout", "pin_memory", "memory_format", "generator", "non_blocking", "implicit"})
#: Integer arguments that are no sizes, also where an operator's other integers are.
_NEVER_SIZES = frozenset({"dim", "dims", "fill_value", "value", "dim0", "dim1", "padding_idx", "dimension"})
#: The eps of a known RMSNorm follows its width.
_FOLLOWS = frozenset({("secateur::rms_norm", "eps")})
_MAX_CONSTANT = 64


@dataclass(frozen=True, eq=False)
class Entry:
    """One executed operator.

    Args:
        operator: its name.
        module: qualified name of the module that executed it.
        scalars: its arguments that are neither tensors nor sizes.
        labels: labels of the tensors that it returned.
        inputs: labels of the tensors that it took.
    """

    operator: str
    module: str
    scalars: tuple[Any, ...]
    labels: tuple[Label, ...]
    inputs: tuple[Label, ...]


def _by_tensor() -> Any:
    """A dictionary that holds its tensors weakly, by identity."""
    return WeakIdKeyDictionary()


@dataclass(eq=False)
class Recorder(TorchDispatchMode):
    """Runs beneath a model, applies the rule of each operator and keeps the record.

    Args:
        coupling: where rules say what is tied and frozen.
        entries: the record so far.
        stack: qualified names of the modules in execution, kept by hooks of ``watch``.
        on_entry: called with each entry and its position; may raise to end the run.
        returned: the label of what the first call of each module returned, where that is one tensor.
        branches: notes which modules are residual branches.
    """

    coupling: Coupling
    entries: list[Entry] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)
    on_entry: Callable[[int, Entry], None] | None = None
    returned: dict[str, Label] = field(default_factory=dict)
    branches: Branches = field(default_factory=Branches)
    read: MutableMapping[torch.Tensor, bool] = field(default_factory=_by_tensor)
    _labels: MutableMapping[torch.Tensor, Label] = field(default_factory=_by_tensor)
    _aliases: dict[int, MutableMapping[torch.Tensor, bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        TorchDispatchMode.__init__(self)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        entry = entry_for(func)
        if entry is None and torch.Tag.pointwise in func.tags:
            entry = RuleEntry(pointwise_rule, sizes=False)
        if entry is None:
            out = self._decomposed(func, args, kwargs)
            if out is not NotImplemented:
                return out
        values = _bound(func, args, kwargs)
        inputs = tuple(self.label(t) for t in _tensors(values.values()))
        for tensor in _tensors(values.values()):
            self.read[tensor] = True
        _check_types(operator_name(func), values)
        out = func(*args, **kwargs)
        self.branches.ran(operator_name(func), list(_tensors(values.values())), out)
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.coupling.operator, self.coupling.module = operator_name(func), self.stack[-1] if self.stack else ""
        if not outputs:
            self._escape(func, inputs)
            return out
        call = Call(func, values, out, self.label)
        labels = self._apply(entry, call, inputs, outputs)
        self._keep(call, labels, inputs, entry)
        mutated = [] if torch.Tag.inplace_view in func.tags else _mutated(func, values)
        for tensor, label in zip(outputs, labels, strict=True):
            if any(tensor is changed for changed in mutated):
                self._write(tensor, label)
            else:
                self.set_label(tensor, label)
        for tensor in mutated:
            if not any(tensor is out_tensor for out_tensor in outputs):
                # Statistics that an operator updates: its rule has tied them to what they are of.
                self._write(tensor, replace(self.label(tensor), uniform=frozenset(), weight=False, vanishes=False))
        return out

    def _keep(
        self,
        call: Call,
        labels: list[Label],
        inputs: tuple[Label, ...],
        entry: RuleEntry | None,
    ) -> None:
        """Add to the record, but for operators that only copy: whether a copy is made depends on strides."""
        operator = self.coupling.operator
        if operator in _COPIES:
            return
        operator = "view" if operator in _VIEWS else operator
        compared = {name: value for name, value in call.values.items() if (operator, name) not in _FOLLOWS}
        sizes = (("size", number) for number in call.numbers)
        scalars = (*_scalars(compared, entry), *sizes, *_written_numbers(call))
        one = Entry(operator, self.coupling.module, scalars, tuple(labels), inputs)
        self.entries.append(one)
        if self.on_entry is not None:
            self.on_entry(len(self.entries) - 1, one)

    def label(self, tensor: torch.Tensor) -> Label:
        """The label of a tensor; a tensor never seen is a constant."""
        known = self._labels.get(tensor)
        return known if known is not None else Label(tuple(tensor.shape))

    def set_label(self, tensor: torch.Tensor, label: Label) -> None:
        """Label a tensor and remember which storage it looks at."""
        for factor in label.factors:
            if factor.ids.ndim > 1:
                self.coupling.rectangle(factor.ids)
        self._labels[tensor] = label
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()._cdata
        self._aliases.setdefault(storage, _by_tensor())[tensor] = True

    def alive(self, besides: Container[int]) -> list[Label]:
        """Labels with units of all tensors that still exist, besides those of the given identities."""

        def left() -> list[Label]:
            return [label for tensor, label in self._labels.items() if label.factors and id(tensor) not in besides]

        if left():
            # Only reference cycles hold most of them; collecting is slow, so not without need.
            gc.collect()
        return left()

    def _apply(
        self, entry: RuleEntry | None, call: Call, inputs: tuple[Label, ...], outputs: list[torch.Tensor]
    ) -> list[Label]:
        data = any(label.data for label in inputs)
        if entry is None:
            self._freeze(inputs, f"meets the operator {call.name}, which has no rule")
            made = [Label(tuple(t.shape)) for t in outputs]
        else:
            try:
                ruled = entry.apply(self.coupling, call)
            except Uncovered:
                ruled = []
            made = [ruled] if isinstance(ruled, Label) else list(ruled)
            if len(made) != len(outputs) or any(m.shape != tuple(t.shape) for m, t in zip(made, outputs, strict=True)):
                self._freeze(inputs, f"meets a form of the operator {call.name} that its rule does not cover")
                made = [Label(tuple(t.shape)) for t in outputs]
        return [replace(label, data=data) for label in made]

    def _freeze(self, labels: tuple[Label, ...], reason: str) -> None:
        for label in labels:
            for factor in label.factors:
                self.coupling.freeze(factor.ids, reason)

    def leaves(self, tensor: torch.Tensor, way: str) -> None:
        """A tensor's numbers leave torch: what becomes of them cannot be seen."""
        self.coupling.operator, self.coupling.module = way, self.stack[-1] if self.stack else ""
        self._freeze((self.label(tensor),), f"is read out of the model as numbers ({way})")

    def _escape(self, func: Any, inputs: tuple[Label, ...]) -> None:
        if func.namespace != "prim" and operator_name(func) not in _HARMLESS:
            self._freeze(inputs, f"is read out of the model as a number ({operator_name(func)})")

    def _write(self, tensor: torch.Tensor, label: Label) -> None:
        """An in-place write: every tensor that looks at the same storage sees it too.

        Where the tensor had units before, the operator's rule has tied them to those that it has now, and
        so the others' units are tied too. Units along a dimension that had none are new to the others.
        """
        storage = tensor.untyped_storage()._cdata
        others = [other for other in self._aliases.get(storage, {}) if other is not tensor]
        had = {factor.dims for factor in self.label(tensor).factors if not self.coupling.made(factor.ids)}
        new = [factor for factor in label.factors if factor.dims not in had]
        self.set_label(tensor, label)
        for other in others:
            if _same_elements(other, tensor):
                self._labels[other] = label
                continue
            known = self.label(other)
            place = _shared_dimensions(tensor, other)
            uniform = {place[dim] for dim in label.uniform if dim in place} & known.uniform
            factors = list(known.factors)
            for factor in new:
                dims = tuple(place.get(dim, -1) for dim in factor.dims)
                theirs = next((f for f in known.factors if set(f.dims) & set(dims)), None)
                made = make_factor(dims, factor.ids)
                fresh = theirs is None or self.coupling.made(theirs.ids)
                if fresh and made is not None and known.uniform.issuperset(dims):
                    factors = [*(f for f in factors if f is not theirs), made]
                    if theirs is not None and theirs.dims == made.dims:
                        self.coupling.tie(theirs.ids, made.ids, _THROUGH_A_VIEW)
                elif theirs is not None and made is not None and made.dims == theirs.dims:
                    self.coupling.tie(theirs.ids, made.ids, _THROUGH_A_VIEW)
                else:
                    self.coupling.freeze(factor.ids, _THROUGH_A_VIEW)
            changed = replace(
                known,
                uniform=frozenset(uniform),
                weight=known.weight and label.weight,
                data=known.data or label.data,
                vanishes=known.vanishes and label.vanishes,
            )
            self._labels[other] = replace(changed, factors=tuple(factors))

    def _decomposed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator without a rule as the simpler ones it is made of; NotImplemented where it has none."""
        if func.namespace == "prim" or not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs))):
            return NotImplemented
        with self:
            composite = func.decompose(*args, **kwargs)
            if composite is not NotImplemented:
                return composite
            table = decomposition_table.get(func)
            if table is None or func._schema.is_mutable or operator_name(func) in _NOT_DECOMPOSED:
                return NotImplemented
            return table(*args, **kwargs)


class Leaving(TorchFunctionMode):
    """Sees numbers leave torch where no operator runs: as arrays of numpy and as lists.

    Args:
        recorder: is told.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WAYS_OUT and args and isinstance(args[0], torch.Tensor):
            self._recorder.leaves(args[0], func.__name__)
        return func(*args, **(kwargs or {}))


_WAYS_OUT = (torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist, torch.Tensor.__dlpack__)
_THROUGH_A_VIEW = "is written through a view of another tensor"
_COPIES = frozenset({"clone", "detach", "alias", "contiguous"})
_VIEWS = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy"})
_HARMLESS = frozenset(
    {
        "is_same_size",
        "sym_size",
        "sym_stride",
        "sym_numel",
        "sym_storage_offset",
        "equal_shape",
        "_has_compatible_shallow_copy_type",
        "is_nonzero_shape",
    }
)
_NOT_DECOMPOSED: frozenset[str] = frozenset()


def _same_elements(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors on one storage are the same elements in the same shape."""
    return a.shape == b.shape and a.stride() == b.stride() and a.storage_offset() == b.storage_offset()


def _shared_dimensions(a: torch.Tensor, b: torch.Tensor) -> dict[int, int]:
    """Dimensions of ``a`` that ``b``, on the same storage, has as well: with the same stride and all its positions."""
    place = {(b.stride(dim), size): dim for dim, size in enumerate(b.shape) if size > 1 and b.stride(dim) > 0}
    found = {dim: place.get((a.stride(dim), size)) for dim, size in enumerate(a.shape)}
    return {dim: other for dim, other in found.items() if other is not None}


#: Operators that take tensors of one type only, where fake tensors do not look at it.
_ONE_TYPE = frozenset({"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "convolution", "_convolution"})


def _check_types(operator: str, values: Mapping[str, Any]) -> None:
    """Raise what real tensors of these types would raise."""
    if operator in _ONE_TYPE:
        types = {tensor.dtype for tensor in _tensors(values.values())}
        if len(types) > 1:
            listed = " and ".join(sorted(str(one).removeprefix("torch.") for one in types))
            raise TypeError(f"{operator} takes tensors of one dtype, got {listed}")
    elif operator == "embedding" and values["indices"].dtype not in (torch.int64, torch.int32):
        raise TypeError(f"embedding takes indices of dtype int64 or int32, got {values['indices'].dtype}")


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, torch.Tensor))


def _bound(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by schema name, defaults filled in."""
    values: dict[str, Any] = {}
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            values[argument.name] = args[position]
        elif argument.name in kwargs:
            values[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            values[argument.name] = argument.default_value
    return values


def _mutated(func: Any, values: Mapping[str, Any]) -> list[torch.Tensor]:
    changed: list[torch.Tensor] = []
    if not func._schema.is_mutable:
        return changed
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed.extend(_tensors([values.get(argument.name)]))
    return changed


def _scalars(values: Mapping[str, Any], entry: RuleEntry | None) -> tuple[Any, ...]:
    """What must be the same in the dense model and a cut one: every argument but tensors, storage and sizes."""
    kept: list[Any] = []
    for name, given in values.items():
        if name in _STORAGE or isinstance(given, torch.Tensor) or given is None:
            continue
        if isinstance(given, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in given):
            continue
        value = tuple(given) if isinstance(given, (list, tuple)) else given
        if entry is not None and entry.sizes and name not in _NEVER_SIZES and _integral(value):
            continue
        kept.append((name, value if not isinstance(value, torch.dtype) else str(value)))
    return tuple(kept)


def _written_numbers(call: Call) -> tuple[str, ...]:
    """The numbers of a small tensor that the code writes out: sizes may be among them."""
    tensor = call.get("self")
    if call.name != "lift_fresh" or not isinstance(tensor, torch.Tensor):
        return ()
    if isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.numel() > _MAX_CONSTANT:
        return ()
    with _disable_current_modes():
        return tuple(repr(number) for number in tensor.reshape(-1).tolist())


def _integral(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_integral(item) for item in value)
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


@contextmanager
def watch(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Keep the recorder's module stack while ``model`` runs."""
    with ExitStack() as hooks:
        for name, module in model.named_modules(remove_duplicate=True):

            def enter(_module: nn.Module, _args: Any, _kwargs: Any = None, *, _name: str = name) -> None:
                recorder.stack.append(_name)
                recorder.branches.entered(_name, _args, _kwargs or {})

            def leave(_module: nn.Module, _args: Any, _out: Any, *, _name: str = name) -> None:
                recorder.branches.left(_name, _out)
                while recorder.stack and recorder.stack.pop() != _name:
                    pass
                if isinstance(_out, torch.Tensor):
                    recorder.returned.setdefault(_name, recorder.label(_out))

            for handle in (
                module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
                module.register_forward_hook(leave),
            ):
                hooks.callback(handle.remove)
        yield


_CACHE_KEYS = frozenset({"past_key_values", "past_key_value", "cache_params"})


def is_cache(value: Any) -> bool:
    """Whether an object holds keys and values that only the model itself reads again: their widths follow a cut."""
    return any(kind.__name__.endswith("Cache") for kind in type(value).__mro__)


def tensors_in(value: Any, depth: int = 6) -> list[torch.Tensor]:
    """All tensors in an output: containers, dataclasses and plain objects are looked into, caches are not."""
    if isinstance(value, torch.Tensor):
        return [value]
    if depth == 0 or value is None or isinstance(value, (str, bytes, int, float, bool, nn.Module)) or is_cache(value):
        return []
    if isinstance(value, Mapping):
        items: list[Any] = [item for key, item in value.items() if key not in _CACHE_KEYS]
    elif isinstance(value, (list, tuple, set, frozenset)):
        items = list(value)
    elif is_dataclass(value):
        items = [getattr(value, f.name, None) for f in fields(value)]
    else:
        items = list(vars(value).values()) if hasattr(value, "__dict__") else []
    return [tensor for item in items for tensor in tensors_in(item, depth - 1)]
