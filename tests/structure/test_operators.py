"""What is read from an operator's schema."""

from __future__ import annotations

import pytest
import torch

from secateur.structure.operators import operator_of, tensors_among

aten = torch.ops.aten


def test_arguments_are_bound_by_name_with_defaults() -> None:
    x = torch.zeros(2)
    assert operator_of(aten.add.Tensor).bound((x, 3), {}) == {"self": x, "other": 3, "alpha": 1}
    bound = operator_of(aten.sum.dim_IntList).bound((x,), {"dim": [0], "keepdim": True})
    assert bound == {"self": x, "dim": [0], "keepdim": True, "dtype": None}


@pytest.mark.parametrize(
    ("operator", "args", "scalars"),
    [
        (aten.leaky_relu.default, (torch.zeros(2), 0.1), (("negative_slope", 0.1),)),
        (aten.view.default, (torch.zeros(2), [2, 1]), ()),
        (aten.select.int, (torch.zeros(2), 0, 1), (("dim", 0),)),
        (aten.cat.default, ([torch.zeros(2)], 0), (("dim", 0),)),
        (aten._to_copy.default, (torch.zeros(2),), (("dtype", "torch.float64"),)),
    ],
)
def test_scalars_are_what_is_neither_tensor_nor_size_nor_storage(operator, args, scalars) -> None:
    known = operator_of(operator)
    kwargs = {"dtype": torch.float64, "device": torch.device("cpu")} if operator is aten._to_copy.default else {}
    assert known.scalars(known.bound(args, kwargs)) == scalars


def test_what_it_writes_to() -> None:
    assert operator_of(aten.add_.Tensor).written == ("self",)
    assert operator_of(aten.add.out).written == ("out",)
    assert operator_of(aten.add.Tensor).written == ()
    assert operator_of(aten.t_.default).written == ()  # moves dimensions, and writes nothing
    assert operator_of(aten.t_.default).mutable


def test_pointwise_operators_have_a_rule_and_unknown_ones_none() -> None:
    assert operator_of(aten.digamma.default).entry is not None
    assert operator_of(aten.linalg_qr.default).entry is None


def test_types_are_checked_as_real_tensors_would() -> None:
    mm, embedding = operator_of(aten.mm.default), operator_of(aten.embedding.default)
    mm.check_types(given := {"self": torch.zeros(2, 2), "mat2": torch.zeros(2, 2)}, [*given.values()])
    with pytest.raises(TypeError, match="float32 and float64"):
        mm.check_types(given := {"self": torch.zeros(2, 2), "mat2": torch.zeros(2, 2).double()}, [*given.values()])
    with pytest.raises(TypeError, match="indices of dtype int64 or int32"):
        embedding.check_types(given := {"weight": torch.zeros(2, 2), "indices": torch.zeros(2)}, [*given.values()])


def test_tensors_are_found_in_lists_too() -> None:
    x, y = torch.zeros(1), torch.zeros(2)
    assert [len(t) for t in tensors_among([x, 3, None, [y, None], (x,)])] == [1, 2, 1]
