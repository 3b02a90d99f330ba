"""Fourier transforms and complex weights."""

from __future__ import annotations

import pytest
import torch
from tests.law import Row, alone, given, hold, hold_in_a_model, in_models, row

H = given((3, 8), 1)
FREE = "abcdefgh"

ROWS: dict[str, Row] = {
    "fft": row(lambda a: torch.fft.fft(a, dim=0).real, H, FREE),
    "fft of units": row(lambda a: torch.fft.fft(a, dim=1).abs(), H, "........", "is mixed by a Fourier transform"),
    "real transforms": row(lambda a: torch.fft.irfft(torch.fft.rfft(a, dim=0), n=3, dim=0), H, FREE),
    "two dimensions": row(lambda a: torch.fft.fft2(a, dim=(0, 2)).real, given((3, 8, 4), 1), FREE),
    "a complex filter": row(
        lambda a, w: torch.view_as_real(torch.fft.rfft(a, dim=0) * torch.view_as_complex(w)),
        H,
        given((8, 2), 0, weight=True),
        FREE,
        FREE,
    ),
    "complex rotary embedding": row(
        lambda a: torch.view_as_real(
            torch.view_as_complex(a.unflatten(-1, (-1, 2)).contiguous())
            * torch.exp(1j * torch.arange(3.0))[:, None, None]
        ).flatten(-2),
        given((2, 3, 5, 8), 2),
        "abcde",
    ),
}


@pytest.mark.parametrize("one", alone(ROWS))
def test_commutes_with_removal(one: Row) -> None:
    hold(one)


@pytest.mark.parametrize("one", in_models(ROWS))
def test_in_a_model(one: Row) -> None:
    hold_in_a_model(one)
