"""Concatenation, splits, slices and single positions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.law import Row, alone, check_cut, given, hold, hold_in_a_model, in_models, linear_net, row, sizes

H = given((2, 8, 3), 1)
G = given((2, 5, 3), 1)
HEADS = given((2, 3, 4, 5), 2, 3)
FREE = "abcdefgh"
NONE = "........"
BY_POSITION = "is cut into parts by position"

ROWS: dict[str, Row] = {
    "cat": row(lambda a, b: torch.cat([a, b], 1), H, G, FREE, "ijklm"),
    "cat along another dimension": row(lambda a, b: torch.cat([a, b], 2), H, H, FREE, FREE),
    "cat with what is fixed": row(lambda a, b: torch.cat([b, a], 1), H, given((2, 5, 3)), FREE),
    "cat with itself": row(lambda a: torch.cat([a, -a], 1), H, FREE),
    "cat with zeros": row(lambda a: torch.cat([a, a.new_zeros(2, 2, 3)], 1), H, FREE),
    "cat with zeros as wide": row(lambda a: torch.cat([a, torch.zeros_like(a)], 1), H, FREE),
    "cat with nothing": row(lambda a: torch.cat([a, a.new_zeros(0)], 1), H, FREE),
    "cat of heads": row(lambda a, b: torch.cat([a, b], 2), HEADS, HEADS, "abcd", "efghi", "jklm", "efghi"),
    "cat of halves, joined again": row(lambda a: torch.cat(a.chunk(2, 1), 1), H, "abcdabcd"),
    "cat expanded over units": row(lambda s, a: torch.cat([a, s.expand_as(a)], 2), given((2, 1, 3)), H, FREE),
    "hstack": row(lambda a, b: torch.hstack([a, b]), H, G, FREE, "ijklm"),
    "stack": row(lambda a, b: torch.stack([a, b], 1), H, H, FREE, FREE),
    "stack, interleaved": row(lambda a: torch.stack([a, -a], -1).flatten(1), given((2, 8), 1), FREE),
    "chunk": row(lambda h: torch.cat([x * (k + 1) for k, x in enumerate(h.chunk(2, 1))], 1), H, "abcdabcd"),
    "GLU": row(lambda h: F.glu(h, 1), H, "abcdabcd"),
    "SwiGLU by chunk": row(lambda h: F.silu(h.chunk(2, 1)[0]) * h.chunk(2, 1)[1], H, "abcdabcd"),
    "split in quarters": row(lambda h: h.split(h.shape[1] // 4, 1)[2], H, "abababab"),
    "split with equal sizes": row(lambda h: h.split([h.shape[1] // 2] * 2, 1), H, "abcdabcd"),
    "tensor_split": row(lambda h: h.tensor_split(2, 1), H, "abcdabcd"),
    "hsplit": row(lambda h: torch.hsplit(h, 2), H, "abcdabcd"),
    "chunk of heads": row(lambda h: h.chunk(2, 2), HEADS, "abab", "cdefg"),
    "chunk along another dimension": row(lambda h: h.chunk(3, 2), H, FREE),
    "chunk in unequal parts": row(lambda h: h.chunk(3, 1), H, NONE, BY_POSITION),
    "split with unequal sizes": row(lambda h: h.split([3, 5], 1), H, NONE, BY_POSITION),
    "split with sizes along another dimension": row(lambda h: h.split([1, 2], 2), H, FREE),
    "split with a written size": row(lambda h: h.split(4, 1)[0], H, NONE, "holds a size or a position", trial=True),
    "unsafe_chunk": row(lambda h: h.unsafe_chunk(2, 1), H, "abcdabcd"),
    "unbind": row(lambda h: h.unbind(1), H, NONE, "is taken apart by position"),
    "unbind of another dimension": row(lambda h: h.unbind(2), H, FREE),
    "unbind of a part": row(lambda h: h.unflatten(1, (2, -1)).unbind(1), H, "abcdabcd"),
    "select": row(lambda h: h[:, 0], H, NONE, "is selected by its position"),
    "select of another dimension": row(lambda h: h[:, :, -1], H, FREE),
    "select of a part": row(lambda h: h.unflatten(1, (2, -1))[:, 0], H, "abcdabcd"),
    "slice of everything": row(lambda h: h[:, : h.shape[1]], H, FREE),
    "slice of another dimension": row(lambda h: h[:, :, 1:], H, FREE),
    "slice by position": row(lambda h: h[:, 3:], H, NONE, BY_POSITION),
    "slice with steps": row(lambda h: h[:, ::2], H, NONE, BY_POSITION),
    "slice of one position": row(lambda h: h[:, :1], H, NONE, BY_POSITION),
    "slice of a part": row(lambda h: h.unflatten(1, (2, -1))[:, 1:], H, "abcdabcd"),
    "GLU by slices of its own size": row(
        lambda h: h[:, : h.shape[1] // 2] * h[:, h.shape[1] // 2 :].sigmoid(), H, "abcdabcd"
    ),
    "thirds by slices of its own size": row(
        lambda h: h[:, h.shape[1] // 3 : 2 * (h.shape[1] // 3)], given((2, 9, 3), 1), "abcabcabc"
    ),
    "slice of a written half": row(lambda h: h[:, :4], H, NONE, "holds a size or a position", trial=True),
    "halves swapped by written positions": row(
        lambda h: torch.cat([h[:, 4:], h[:, :4]], 1), H, NONE, "holds a size or a position", trial=True
    ),
    "halves swapped by positions of its own size": row(
        lambda h: torch.cat([h[:, h.shape[1] // 2 :], h[:, : h.shape[1] // 2]], 1), H, "abcdabcd"
    ),
    "narrow of another dimension": row(lambda h: h.narrow(2, 0, 2), H, FREE),
    "narrow_copy": row(lambda h: torch.narrow_copy(h, 2, 0, 1), H, FREE),
    "block_diag": row(torch.block_diag, given((2, 8), 1), given((2, 3)), NONE, "is laid out in blocks"),
}


@pytest.mark.parametrize("one", alone(ROWS))
def test_commutes_with_removal(one: Row) -> None:
    hold(one)


@pytest.mark.parametrize("one", in_models(ROWS))
def test_in_a_model(one: Row) -> None:
    hold_in_a_model(one)


def test_glu_has_a_unit_for_each_pair() -> None:
    structure = check_cut(linear_net(lambda net, h: F.glu(h), width=12, reads=6), torch.randn(2, 4))
    (group,) = structure.groups
    assert group.size == 6
    assert {(m.tensor, m.dim, m.index.shape[1]) for m in group.members} == {
        ("a.weight", 0, 2),
        ("a.bias", 0, 2),
        ("b.weight", 1, 1),
    }
    assert group.members[0].index[0].tolist() == [0, 6]


def test_repeated_concatenation_gives_a_unit_several_columns() -> None:
    structure = check_cut(linear_net(lambda net, h: torch.cat([h, h.relu()], 1), reads=16), torch.randn(2, 4))
    assert sizes(structure) == [8]
    assert structure.groups[0].consumers[0].index.shape == (8, 2)


def test_concatenated_layers_keep_groups_of_their_own() -> None:
    """DenseNet and U-Net: each operand of a concatenation loses its own units."""

    def between(net: torch.nn.Module, h: torch.Tensor) -> torch.Tensor:
        return torch.cat([h, F.relu(F.linear(h, net.w))], 1)

    structure = check_cut(linear_net(between, reads=13, w=torch.randn(5, 8)), torch.randn(2, 4))
    assert sizes(structure) == [5, 8]
