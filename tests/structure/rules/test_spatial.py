"""Pooling, interpolation, sampling and windows: channels pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.law import Row, alone, given, hold, hold_in_a_model, in_models, law, row

ONE = given((2, 8, 6), 1)
TWO = given((2, 8, 4, 4), 1)
THREE = given((2, 8, 4, 4, 4), 1)
FREE = "abcdefgh"
NONE = "........"

#: Functions of ``torch.nn.functional`` with their arguments, for 1 to 3 spatial dimensions.
INSIDE_A_CHANNEL = {
    "max_pool{}d": (2,),
    "avg_pool{}d": (2,),
    "adaptive_avg_pool{}d": (1,),
    "adaptive_max_pool{}d": (2,),
    "lp_pool{}d": (2, 2),
}
MODES = {
    1: ("nearest", "linear", "area", "nearest-exact"),
    2: ("nearest", "bilinear", "bicubic", "area", "nearest-exact"),
    3: ("nearest", "trilinear", "area", "nearest-exact"),
}


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", INSIDE_A_CHANNEL)
def test_pooling(name: str, n: int) -> None:
    function, args = getattr(F, name.format(n), None), INSIDE_A_CHANNEL[name]
    if function is None:
        pytest.skip("torch has no such pooling")
    assert law(lambda h: function(h, *args), (ONE, TWO, THREE)[n - 1], seeds=range(2)).patterns() == (FREE,)


@pytest.mark.parametrize(("n", "mode"), [(n, mode) for n in MODES for mode in MODES[n]])
def test_interpolation(n: int, mode: str) -> None:
    h = (ONE, TWO, THREE)[n - 1]
    assert law(lambda h: F.interpolate(h, scale_factor=2.0, mode=mode), h, seeds=range(2)).patterns() == (FREE,)


ROWS: dict[str, Row] = {
    "max_pool2d": row(lambda h: F.max_pool2d(h, 2), TWO, FREE),
    "max_pool2d with places": row(lambda h: F.max_pool2d(h, 2, return_indices=True), TWO, FREE),
    "adaptive pooling to one place": row(lambda h: F.adaptive_avg_pool2d(h, 1).flatten(1), TWO, FREE),
    "pooling without a batch": row(lambda h: F.avg_pool2d(h, 2), given((8, 4, 4), 0), FREE),
    "pooling along units": row(lambda h: F.avg_pool1d(h, 2), given((2, 6, 8), 2), NONE, "is a spatial dimension"),
    "unpooling": row(lambda h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2), TWO, FREE),
    "upsampling": row(lambda h: F.interpolate(h, scale_factor=2.0, mode="bilinear"), TWO, FREE),
    "antialiasing": row(lambda h: F.interpolate(h, size=(3, 3), mode="bilinear", antialias=True), TWO, FREE),
    "grid_sample": row(
        lambda h, g: F.grid_sample(h, g.tanh(), align_corners=False), TWO, given((2, 3, 3, 2)), FREE
    ),
    "grid_sample in three dimensions": row(
        lambda h, g: F.grid_sample(h, g.tanh(), align_corners=False), THREE, given((2, 3, 3, 3, 3)), FREE
    ),
    "coordinates of grid_sample": row(
        lambda h, g: F.grid_sample(h, g.tanh(), align_corners=False), TWO, given((2, 3, 3, 2), 3), FREE, "..",
        "is a coordinate",
    ),
    "spatial transformer": row(
        lambda h, t: F.grid_sample(h, F.affine_grid(t.view(2, 2, 3), (2, 1, 3, 3), False), align_corners=False),
        TWO, given((2, 6), 1), FREE, "......", "is a coordinate",
    ),
    "unfold": row(lambda h: F.unfold(h, 2), TWO, FREE),
    "fold": row(lambda h: F.fold(h, (4, 4), 2, stride=2), given((2, 8, 4), 1), "aaaabbbb"),
    "unfold and fold": row(lambda h: F.fold(F.unfold(h, 2), (4, 4), 2), TWO, FREE),
}  # fmt: skip


@pytest.mark.parametrize("one", alone(ROWS))
def test_commutes_with_removal(one: Row) -> None:
    hold(one)


@pytest.mark.parametrize("one", in_models(ROWS))
def test_in_a_model(one: Row) -> None:
    hold_in_a_model(one)


def test_random_places_freeze() -> None:
    places = torch.rand(2, 8, 2, dtype=torch.float64)
    verdict = law(lambda h: F.fractional_max_pool2d(h, 2, (2, 2), _random_samples=places), TWO)
    assert verdict.patterns() == (NONE,)
    assert verdict.reasons() == {"is pooled at random places"}
