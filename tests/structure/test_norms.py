"""Which modules are RMSNorms, by what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.structure.norms import RmsNorm, find_rms_norms

D = 8


class Norm(nn.Module):
    """An RMSNorm that is written out, over the dimensions given."""

    def __init__(self, d: int = D, eps: float | None = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def normed(self, x: Tensor, dim: int = -1) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x) * self.weight


class OverChannels(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x, 1) * self.weight.view(1, -1, *[1] * (x.dim() - 2))


class OfThree(Norm):
    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        return self.normed(x.reshape(b * t, d)).view(b, t, d) * self.weight


class ByRank(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return (
            self.normed(x.movedim(1, -1)).movedim(-1, 1) * self.weight[:, None, None]
            if x.dim() == 4
            else (super().forward(x))
        )


class PlusOne(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x) * (1 + self.weight)


class InFloat32(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.normed(x.float()).to(x.dtype)


class ToFloat32(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x.float()) * self.weight.float()


class Chosen(Norm):
    """Subtracts the mean or not, as an attribute says."""

    def __init__(self, centred: bool) -> None:
        super().__init__()
        self.centred = centred

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True) if self.centred else x)


class InTraining(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (0.1 * self.weight if self.training else 0)


class Random(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand_like(x)


class Remembers(Norm):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach().mean()
        return super().forward(x)


class Counts(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.ndim)
        return super().forward(x)


class InPlace(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)).mul(self.weight)


class AtLeast(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + max(self.eps, 1e-4)) * self.weight


class OwnTypes(Norm):
    """Takes the eps of its input's own type where it has none: in bfloat16 not torch's."""

    def forward(self, x: Tensor) -> Tensor:
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * self.weight


class Fixed(nn.RMSNorm):
    """Hands its eps on, None or not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.rms_norm(x, self.normalized_shape, self.weight, self.eps)


def found(module: nn.Module) -> RmsNorm | None:
    return find_rms_norms(nn.Sequential(module)).get("0")


ANY = {1, 2, 3, 4, 5}
ARE: dict[str, tuple[Callable[[], nn.Module], set[int]]] = {
    "written out": (Norm, ANY),
    "torch's": (lambda: nn.RMSNorm(D, eps=1e-5), ANY),
    "torch's without eps": (lambda: nn.RMSNorm(D), ANY),
    "handed on": (lambda: Fixed(D), ANY),
    "three dimensions only": (OfThree, {3}),
    "dimension 1": (OverChannels, {2}),
    "dimension 1 of four": (ByRank, {1, 2, 3, 5}),
    "in float32": (InFloat32, ANY),
    "one wide as the leading sizes": (lambda: Norm(2), ANY),
    "not centred": (lambda: Chosen(False), ANY),
}
ARE_NOT: dict[str, Callable[[], nn.Module]] = {
    "in training only": InTraining,
    "random": Random,
    "remembers": Remembers,
    "counts": Counts,
    "in place": InPlace,
    "eps of at least": AtLeast,
    "eps of its own types": lambda: OwnTypes(eps=None),
    "without a weight": lambda: nn.RMSNorm(D, elementwise_affine=False),
    "of two dimensions": lambda: nn.RMSNorm((3, D)),
    "centred": lambda: Chosen(True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARE)
def test_norms_are_known_with_the_ranks_that_they_normalise_over_the_last_dimension_of(
    name: str, dtype: torch.dtype
) -> None:
    make, ranks = ARE[name]
    norm = found(make().to(dtype))
    assert norm is not None
    assert (norm.weight, norm.eps, norm.kind.offset) == ("0.weight", "0.eps", 0.0)
    assert norm.kind.ranks == ranks
    assert norm.kind.results[dtype] == dtype


@pytest.mark.parametrize("name", ARE_NOT)
def test_what_computes_anything_else_is_no_norm(name: str) -> None:
    assert found(ARE_NOT[name]()) is None


def test_an_offset_is_found() -> None:
    norm = found(PlusOne())
    assert norm is not None
    assert norm.kind.offset == 1.0


@pytest.mark.parametrize(
    ("dtype", "eps"),
    [
        (torch.float64, torch.finfo(torch.float64).eps),
        *((dtype, torch.finfo(torch.float32).eps) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    ],
)
def test_a_norm_without_eps_has_torchs_for_the_type_in_which_it_computes(dtype: torch.dtype, eps: float) -> None:
    norm = found(nn.RMSNorm(D, dtype=dtype))
    assert norm is not None
    assert norm.eps_value == eps
    # Of no other number: an input of the other kind is not what was found out about.
    assert (torch.float64 in norm.kind.results) == (dtype == torch.float64)


def test_the_type_of_the_output_is_the_modules_own() -> None:
    norm = found(ToFloat32().bfloat16())
    assert norm is not None
    assert norm.kind.results[torch.bfloat16] == torch.float32
    mixed = found(nn.RMSNorm(D, eps=1e-5))
    assert mixed is not None
    assert mixed.kind.results[torch.bfloat16] == torch.bfloat16


def test_modules_of_one_class_with_other_settings_are_tried_by_themselves() -> None:
    assert list(find_rms_norms(nn.Sequential(Chosen(False), Chosen(True), Chosen(False)))) == ["0", "2"]


def test_looking_for_norms_calls_no_hook_draws_no_number_and_changes_nothing() -> None:
    calls: list[Any] = []
    net = nn.Sequential(Norm(), Random(), nn.RMSNorm(D)).eval()
    for module in net:
        module.register_forward_hook(lambda *_: calls.append(1))
    state, before = torch.get_rng_state(), [dict(vars(module)) for module in net]
    find_rms_norms(net)
    assert not calls
    assert torch.equal(state, torch.get_rng_state())
    assert [dict(vars(module)) for module in net] == before


def test_norms_without_numbers_are_known() -> None:
    assert found(nn.RMSNorm(D, device="meta")) is not None
