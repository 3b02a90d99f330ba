"""One recorded run of a model: every operator it executed, with the labels of what it returned."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from secateur.structure.branches import Branches
from secateur.structure.coupling import Coupling
from secateur.structure.fakes import fake_result
from secateur.structure.ids import Label, make_factor
from secateur.structure.labelled import Labelled
from secateur.structure.operators import Operator, operator_of, tensors_among
from secateur.structure.rules import Call
from secateur.structure.rulings import Ruling, Rulings

__all__ = ["Entry", "Leaving", "Recorder", "watch"]

_MAX_CONSTANT = 64


@dataclass(eq=False, slots=True)
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


@dataclass(eq=False)
class Recorder(TorchDispatchMode):
    """Runs beneath a model, applies the rule of each operator and keeps the record.

    Args:
        rulings: the rules, and where they write.
        fake_mode: the mode of the model's tensors, where they are fake.
        on_entry: called with each entry and its position; may raise to end the run.
        entries: the record so far.
        stack: qualified names of the modules in execution, kept by hooks of ``watch``.
        returned: the labels of what each module returned, call by call, where that is one tensor; with ``branches``.
        branches: notes which modules are residual branches, where that is wanted.
        read: identities of all tensors that an operator took.
    """

    rulings: Rulings
    fake_mode: FakeTensorMode | None = None
    on_entry: Callable[[int, Entry], None] | None = None
    entries: list[Entry] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)
    returned: dict[str, list[Label]] = field(default_factory=dict)
    branches: Branches | None = None
    read: set[int] = field(default_factory=set)
    _labels: Labelled = field(default_factory=Labelled)
    _saved: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        TorchDispatchMode.__init__(self)  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # `run` keeps compilers out once; to do so at each operator costs as much as the rest of a call.
        return False

    @property
    def coupling(self) -> Coupling:
        """Where the rules write."""
        return self.rulings.coupling

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and type(args[0]) is FakeTensor:
            return args[0].fake_device
        kwargs = kwargs or {}
        operator = operator_of(func)
        if operator.entry is None:
            out = self._decomposed(func, operator, args, kwargs)
            if out is not NotImplemented:
                return out
        values = operator.bound(args, kwargs)
        tensors = tensors_among(values.values())
        inputs = tuple([self.label(tensor) for tensor in tensors])
        self.read.update(map(id, tensors))
        operator.check_types(values, tensors)
        if operator.written:
            self._save(tensors_among([values.get(name) for name in operator.written]))
        out = NotImplemented
        if self.fake_mode is not None:
            out = fake_result(self.fake_mode, func, values, tensors, args, kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        if self.branches is not None:
            self.branches.ran(operator.name, tensors, out)
        outputs = [out] if isinstance(out, torch.Tensor) else tensors_among(tree_leaves(out))
        self._at(operator.name)
        if not outputs:
            if operator.namespace != "prim" and operator.name not in _HARMLESS:
                self.rulings.freeze(inputs, f"is read out of the model as a number ({operator.name})")
            return out
        call = Call(func, operator.name, values, outputs, self.label)
        ruling = self.rulings.on(operator, call, inputs)
        self._keep(operator.name, ruling, inputs, call)
        self._label(operator, values, outputs, ruling.labels)
        return out

    def _label(
        self, operator: Operator, values: Mapping[str, Any], outputs: list[torch.Tensor], labels: Sequence[Label]
    ) -> None:
        """Label what an operator returned and what it wrote to."""
        if not operator.written:
            for tensor, label in zip(outputs, labels, strict=True):
                self._labels[tensor] = label
            return
        mutated = tensors_among([values.get(name) for name in operator.written])
        for tensor, label in zip(outputs, labels, strict=True):
            if any(tensor is changed for changed in mutated):
                self._write(tensor, label)
            else:
                self._labels[tensor] = label
        for tensor in mutated:
            if not any(tensor is returned for returned in outputs):
                # Statistics that an operator updates: its rule has tied them to what they are of.
                self._write(tensor, _overwritten(self.label(tensor)))

    def _at(self, operator: str) -> None:
        self.coupling.operator, self.coupling.module = operator, self.stack[-1] if self.stack else ""

    def _keep(self, operator: str, ruling: Ruling, inputs: tuple[Label, ...], call: Call) -> None:
        """Add to the record, but for operators that only copy: whether a copy is made depends on strides."""
        if operator in _COPIES:
            return
        scalars = ruling.scalars
        if operator == "lift_fresh":
            scalars = (*scalars, *_written_numbers(call["self"]))
        operator = "view" if operator in _VIEWS else operator
        one = Entry(operator, self.coupling.module, scalars, ruling.labels, inputs)
        self.entries.append(one)
        if self.on_entry is not None:
            self.on_entry(len(self.entries) - 1, one)

    def label(self, tensor: torch.Tensor) -> Label:
        """The label of a tensor; a tensor never seen is a constant."""
        known = self._labels.get(tensor)
        return self.rulings.one(Label(tuple(tensor.shape))) if known is None else known

    def set_label(self, tensor: torch.Tensor, label: Label) -> None:
        """Label a tensor."""
        self._labels[tensor] = self.rulings.one(label)

    def left(self) -> list[torch.Tensor]:
        """All tensors of the run, the model's own among them, that still exist."""
        return [tensor for tensor in self._labels.left() if id(tensor) not in self._saved]

    def unwrite(self) -> None:
        """Give tensors that were there before the run, and are none of the model's, the numbers that they had."""
        for tensor, numbers in self._saved.values():
            with torch.no_grad(), suppress(RuntimeError):  # inference tensors, and those whose elements overlap
                tensor.copy_(numbers)

    def _save(self, tensors: Sequence[torch.Tensor]) -> None:
        """Keep the numbers of tensors that will be written to, and that are neither the model's nor the run's."""
        for tensor in tensors:
            if self._labels.get(tensor) is None and id(tensor) not in self._saved and type(tensor) is not FakeTensor:
                with _disable_current_modes():
                    self._saved[id(tensor)] = tensor, tensor.detach().clone()

    def alive(self, besides: Container[int]) -> list[Label]:
        """Labels with units of all tensors that still exist, besides those of the given identities."""
        return self._labels.alive(besides)

    def leaves(self, tensor: torch.Tensor, way: str) -> None:
        """A tensor's numbers leave torch: what becomes of them cannot be seen."""
        self._at(way)
        self.rulings.freeze([self.label(tensor)], f"is read out of the model as numbers ({way})")

    def _write(self, tensor: torch.Tensor, label: Label) -> None:
        """An in-place write: every tensor that looks at the same storage sees it too.

        Where the tensor had units before, the operator's rule has tied them to those that it has now, and
        so the others' units are tied too. Units along a dimension that had none are new to the others.
        """
        others = self._labels.sharing(tensor)
        had = {factor.dims for factor in self.label(tensor).factors if not self.coupling.made(factor.ids)}
        new = [factor for factor in label.factors if factor.dims not in had]
        self.set_label(tensor, label)
        for other in others:
            if _same_elements(other, tensor):
                self.set_label(other, label)
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
                zero=False,
            )
            self.set_label(other, replace(changed, factors=tuple(factors)))

    def _decomposed(self, func: Any, operator: Operator, args: Any, kwargs: Any) -> Any:
        """Run an operator without a rule as the simpler ones it is made of; NotImplemented where it has none."""
        if operator.namespace == "prim" or not tensors_among(tree_leaves((args, kwargs))):
            return NotImplemented
        with self:
            composite = func.decompose(*args, **kwargs)
            if composite is not NotImplemented:
                return composite
            table = decomposition_table.get(func)
            if table is None or operator.mutable:
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
        "_has_same_storage_numel",
    }
)
_DEVICE = torch.ops.prim.device.default


