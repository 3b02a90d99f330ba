"""Fake tensors made directly: of parameters and buffers, and as results of common operators.

The way through ``FakeTensorMode`` costs a third of a millisecond an operator, and more where the shapes are new to
it, for many of torch's own shape functions are long Python. What most networks execute is answered here: only for
fake tensors on one device without known values, and only where size, order in memory and dtype of the result are
beyond doubt. Everything else takes the way through the mode. (`tests/structure/test_fakes.py` compares both.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["fake", "fake_of", "fake_result", "quick_operators"]

#: Shape, strides and dtype of a result.
_Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
_Formed = Callable[[Mapping[str, Any]], "_Form | list[_Form] | None"]
_aten = torch.ops.aten


def fake(
    mode: FakeTensorMode, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device
) -> FakeTensor:
    """A fake tensor."""
    with _no_dispatch():
        return _wrapped(mode, torch.empty_strided(shape, strides, dtype=dtype, device="meta"), device)


def _wrapped(mode: FakeTensorMode, made: torch.Tensor, device: torch.device) -> FakeTensor:
    """What ``FakeTensor(mode, made, device)`` gives; all but the first of a mode and device without its checks."""
    known = mode.__dict__.setdefault("secateur_state", {})
    if device not in known:
        first = FakeTensor(mode, made, device)
        known[device] = dict(vars(first))
        return first
    if device.type == "meta":
        # It is where it says, so that nobody need be asked; torch asks several times an operator.
        tensor: FakeTensor = torch.Tensor._make_subclass(FakeTensor, made, made.requires_grad)
    else:
        tensor = torch.Tensor._make_subclass(
            FakeTensor, made, made.requires_grad, dispatch_device=True, device_for_backend_keys=device
        )
    torch._C._set_throw_on_mutable_data_ptr(tensor)
    vars(tensor).update(known[device])
    return tensor


def fake_of(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor | None:
    """A fake copy of a plain parameter or buffer, a parameter if it is one; None for other kinds of tensor."""
    if type(tensor) not in (torch.Tensor, nn.Parameter, FakeTensor) or tensor.layout != torch.strided:
        return None
    if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return None
    device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
    made = fake(mode, tensor.shape, tensor.stride(), tensor.dtype, device)
    if isinstance(tensor, nn.Parameter):
        made._is_param = True
    return made.requires_grad_(tensor.requires_grad)


def fake_result(
    mode: FakeTensorMode,
    func: Any,
    values: Mapping[str, Any],
    tensors: Sequence[torch.Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """What an operator returns on fake tensors; NotImplemented where that is not plain.

    Args:
        mode: of the tensors.
        func: the operator overload.
        values: its arguments by name.
        tensors: those among them.
        args: the arguments as they were given.
        kwargs: those that were given by name.
    """
    if func is _EMPTY:
        return _empty(mode, values)
    form = _by_identity().get(id(func), NotImplemented)
    if form is NotImplemented:
        return NotImplemented
    device = _common_device(tensors)
    if device is None:
        return NotImplemented
    if form is None:
        with _no_dispatch():
            made = func(*args, **kwargs)
            return (
                _wrapped(mode, made, device)
                if isinstance(made, torch.Tensor)
                else [_wrapped(mode, one, device) for one in made]
            )
    found = form(values)
    if found is None:
        return NotImplemented
    if func._schema.is_mutable:
        return args[0]
    return fake(mode, *found, device) if isinstance(found, tuple) else tuple(fake(mode, *one, device) for one in found)


def _common_device(tensors: Sequence[torch.Tensor]) -> torch.device | None:
    """The device of some tensors; None where there is no such, or one has known values."""
    device: torch.device | None = None
    for tensor in tensors:
        if type(tensor) is not FakeTensor or tensor.constant is not None or tensor.layout != torch.strided:
            return None
        if device is not None and tensor.fake_device != device:
            return None
        device = tensor.fake_device
    return device


_no_dispatch = torch._C._DisableTorchDispatch


def quick_operators() -> list[Any]:
    """The operators that are answered here."""
    return [*_FORMS, *_VIEWS, _EMPTY]


_VIEWS = frozenset(
    {
        *(_aten.view.default, _aten._unsafe_view.default, _aten.t.default, _aten.transpose.int, _aten.permute.default),
        *(_aten.expand.default, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.slice.Tensor),
        *(_aten.select.int, _aten.detach.default, _aten.alias.default, _aten.split.Tensor, _aten.unbind.int),
        *(_aten.split_with_sizes.default, _aten.squeeze.default),
    }
)
_EMPTY = _aten.empty.memory_format


@functools.cache
def _by_identity() -> dict[int, _Formed | None]:
    """The forms of operators by identity, for their hash is Python; None for views."""
    return {**{id(func): None for func in _VIEWS}, **{id(func): form for func, form in _FORMS.items()}}


_FORMS: dict[Any, _Formed] = {}


def _empty(mode: FakeTensorMode, values: Mapping[str, Any]) -> Any:
    """A tensor without values, of given size; BatchNorm makes one each time."""
    size, dtype, device = values["size"], values.get("dtype"), values.get("device")
    unusual = ("layout", "pin_memory", "memory_format")
    if any(values.get(key) not in (None, False, torch.strided, torch.contiguous_format) for key in unusual):
        return NotImplemented
    if device is None or device.type not in ("cpu", "meta") or not all(type(one) is int and one >= 0 for one in size):
        return NotImplemented
    shape, strides, _ = _new(tuple(size), torch.float32)
    return fake(mode, shape, strides, dtype or torch.get_default_dtype(), device)


def _forms(*operators: Any) -> Callable[[_Formed], _Formed]:
    def register(function: _Formed) -> _Formed:
        _FORMS.update(dict.fromkeys(operators, function))
        return function

    return register


@functools.lru_cache(maxsize=4096)
def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [0] * len(shape), 1
    for dim in reversed(range(len(shape))):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


@functools.lru_cache(maxsize=4096)
def _dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements lie without gaps or overlaps, in whatever order of the dimensions."""
    step = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != step:
            return False
        step *= size
    return step > 0


