"""Fake tensors made directly: what an operator returns is what the way through the mode gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.structure.fakes import fake, fake_of, fake_result, quick_operators
from secateur.structure.operators import operator_of, tensors_among

Call = Callable[..., Any]


class _Compared(TorchDispatchMode):
    """Compares every result that is given directly with the mode's own."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode, self.seen = mode, set[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = operator_of(func).bound(args, kwargs or {})
        quick = fake_result(self.mode, func, values, tensors_among(values.values()), args, kwargs or {})
        slow = func(*args, **(kwargs or {}))
        if quick is not NotImplemented:
            self.seen.add(func)
            pairs = list(zip(tree_leaves(quick), tree_leaves(slow), strict=True))
            assert pairs
            for mine, theirs in pairs:
                assert _seen(mine) == _seen(theirs), func
        return slow


def _seen(tensor: Tensor) -> tuple[Any, ...]:
    """All that a model can see of a fake tensor; the stride of a single position is of no consequence."""
    strides = [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]
    kind = type(tensor), tensor.dtype, tensor.device, tensor.storage_offset()
    return kind, tuple(tensor.shape), strides, vars(tensor).keys() - {"_is_param"}


def _x(*shape: int) -> Tensor:
    return torch.zeros(*shape)


_SWAPPED = [lambda: _x(2, 5, 3).transpose(1, 2), lambda: _x(2, 3, 4, 5).to(memory_format=torch.channels_last)]
_ANY = [lambda: _x(2, 3), lambda: _x(1, 4, 1), lambda: _x(2, 6)[:, ::2], *_SWAPPED]
_ALONE: list[Call] = [
    *(F.relu, F.gelu, F.silu, torch.sigmoid, torch.tanh, torch.neg, torch.rsqrt, torch.cos, torch.sin, torch.exp),
    *(F.hardswish, F.leaky_relu, F.hardsigmoid, F.hardtanh, F.elu, F.dropout, torch.empty_like, torch.clone),
    *(lambda x: x * 2, lambda x: x / 3, lambda x: x + 1, lambda x: x**2, lambda x: x.contiguous(), lambda x: x * x),
    *(lambda x: x.clone().relu_(), lambda x: x.clone().add_(x), lambda x: x.clone().div_(2.0), lambda x: x.softmax(-1)),
    *(lambda x: x + torch.zeros(()), lambda x: x + x[..., :1], lambda x: x[..., :1] * x, lambda x: x.mean(-1)),
    *(lambda x: x.unsqueeze(0), lambda x: x.unsqueeze(-1).squeeze(-1), lambda x: x.detach(), lambda x: x.unbind(0)),
    *(lambda x: x.expand(2, *x.shape), lambda x: x.transpose(0, -1), lambda x: x.mean(0, keepdim=True)),
    *(lambda x: x.split(1, -1), lambda x: torch.cat([x, x], -1), lambda x: x[..., 1:], lambda x: x.select(0, 0)),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("make", _ANY)
def test_operators_of_one_tensor(make: Call, device: str) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device(device):
        x = mode.from_tensor(make())
    compared = _Compared(mode)
    with mode, compared:
        for call in _ALONE:
            call(x)
    assert len(compared.seen) > (20 if x.is_contiguous() else 10)


def _net(*layers: nn.Module) -> Call:
    return nn.Sequential(*layers)


_LAYERS: list[tuple[Call, tuple[int, ...]]] = [
    (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 9, 9)),
    (lambda: nn.Conv2d(4, 8, (3, 1), dilation=2, groups=2), (2, 4, 9, 9)),
    (lambda: nn.Conv2d(4, 4, 1), (1, 4, 1, 1)),
    (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    (lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 9, 9)),
    (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (2, 4, 9, 9)),
    (lambda: nn.BatchNorm2d(4), (2, 4, 3, 3)),
    (lambda: nn.BatchNorm1d(4), (2, 4)),
    (lambda: nn.LayerNorm(4), (2, 5, 4)),
    (lambda: nn.LayerNorm((5, 4)), (2, 5, 4)),
    (lambda: nn.Linear(4, 6), (2, 4)),
    (lambda: nn.Linear(4, 6, bias=False), (2, 5, 4)),
    (lambda: _net(nn.Linear(4, 6), nn.Flatten(0)), (2, 4)),
    (lambda: nn.MultiheadAttention(4, 2), (3, 2, 4)),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("make", "shape"), _LAYERS)
