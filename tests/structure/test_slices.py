"""Single tensors, cut: the same form whether they are real, fake, or on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from secateur.structure.slices import cut_tensor, index_of, mode_of

CUTS = {0: (1, 3), 2: (0, 2, 4)}


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_a_cut_has_one_form_on_real_fake_and_meta_tensors(order: torch.memory_format) -> None:
    x = torch.randn(4, 3, 5, 2).to(memory_format=order)
    small = cut_tensor(x, CUTS)
    torch.testing.assert_close(small, x[[1, 3]][:, :, [0, 2, 4]])
    assert small.is_contiguous(memory_format=order)
    others = [cut_tensor(x.to("meta"), CUTS), cut_tensor(FakeTensorMode().from_tensor(x), CUTS)]
    assert [(one.shape, one.stride(), one.dtype) for one in others] == [(small.shape, small.stride(), x.dtype)] * 2
    assert isinstance(others[1], FakeTensor)
    assert others[1].device == x.device


def test_an_index_meets_its_tensor() -> None:
    fake = FakeTensorMode().from_tensor(torch.zeros(4))
    assert isinstance(index_of((0, 2), fake), FakeTensor)
    with mode_of(fake):
        assert isinstance(torch.zeros(2), FakeTensor)
    assert index_of((0, 2), torch.zeros(4, device="meta")).is_meta