def _new(shape: Sequence[int], dtype: torch.dtype) -> _Form:
    shape = tuple(shape)
    return shape, _contiguous(shape), dtype


def _like(tensor: torch.Tensor) -> _Form | None:
    """The same size in the same order."""
    if tensor.is_contiguous():
        return _new(tensor.shape, tensor.dtype)
    shape, strides = tuple(tensor.shape), tensor.stride()
    return (shape, strides, tensor.dtype) if _dense(shape, strides) else None


@_forms(
    *(_aten.relu.default, _aten.relu_.default, _aten.gelu.default, _aten.silu.default, _aten.silu_.default),
    *(_aten.sigmoid.default, _aten.tanh.default, _aten.neg.default, _aten.rsqrt.default, _aten.cos.default),
    *(_aten.hardswish.default, _aten.hardswish_.default, _aten.leaky_relu.default, _aten.hardsigmoid.default),
    *(_aten.sin.default, _aten.exp.default, _aten.hardtanh.default, _aten.hardtanh_.default, _aten.elu.default),
    *(_aten.mul.Scalar, _aten.div.Scalar, _aten.add.Scalar, _aten.pow.Tensor_Scalar, _aten.div_.Scalar),
    *(_aten.bernoulli_.float, _aten.empty_like.default),
)
def _alone(values: Mapping[str, Any]) -> _Form | None:
    """Element by element, of floating numbers."""
    x = values["self"]
    others = [value for key, value in values.items() if key != "self"]
    numbers = all(value is None or isinstance(value, (int, float, str)) for value in others)
    return _like(x) if numbers and x.is_floating_point() else None


@_forms(_aten._softmax.default, _aten._safe_softmax.default)
def _softmax(values: Mapping[str, Any]) -> _Form | None:
    x = values["self"]
    usual = not values.get("half_to_float") and values.get("dtype") is None
    return _like(x) if usual and x.is_floating_point() and x.is_contiguous() else None


@_forms(_aten.clone.default)
def _clone(values: Mapping[str, Any]) -> _Form | None:
    x, order = values["self"], values.get("memory_format")
    if order is torch.contiguous_format:
        return _new(x.shape, x.dtype)
    return _like(x) if order in (None, torch.preserve_format) else None


@_forms(
    *(_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor),
    *(_aten.add_.Tensor, _aten.sub_.Tensor, _aten.mul_.Tensor, _aten.div_.Tensor),
)
def _pair(values: Mapping[str, Any]) -> _Form | None:
    """Two tensors of one floating type of which one is as large as the result, or a tensor and a number."""
    x, y = values["self"], values["other"]
    if not isinstance(y, torch.Tensor):
        counts = x.dtype == torch.int64 and type(y) is int and x.ndim == 0
        return _like(x) if counts or (x.is_floating_point() and isinstance(y, (int, float))) else None
    if y.dtype != x.dtype or not x.is_floating_point():
        return None
    if x.shape == y.shape:
        same = x.stride() == y.stride() or (x.is_contiguous() and y.is_contiguous())
        return _like(x) if same else None
    if _spreads_over(y, x):
        return _like(x)
    return _like(y) if _spreads_over(x, y) else None


def _spreads_over(small: torch.Tensor, large: torch.Tensor) -> bool:
    """Whether broadcasting the two gives the larger one's shape."""
    offset = large.ndim - small.ndim
    return offset >= 0 and all(a in (1, b) for a, b in zip(small.shape, large.shape[offset:], strict=True))


@_forms(_aten.native_batch_norm.default)
def _batch_norm(values: Mapping[str, Any]) -> list[_Form] | None:
    x = values["input"]
    sides = ("weight", "bias", "running_mean", "running_var")
    if not _float32(values, "input", *sides) or not _sized(values, x.shape[1:2], *sides):
        return None
    saved = _new((0,) if x.fake_device.type == "cpu" and not values["training"] else (x.shape[1],), x.dtype)
    return [_new(tuple(x.shape), x.dtype), saved, saved]


