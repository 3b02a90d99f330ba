"""RMSNorms without an eps of their own: torch's depends on the type, and a cut makes a number of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.law import check_cut
from torch import Tensor, nn

import secateur as sc
from secateur.compaction.proof import prove
from secateur.structure.eps import default_eps

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KEEP = {"embed": torch.tensor([1, 2, 4]), "up": torch.tensor([0, 3])}
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Stream(nn.Module):
    """A residual stream that two RMSNorms without eps average over, and one with units of its own between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Linear(3, 6), nn.RMSNorm(6)
        self.up, self.mid, self.down = nn.Linear(6, 5), nn.RMSNorm(5), nn.Linear(5, 6)
        self.last, self.out = nn.RMSNorm(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.down(torch.relu(self.mid(self.up(self.first(h)))))
        return self.out(self.last(h))


def stream(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Stream:
    """A model with numbers of some size: with small ones, the eps matters."""
    torch.manual_seed(0)
    net = Stream()
    with torch.no_grad():
        for parameter in net.embed.parameters():
            parameter.mul_(scale)
    return net.to(dtype)


def small_scale(dtype: torch.dtype) -> float:
    """The size of inputs whose mean square is about the eps."""
    return float(default_eps(dtype) ** 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cut_gives_such_norms_the_eps_of_their_type_times_the_ratio_of_widths(dtype: torch.dtype) -> None:
    net = stream(dtype)
    structure = sc.trace(net, (X.to(dtype),))
    assert [group.name for group in structure.groups] == ["embed", "up"]
    small = sc.compact(net, structure, KEEP)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert small.first.eps == small.last.eps == eps * 6 / 3
    assert small.mid.eps == eps * 5 / 2
    assert net.first.eps is None


def test_a_norm_that_keeps_its_width_keeps_having_none() -> None:
    net = stream()
    structure = sc.trace(net, (X,))
    small = sc.compact(net, structure, {"up": torch.tensor([0, 3])}, examples=(X,))
    assert small.first.eps is None
    assert small.mid.eps == default_eps(torch.float32) * 5 / 2


@pytest.mark.parametrize("scale", [1.0, None])
def test_masked_equals_compact_in_float64(scale: float | None) -> None:
    scale = small_scale(torch.float64) if scale is None else scale
    net = stream(torch.float64, scale)
    x = X.double()
    structure = check_cut(net, x)
    masked, small = sc.mask(net, structure, KEEP), sc.compact(net, structure, KEEP, examples=(x,))
    for training in (False, True):
        torch.testing.assert_close(small.train(training)(x), masked.train(training)(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, None])
def test_the_proof_compares_with_the_eps_of_the_models_own_type(dtype: torch.dtype, scale: float | None) -> None:
    scale = small_scale(dtype) if scale is None else scale
    net, x = stream(dtype, scale), X.to(dtype)
    structure = sc.trace(net, (x,))
    small = sc.compact(net, structure, KEEP, examples=(x,))
    proof = prove(net, small, structure, KEEP, (x,))
    assert proof.redrawn < 1e-10
    assert proof.relative < 16 * torch.finfo(dtype).eps
    small.last.eps = 0.1
    with pytest.raises(sc.CompactionError, match="differs"):
        prove(net, small, structure, KEEP, (x,))


def test_the_masked_copy_stays_what_was_cut_in_any_type() -> None:
    net = stream(torch.float32, small_scale(torch.float32))
    structure = sc.trace(net, (X,))
    masked, small = sc.mask(net, structure, KEEP), sc.compact(net, structure, KEEP)
    torch.testing.assert_close(small.double()(X.double()), masked.double()(X.double()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("own", [None, 1e-4])
def test_the_eps_is_the_one_that_the_model_has_when_it_is_cut(own: float | None) -> None:
    structure = sc.trace(stream(torch.float32), (X,))
    net = stream(torch.float64)
    net.first.eps = own
    small = sc.compact(net, structure, KEEP, examples=(X.double(),))
    assert small.first.eps == (default_eps(torch.float64) if own is None else own) * 2
    assert small.last.eps == default_eps(torch.float64) * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_such_norms_are_cut_twice_and_kept_in_a_file(dtype: torch.dtype, tmp_path: Path) -> None:
    net, x = stream(dtype, small_scale(dtype)), X.to(dtype)
    first = sc.compact(net, sc.trace(net, (x,)), {"embed": torch.tensor([0, 1, 2, 4])}, examples=(x,))
    again = sc.trace(first, (x,))
    second = sc.compact(first, again, {"embed": torch.tensor([1, 3]), "up": torch.tensor([0, 3])}, examples=(x,))
    eps = default_eps(dtype)
    assert (second.first.eps, second.mid.eps) == (pytest.approx(eps * 3), pytest.approx(eps * 5 / 2))
    at_once = sc.compact(net, sc.trace(net, (x,)), {"embed": torch.tensor([1, 4]), "up": torch.tensor([0, 3])})
    torch.testing.assert_close(second(x), at_once(x))
    sc.save(second, tmp_path / "small.safetensors")
    loaded = sc.load(tmp_path / "small.safetensors", Stream())
    assert loaded.first.eps == second.first.eps
    assert torch.equal(loaded(x), second(x))


def test_widths_that_are_rounded_up_to_the_whole_are_proven_too() -> None:
    net = stream(torch.float32, small_scale(torch.float32))
    structure = sc.trace(net, (X,))
    small = sc.compact(net, structure, KEEP, round_to=6, examples=(X,))
    assert small.first.normalized_shape == (6,)
    torch.testing.assert_close(small(X), sc.mask(net, structure, KEEP)(X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_such_norms_train_with_gates_and_are_finalized(dtype: torch.dtype) -> None:
    net, x = stream(dtype, small_scale(dtype)), X.to(dtype)
    pruner = sc.attach(net, examples=(x,), method=sc.HardConcrete(init_open=0.5))
    optimizer = torch.optim.SGD(pruner.param_groups(lr=1e-3))
    for _ in range(3):
        optimizer.zero_grad()
        pruner.backward(lambda: net(x).float().square().mean())
        optimizer.step()
        pruner.step()
        pruner.shrink(optimizer)
    assert net.first.eps is None
    with torch.no_grad():
        pruner.gates.rules[0].log_alpha.copy_(torch.tensor([-4.0, 4, 0, 1, -4, 2, 4, 4, -4, 0.5, 1]))
    small, report = pruner.finalize()
    assert (small.embed.out_features, small.up.out_features) == (4, 4)
    assert small.first.eps == default_eps(dtype) * 6 / 4
    assert report.difference_float64 <= 1e-10
    assert report.difference_float32 <= {torch.bfloat16: 0.05}.get(dtype, 1e-5)


def test_an_input_of_another_type_than_the_weights_keeps_the_width() -> None:
    """Which eps torch takes there is not known from the weight: nothing is cut."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(4, 8), nn.RMSNorm(8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.norm(self.up(x).double()).float())

    structure = sc.trace(Mixed(), (torch.randn(2, 4),))
    assert not structure.groups
    assert "mean" in structure.why_frozen("norm")