def _overwritten(label: Label) -> Label:
    """What is left to say of a tensor that an operator wrote to without returning it."""
    return replace(label, uniform=frozenset(), weight=False, vanishes=False, zero=False)


def _same_elements(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors on one storage are the same elements in the same shape."""
    return a.shape == b.shape and a.stride() == b.stride() and a.storage_offset() == b.storage_offset()


def _shared_dimensions(a: torch.Tensor, b: torch.Tensor) -> dict[int, int]:
    """Dimensions of ``a`` that ``b``, on the same storage, has as well: with the same stride and all its positions."""
    place = {(b.stride(dim), size): dim for dim, size in enumerate(b.shape) if size > 1 and b.stride(dim) > 0}
    found = {dim: place.get((a.stride(dim), size)) for dim, size in enumerate(a.shape)}
    return {dim: other for dim, other in found.items() if other is not None}


def _written_numbers(tensor: torch.Tensor) -> tuple[str, ...]:
    """The numbers of a small tensor that the code writes out: sizes may be among them."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.numel() > _MAX_CONSTANT:
        return ()
    with _disable_current_modes():
        return tuple(repr(number) for number in tensor.reshape(-1).tolist())


@contextmanager
def watch(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Keep the recorder's module stack while ``model`` runs."""
    with ExitStack() as hooks:
        for name, module in model.named_modules(remove_duplicate=True):

            def enter(_module: nn.Module, _args: Any, _kwargs: Any = None, *, _name: str = name) -> None:
                recorder.stack.append(_name)
                if recorder.branches is not None:
                    recorder.branches.entered(_name, _args, _kwargs or {})

            def leave(_module: nn.Module, _args: Any, _out: Any, *, _name: str = name) -> None:
                while recorder.stack and recorder.stack.pop() != _name:
                    pass
                if recorder.branches is None:
                    return
                recorder.branches.left(_name, _out)
                if isinstance(_out, torch.Tensor):
                    recorder.returned.setdefault(_name, []).append(recorder.label(_out))

            for handle in (
                module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
                module.register_forward_hook(leave),
            ):
                hooks.callback(handle.remove)
        yield
