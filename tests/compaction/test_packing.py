from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.compaction.packing import packed, unpacked

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.complex64]


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9001,), (37, 251), (3, 1001, 3)])
def test_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    dense = (torch.randn(shape) * 100).to(dtype) * (torch.rand(shape) < 0.05).to(dtype)
    parts, shapes = packed({"a.weight": dense})
    assert list(parts) == ["a.weight..mask", "a.weight..values"]
    again = unpacked(parts, shapes)["a.weight"]
    assert again.dtype == dtype
    assert again.shape == dense.shape
    assert bits(again) == bits(dense)


def test_signed_zeros_and_numbers_that_are_none_stay() -> None:
    special = torch.zeros(1000)
    special[3], special[500], special[999] = -0.0, math.nan, -math.inf
    parts, shapes = packed({"w": special})
    assert len(parts["w..values"]) == 3
    assert bits(unpacked(parts, shapes)["w"]) == bits(special)


def test_only_where_it_is_smaller() -> None:
    tensors = {
        "full": torch.randn(100, 100),
        "small": torch.zeros(10),
        "empty": torch.zeros(0, 3),
        "one": torch.ones(()),
    }
    parts, shapes = packed(tensors)
    assert shapes == {}
    assert all(parts[name] is tensor for name, tensor in tensors.items())
    assert packed({"w": torch.zeros(100, 100)})[1] == {"w": [100, 100]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w..mask": torch.zeros(3, dtype=torch.uint8)}, "a mask of shape"),
        ({"w..values": torch.ones(2)}, "bits are set"),
    ],
)
def test_parts_that_do_not_fit(change: dict[str, torch.Tensor], message: str) -> None:
    parts, shapes = packed({"w": torch.eye(100)})
    with pytest.raises(ValueError, match=message):
        unpacked(parts | change, shapes)
    with pytest.raises(KeyError):
        unpacked({}, shapes)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


@pytest.mark.parametrize("keep", [0.05, 0.3])
def test_a_model_of_single_weights_becomes_a_smaller_file(keep: float, tmp_path: Path) -> None:
    model, x = net(), torch.randn(2, 64)
    pruner = sc.attach(model, examples=(x,), gates=[sc.Rule("weights")], budget=sc.Budget(keep_params=keep))
    with torch.no_grad():
        pruner.gates.rules[0].log_alpha.copy_(torch.randn(pruner.gates.total))
    small, report = pruner.finalize()
    file = tmp_path / "small.safetensors"
    sc.save(small, file)
    again = sc.load(file, net())
    found, expected = again.state_dict(), small.state_dict()
    assert list(found) == list(expected)
    assert all(bits(found[name]) == bits(expected[name]) for name in expected)
    assert torch.equal(again(x), small(x))
    dense = sum(parameter.numel() for parameter in small.parameters())
    selected = sum(buffer.numel() * 8 for buffer in small.buffers())
    size = file.stat().st_size
    plan = len(json.dumps(sc.cut_of(small).to_json()))  # type: ignore[union-attr]
    assert size - plan - selected < 4 * report.compact.params + dense / 8 + 5000
