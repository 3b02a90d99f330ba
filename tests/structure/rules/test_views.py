"""Reshapes, permutations and other views: each obeys the law, alone and in a model that is cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.law import Row, alone, given, hold, hold_in_a_model, in_models, linear_net, row
from tests.law import check_cut as check

H = given((2, 8, 3), 1)
HEADS = given((2, 3, 4, 5), 2, 3)
FREE = "abcdefgh"
NONE = "........"

ROWS: dict[str, Row] = {
    "merge with another dimension": row(lambda h: h.reshape(2, -1), H, FREE),
    "merge with all dimensions": row(lambda h: h.flatten(), H, FREE),
    "split, inner fixed": row(lambda h: h.view(2, -1, 2, 3), H, "aabbccdd"),
    "split, outer fixed": row(lambda h: h.unflatten(1, (2, -1)), H, "abcdabcd"),
    "heads and features merge": row(lambda h: h.flatten(2), HEADS, "abcd", ".....", "is merged with another unit's"),
    "heads and features merge, and heads cannot go": row(
        # So many features that no seed leaves one alone, for a dimension of size 1 merges with nothing.
        lambda h: (h.flatten(2), h.sum(2)),
        given((2, 3, 4, 12), 2, 3),
        "....",
        "abcdefghijkl",
        "is reduced over (sum)",
    ),
    "heads and features merge, and neither can go": row(
        lambda h: (h.flatten(2), h.sum()), HEADS, "....", ".....", "is reduced over (sum)"
    ),
    "features and heads merge, heads last": row(lambda h: h.mT.flatten(2), HEADS, "abcd", ".....", "is merged with"),
    "three units' dimensions merge": row(
        lambda h: h.flatten(1), given((2, 3, 4, 5), 1, 2, 3), "abc", "....", ".....", "is merged with another unit's"
    ),
    "heads and features merge and split again": row(
        lambda h: h.flatten(2).unflatten(2, (4, -1)).sum(2), HEADS, "....", "abcde", "which is cut instead"
    ),
    "split and merge back": row(lambda h: h.unflatten(1, (-1, 2)).flatten(1, 2), H, "aabbccdd"),
    "split across something fixed": row(
        lambda h: F.pad(h, (1, 1)).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2),
        given((2, 8), 1),
        ".aabbcc.",
        "no single one of them can lose slices",
    ),
    "view with a size of one": row(lambda h: h.view(2, 1, -1, 3), H, FREE),
    "permute": row(lambda h: h.permute(2, 0, 1), H, FREE),
    "transpose": row(lambda h: h.transpose(1, -1), H, FREE),
    "mT": row(lambda h: h.mT, H, FREE),
    "t of a matrix": row(lambda h: h.t(), given((4, 8), 1), FREE),
    "t of a vector": row(lambda h: h.t() * 1, given((8,), 0), FREE),
    "movedim": row(lambda h: h.movedim(1, -1), H, FREE),
    "swapaxes": row(lambda h: h.swapaxes(0, 1), H, FREE),
    "contiguous": row(lambda h: h.transpose(1, 2).contiguous(), H, FREE),
    "unsqueeze": row(lambda h: h.unsqueeze(-1), H, FREE),
    "squeeze a dimension": row(lambda h: h.unsqueeze(0).squeeze(0), H, FREE),
    "squeeze several": row(lambda h: h[None, ..., None].squeeze((0, -1)), H, FREE),
    "squeeze whatever is 1": row(lambda h: h.unsqueeze(0).squeeze(), H, ".abcdefg", "squeeze() without a dimension"),
    "squeeze the only unit": row(lambda h: h.squeeze(1), given((2, 1, 3), 1), ".", "the only unit of a dimension"),
    "expand": row(lambda h: h.expand(-1, -1, 5), given((2, 8, 1), 1), FREE),
    "expand to the front": row(lambda h: h.expand(4, -1, -1, -1), H, FREE),
    "expand fixed values over units": row(lambda s, h: s.expand(2, h.shape[1], 3) * h, given((2, 1, 3)), H, FREE),
    "expand the only unit": row(lambda h: h.expand(2, 4, 3), given((2, 1, 3), 1), ".", "the only unit of a dimension"),
    "broadcast_to": row(lambda h: torch.broadcast_to(h, (4, *h.shape)), H, FREE),
    "diagonal of other dimensions": row(lambda h: h.diagonal(dim1=0, dim2=2), given((3, 8, 3), 1), FREE),
    "diagonal of the units": row(
        lambda h: h.diagonal(dim1=0, dim2=1), given((3, 8, 3), 1), NONE, "paired with another"
    ),
    "diag_embed of another dimension": row(torch.diag_embed, given((8, 3), 0), FREE),
    "diag_embed of the units": row(torch.diag_embed, given((3, 8), 1), NONE, "paired with another"),
    "windows of another dimension": row(lambda h: h.unfold(2, 2, 1), H, FREE),
    "windows of the units": row(lambda h: h.unfold(1, 2, 1), H, NONE, "is cut into windows"),
    "as_strided, nothing changed": row(lambda h: h.as_strided(h.shape, h.stride()), H, FREE),
    "as_strided": row(lambda h: h.as_strided((2, 2), (1, 1)), H, NONE, "is read through arbitrary strides"),
    "bits as integers of that size": row(lambda h: h.contiguous().view(torch.int64).view(torch.float64) * 1, H, FREE),
    "bits as smaller integers": row(lambda h: h.contiguous().view(torch.int32).to(torch.float64), H, FREE),
    "bits as smaller integers, units last": row(
        lambda h: h.contiguous().view(torch.int32).to(torch.float64),
        given((2, 8), 1),
        NONE,
        "is read as numbers of another size",
    ),
    "pairs as complex numbers": row(lambda h: torch.view_as_complex(h.contiguous()), given((2, 8, 2), 1), FREE),
    "units in pairs as complex numbers": row(
        lambda h: torch.view_as_real(torch.view_as_complex(h.unflatten(1, (-1, 2)).contiguous()) * 1j).flatten(1),
        given((2, 8), 1),
        "aabbccdd",
    ),
    "real and imaginary parts": row(lambda h: torch.complex(h, -h).real * torch.complex(h, h * 2).imag, H, FREE),
    "conjugate": row(lambda h: torch.complex(h, h * 2).conj().imag * 1, H, FREE),
    "copies of views": row(
        lambda h: torch.permute_copy(torch.view_copy(h, [2, -1, 3, 1]), [3, 0, 1, 2]).squeeze(0), H, FREE
    ),
}


@pytest.mark.parametrize("one", alone(ROWS))
def test_commutes_with_removal(one: Row) -> None:
    hold(one)


@pytest.mark.parametrize("one", in_models(ROWS))
def test_in_a_model(one: Row) -> None:
    hold_in_a_model(one)


def test_expansion_by_another_tensors_shape_fails_the_trial_where_that_shape_stays() -> None:
    """Nothing ties the expanded tensor to the other before they meet."""
    structure = check(linear_net(lambda net, h: h[:, :1].expand(-1, 8) * 1 + h * 0), torch.randn(2, 4))
    assert not structure.groups


def test_a_literal_size_in_a_view_freezes_with_module_and_operator() -> None:
    structure = check(linear_net(lambda net, h: h.view(2, 2, 4).flatten(1)), torch.randn(2, 4))
    assert not structure.groups
    assert "sizes of its own" in structure.why_frozen("a.weight")


def test_squeeze_without_a_dimension_leaves_two_units() -> None:
    """With one channel left, ``squeeze()`` would drop the channels too, so one stays whatever is closed."""
    structure = check(linear_net(lambda net, h: h[:, :, None, None].squeeze()), torch.randn(2, 4))
    assert [group.size for group in structure.groups] == [7]