def test_layers(make: Call, shape: tuple[int, ...], device: str, training: bool) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.device(device):
        layer, x = make().train(training), torch.zeros(shape)
        compared = _Compared(mode)
        with compared:
            layer(*[x] * (3 if isinstance(layer, nn.MultiheadAttention) else 1))
    assert compared.seen


def test_an_embedding_and_a_product_of_batches() -> None:
    mode = FakeTensorMode()
    with mode:
        table, words, compared = nn.Embedding(9, 4), torch.zeros(2, 3, dtype=torch.int64), _Compared(mode)
        with compared:
            made = table(words)
            made @ made.transpose(1, 2)
            torch.baddbmm(torch.zeros(3, 3), made, made.transpose(1, 2))
    assert {torch.ops.aten.embedding.default, torch.ops.aten.bmm.default} <= compared.seen


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: F.linear(torch.zeros(2, 4), torch.zeros(3, 5)),
        lambda: F.conv2d(torch.zeros(1, 4, 5, 5), torch.zeros(6, 3, 3, 3)),
        lambda: F.conv2d(torch.zeros(1, 4, 2, 2), torch.zeros(6, 4, 3, 3)),
        lambda: torch.zeros(2, 3) + torch.zeros(2, 4),
        lambda: torch.cat([torch.zeros(2, 3), torch.zeros(3, 4)]),
        lambda: F.layer_norm(torch.zeros(2, 4), (3,)),
        lambda: F.batch_norm(torch.zeros(2, 4), torch.zeros(3), torch.ones(3)),
        lambda: torch.bmm(torch.zeros(2, 3, 4), torch.zeros(3, 4, 5)),
    ],
)
def test_what_does_not_fit_is_left_to_the_mode_which_raises(wrong: Call) -> None:
    mode = FakeTensorMode()
    with mode, _Compared(mode), pytest.raises((RuntimeError, ValueError)):
        wrong()


def test_known_values_and_several_devices_are_left_to_the_mode() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        known = torch.tensor(3)
        assert known.item() == 3
        assert _quick(mode, torch.ops.aten.add_.Tensor, known, 1) is NotImplemented
        cpu, meta = torch.zeros(2), torch.zeros(2, device="meta")
        assert _quick(mode, torch.ops.aten.add.Tensor, cpu, meta) is NotImplemented
    assert _quick(mode, torch.ops.aten.relu.default, torch.zeros(2)) is NotImplemented
    assert _quick(mode, torch.ops.aten.cumsum.default, cpu, 0) is NotImplemented


def _quick(mode: FakeTensorMode, func: Any, *args: Any) -> Any:
    values = operator_of(func).bound(args, {})
    return fake_result(mode, func, values, tensors_among(values.values()), args, {})


def test_every_quick_operator_is_a_plain_one() -> None:
    assert all(not func._schema.is_mutable or func._schema.name.endswith("_") for func in quick_operators())


def test_a_fake_is_what_the_mode_makes() -> None:
    mode = FakeTensorMode()
    strides, device = (5, 1), torch.device("cpu")
    made = [fake(mode, (3, 4), strides, torch.float16, device) for _ in range(2)]
    theirs = mode.from_tensor(torch.empty_strided((3, 4), strides, dtype=torch.float16))
    assert all(_seen(one) == _seen(theirs) for one in made)
    assert all(isinstance(one, FakeTensor) and one.fake_mode is mode for one in made)


def test_a_fake_copy_is_a_parameter_if_its_original_is() -> None:
    mode = FakeTensorMode()
    weight, buffer = nn.Parameter(_x(2, 3, 4, 5).to(memory_format=torch.channels_last)), torch.arange(3)
    made, other = fake_of(mode, weight), fake_of(mode, buffer)
    assert isinstance(made, nn.Parameter)
    assert (made.requires_grad, made.is_leaf, made.stride()) == (True, True, weight.stride())
    assert not isinstance(other, nn.Parameter)
    assert (other.dtype, other.requires_grad) == (torch.int64, False)
    assert fake_of(mode, torch.eye(3).to_sparse()) is None