@_forms(_aten.native_layer_norm.default)
def _layer_norm(values: Mapping[str, Any]) -> list[_Form] | None:
    x, k = values["input"], len(values["normalized_shape"])
    over = tuple(x.shape[-k:])
    fits = tuple(values["normalized_shape"]) == over and _sized(values, over, "weight", "bias")
    if not fits or not _float32(values, "input", "weight", "bias"):
        return None
    side = _new((*x.shape[:-k], *(1 for _ in range(k))), x.dtype)
    return [_new(tuple(x.shape), x.dtype), side, side]


def _float32(values: Mapping[str, Any], *names: str) -> bool:
    """Whether these are plain tensors of float32, or absent."""
    given = [values[name] for name in names if values.get(name) is not None]
    return all(
        tensor.dtype == torch.float32 and tensor.stride() == _contiguous(tuple(tensor.shape)) for tensor in given
    )


def _sized(values: Mapping[str, Any], shape: Sequence[int], *names: str) -> bool:
    """Whether these have that shape, or are absent."""
    return all(tuple(values[name].shape) == tuple(shape) for name in names if values.get(name) is not None)


@_forms(_aten.convolution.default)
def _convolution(values: Mapping[str, Any]) -> _Form | None:
    x, weight = values["input"], values["weight"]
    if values["transposed"] or not _float32(values, "input", "weight", "bias") or x.ndim != weight.ndim:
        return None
    n, groups, made = x.ndim - 2, values["groups"], weight.shape[0]
    given = [list(values[key]) * (n if len(values[key]) == 1 else 1) for key in ("stride", "padding", "dilation")]
    fits = x.shape[1] == weight.shape[1] * groups and made > 0 == made % groups and _sized(values, (made,), "bias")
    if not fits or min(given[0]) < 1:
        return None
    sizes = [
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, padding, dilation in zip(x.shape[2:], weight.shape[2:], *given, strict=True)
    ]
    return _new((x.shape[0], made, *sizes), x.dtype) if min(sizes) > 0 else None


@_forms(_aten.mm.default)
def _mm(values: Mapping[str, Any]) -> _Form | None:
    return _product(values["self"], values["mat2"], ())


@_forms(_aten.bmm.default)
def _bmm(values: Mapping[str, Any]) -> _Form | None:
    left, right = values["self"], values["mat2"]
    return _product(left, right, (left.shape[0],)) if left.shape[:1] == right.shape[:1] else None


@_forms(_aten.addmm.default)
def _addmm(values: Mapping[str, Any]) -> _Form | None:
    made, addend = _product(values["mat1"], values["mat2"], ()), values["self"]
    if made is None or addend.dtype != made[2] or addend.ndim > 2:
        return None
    return made if all(a in (1, b) for a, b in zip(addend.shape[::-1], made[0][::-1], strict=False)) else None


def _product(left: torch.Tensor, right: torch.Tensor, batch: tuple[int, ...]) -> _Form | None:
    n = len(batch) + 2
    if not left.ndim == right.ndim == n or left.dtype != right.dtype or left.shape[-1] != right.shape[-2]:
        return None
    return _new((*batch, left.shape[-2], right.shape[-1]), left.dtype)


@_forms(_aten.cat.default)
def _cat(values: Mapping[str, Any]) -> _Form | None:
    tensors = values["tensors"]
    first = tensors[0]
    dim = values["dim"] % max(first.ndim, 1)
    rest = {(one.ndim, tuple(one.shape[:dim]), tuple(one.shape[dim + 1 :]), one.dtype) for one in tensors}
    # Of four or five dimensions the result may follow its operands' order.
    ordered = first.ndim not in (4, 5) or all(one.is_contiguous() for one in tensors)
    if len(rest) > 1 or not first.ndim or not ordered:
        return None
    total = sum(one.shape[dim] for one in tensors)
    return _new((*first.shape[:dim], total, *first.shape[dim + 1 :]), first.dtype)


@_forms(_aten.embedding.default)
def _embedding(values: Mapping[str, Any]) -> _Form | None:
    weight, indices = values["weight"], values["indices"]
    return _new((*indices.shape, weight.shape[1]), weight.dtype) if weight.ndim == 2 else None


@_forms(_aten.mean.dim)
def _mean(values: Mapping[str, Any]) -> _Form | None:
    x, dims = values["self"], values["dim"]
    if not dims or values.get("dtype") is not None or not x.is_floating_point() or not x.is_contiguous():
        return None
    gone = {dim % x.ndim for dim in dims}
    if values["keepdim"]:
        return _new([1 if dim in gone else size for dim, size in enumerate(x.shape)], x.dtype)
    return _new([size for dim, size in enumerate(x.shape) if dim not in gone], x.dtype)
