"""The proof: it finds what trained numbers hide, forgives summation order only, and leaves everything as it was."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from secateur.compaction.compact import compact, mask
from secateur.compaction.proof import TOLERANCE, TOLERANCE_FLOAT32, check_same, prove
from secateur.errors import CompactionError
from secateur.structure.example import Example
from secateur.structure.trace import trace


class TwoLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)

    def hidden(self, x: Tensor) -> Tensor:
        return self.first(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.hidden(x))


KEEP = {"first": torch.tensor([0, 2, 5])}
X = torch.zeros(2, 4)


def proven(net: nn.Module, x: Tensor = X, wrong: nn.Module | None = None):
    structure = trace(net, (x,))
    small = compact(net, structure, KEEP)
    return prove(net, wrong or small, structure, KEEP, (x,))


def test_right_cuts_agree_to_summation_order():
    proof = proven(TwoLayer())
    assert proof.precision is torch.float64
    assert proof.relative < 1e-14
    assert proof.difference == 0.0 or proof.difference < 1e-15
    assert len(proof.checked) == 5


def test_a_mistake_behind_zero_initialised_weights_is_found():
    """With its own numbers the second layer returns nothing, whatever the first one does."""

    class Wrong(TwoLayer):
        def hidden(self, x: Tensor) -> Tensor:
            return 2 * super().hidden(x)

    net = TwoLayer()
    nn.init.zeros_(net.second.weight)
    structure = trace(net, (X,))
    small = compact(net, structure, KEEP)
    small.__class__ = Wrong
    assert torch.equal(small(X), mask(net, structure, KEEP)(X))
    with pytest.raises(CompactionError, match="output 0 of the compact model differs by"):
        prove(net, small, structure, KEEP, (X,))


@pytest.mark.parametrize("condition", ["training", "grad", "batch"])
def test_a_mistake_in_one_setting_only_is_found(condition):
    class Wrong(TwoLayer):
        def hidden(self, x: Tensor) -> Tensor:
            wrong = {"training": self.training, "grad": torch.is_grad_enabled(), "batch": len(x) == 4}[condition]
            return super().hidden(x) + wrong

    net = TwoLayer()
    structure = trace(net, (X,))
    small = compact(net, structure, KEEP)
    small.__class__ = Wrong
    named = {"training": "training mode", "grad": "with grad", "batch": "doubled batch"}[condition]
    with pytest.raises(CompactionError, match=named):
        prove(net, small, structure, KEEP, (X,))


def test_a_small_relative_mistake_is_found():
    class Wrong(TwoLayer):
        def hidden(self, x: Tensor) -> Tensor:
            return (1 + 100 * TOLERANCE) * super().hidden(x)

    net = TwoLayer()
    structure = trace(net, (X,))
    small = compact(net, structure, KEEP)
    small.__class__ = Wrong
    with pytest.raises(CompactionError, match="differs"):
        prove(net, small, structure, KEEP, (X,))


def test_low_precision_inside_the_model_does_not_blur_the_comparison():
    class Casting(TwoLayer):
        def hidden(self, x: Tensor) -> Tensor:
            h = F.softmax(super().hidden(x).to(torch.bfloat16), dim=0, dtype=torch.float32)
            return h.half() + torch.ones(1, dtype=torch.float32)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.hidden(x).type_as(x))

    assert proven(Casting(), torch.randn(2, 4)).relative < 1e-14


class Single(TwoLayer):
    """A model with an operator that has no form in float64."""

    factor = 1.0

    def hidden(self, x: Tensor) -> Tensor:
        if x.dtype is torch.float64:
            raise RuntimeError("expected Float32")
        return super().hidden(x) * self.factor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_does_not_run_in_float64_is_compared_in_float32(dtype):
    net = Single().to(dtype)
    x = torch.randn(2, 4, dtype=dtype)
    structure = trace(net, (x,))
    small = compact(net, structure, KEEP)
    proof = prove(net, small, structure, KEEP, (x,))
    assert proof.precision is torch.float32
    assert proof.relative < 1e-5
    assert len(proof.checked) == 5
    small.factor = 1 + 10 * TOLERANCE_FLOAT32
    with pytest.raises(CompactionError, match="differs"):
        prove(net, small, structure, KEEP, (x,))


def test_dropout_of_every_kind_is_off():
    class Dropping(TwoLayer):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def hidden(self, x: Tensor) -> Tensor:
            h = self.drop(super().hidden(x))
            h = F.dropout(h, 0.3, training=self.training)
            # Heads of width one, so that the units are not the dimension that attention sums over.
            q = h.t()[:, :, None]
            return F.scaled_dot_product_attention(q, q, q, dropout_p=0.4 * self.training)[:, :, 0].t()

    assert proven(Dropping(), torch.randn(3, 4)).relative < 1e-13


def test_batches_that_batch_norm_cannot_train_on_are_doubled():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    structure = trace(net, (torch.randn(2, 4),))
    keep = {"0": torch.tensor([1, 2])}
    proof = prove(net, compact(net, structure, keep), structure, keep, (torch.randn(1, 4),))
    assert sum("training mode" in setting for setting in proof.checked) == 2
    assert len(proof.skipped) == 1
    assert "Expected more than 1 value per channel" in proof.skipped[0]


def test_all_examples_and_all_outputs_are_compared():
    class Branching(TwoLayer):
        def forward(self, x: Tensor, *, extra: Tensor | None = None) -> dict[str, list[Tensor]]:
            h = self.hidden(x)
            return {"logits": [self.second(h)], "more": [] if extra is None else [self.second(h) + extra]}

    class Wrong(Branching):
        def forward(self, x: Tensor, *, extra: Tensor | None = None) -> dict[str, list[Tensor]]:
            return super().forward(x, extra=None if extra is None else extra + 1)

    net = Branching()
    examples = [(X,), Example((X,), {"extra": torch.ones(2, 3)})]
    structure = trace(net, examples)
    small = compact(net, structure, KEEP, examples=examples)
    assert prove(net, small, structure, KEEP, examples).relative < 1e-14
    small.__class__ = Wrong
    with pytest.raises(CompactionError, match="output 1 of the compact model"):
        prove(net, small, structure, KEEP, examples)


def test_integer_outputs_must_be_equal():
    class Counting(TwoLayer):
        offset = 0

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), torch.arange(3) + self.offset

    net = Counting()
    structure = trace(net, (X,))
    small = compact(net, structure, KEEP)
    assert prove(net, small, structure, KEEP, (X,)).relative < 1e-14
    small.offset = 1
    with pytest.raises(CompactionError, match="output 1"):
        prove(net, small, structure, KEEP, (X,))


def test_positive_tensors_stay_positive_and_integers_stay():
    class Careful(TwoLayer):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("index", torch.tensor([2, 0, 1]))
            self.register_buffer("variance", torch.tensor([1.0, 0.0, 2.0]))
            self.register_buffer("limits", torch.tensor([0.0, -math.inf, 1.0]))

        def forward(self, x: Tensor) -> Tensor:
            assert (self.variance >= 0).all()
            assert self.limits[1] == -math.inf
            return (super().forward(x)[:, self.index] / (self.variance + 1).sqrt()).maximum(self.limits)

    proof = proven(Careful(), torch.randn(2, 4))
    assert proof.relative < 1e-14


def test_buffers_keep_their_numbers_where_drawn_ones_break_the_dense_model():
    class Indexing(TwoLayer):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("index", torch.tensor([2.0, 0.0, 1.0]))

        def forward(self, x: Tensor) -> Tensor:
            if not torch.equal(self.index, self.index.round()):
                raise ValueError("no position")
            return super().forward(x)[:, self.index.long()]

    net = Indexing()
    structure = trace(net, (torch.randn(2, 4),))
    proof = prove(net, compact(net, structure, KEEP), structure, KEEP, (torch.randn(2, 4),))
    assert len(proof.checked) == 5


def test_nothing_is_changed_by_a_proof():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3)).eval()
    x = torch.randn(2, 4)
    structure = trace(net, (x,))
    keep = {"0": torch.tensor([1, 2])}
    small = compact(net, structure, keep)
    before = copy.deepcopy((net.state_dict(), small.state_dict(), x, torch.get_rng_state()))
    prove(net, small, structure, keep, (x,))
    after = (net.state_dict(), small.state_dict(), x, torch.get_rng_state())
    for old, new in zip(before, after, strict=True):
        pairs = zip(old.values(), new.values(), strict=True) if isinstance(old, dict) else [(old, new)]
        assert all(torch.equal(a, b) for a, b in pairs)
    assert not net.training
    assert not small.training
    assert torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()


def test_a_model_that_was_cut_otherwise_is_refused():
    net = TwoLayer()
    structure = trace(net, (X,))
    other = compact(net, structure, {"first": torch.tensor([0, 2])})
    with pytest.raises(CompactionError, match=r"differs|was not cut from this model by this keep"):
        prove(net, other, structure, KEEP, (X,))


def test_another_output_shape_is_refused():
    class Longer(TwoLayer):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super().forward(x)] * 2, 1)

    net = TwoLayer()
    structure = trace(net, (X,))
    small = compact(net, structure, KEEP)
    small.__class__ = Longer
    with pytest.raises(CompactionError, match="returns shapes"):
        prove(net, small, structure, KEEP, (X,))


def test_examples_that_do_not_fit_are_told():
    net = TwoLayer()
    structure = trace(net, (X,))
    with pytest.raises(CompactionError, match="the dense model does not run on its examples"):
        prove(net, compact(net, structure, KEEP), structure, KEEP, (torch.zeros(2, 5),))


def test_without_numbers_there_is_nothing_but_shapes():
    with torch.device("meta"):
        net = TwoLayer()
    structure = trace(net, (X.to("meta"),))
    small = compact(net, structure, KEEP)
    proof = prove(net, small, structure, KEEP, (X.to("meta"),))
    assert math.isnan(proof.difference)
    assert len(proof.checked) == 1
    with FakeTensorMode():
        fake = TwoLayer()
    proof = prove(fake, compact(fake, structure, KEEP), structure, KEEP, (X,))
    assert not proof.checked


def test_a_wrong_member_is_found():
    """Two units swapped in the consumer: shapes agree, numbers do not."""
    net = TwoLayer()
    structure = trace(net, (X,))
    (group,) = structure.groups
    swapped = tuple(
        replace(member, index=member.index[[1, 0, *range(2, 6)]]) if member.consumer else member
        for member in group.members
    )
    wrong = replace(structure, groups=(replace(group, members=swapped),))
    with pytest.raises(CompactionError, match="please report it"):
        compact(net, wrong, KEEP, examples=(X,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rescaled_weights_may_be_rounded_in_their_own_dtype_but_not_be_wrong(dtype):
    net = nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6, eps=1e-5), nn.Linear(6, 3)).to(dtype)
    x = torch.randn(2, 4, dtype=dtype)
    structure = trace(net, (x,))
    keep = {"0": torch.tensor([1, 2])}
    small = compact(net, structure, keep)
    proof = prove(net, small, structure, keep, (x,))
    assert proof.redrawn < 1e-13
    assert proof.relative < 16 * torch.finfo(dtype).eps
    small[1].eps = 1e-5
    with pytest.raises(CompactionError, match="differs"):
        prove(net, small, structure, keep, (x,))


class NearlyEqual(nn.Module):
    """BatchNorm over rows that differ in their last digits alone, with next to no eps: all of it is rounding."""

    def __init__(self, apart: float) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 64), nn.Linear(64, 5), nn.Linear(5, 2)
        self.norm = nn.BatchNorm1d(5, eps=1e-300)
        self.apart = apart

    def out(self, x: Tensor) -> Tensor:
        return self.third(x)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        rows = torch.linspace(1, 2, len(h), dtype=h.dtype, device=h.device)[:, None]
        h = self.second(h[:1] * (1 + self.apart * rows**2))
        return self.out(self.norm(h))


class Off(NearlyEqual):
    def out(self, x: Tensor) -> Tensor:
        return super().out(x) * (1.05 if self.training else 1.0)


def nearly_equal(apart: float, kind: type[NearlyEqual] = NearlyEqual):
    torch.manual_seed(0)
    net = NearlyEqual(apart).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    structure = trace(net, (x,))
    keep = {"first": torch.arange(0, 64, 3)}
    small = compact(net, structure, keep)
    small.__class__ = kind
    return prove(net, small, structure, keep, (x,))


def test_rounding_that_the_dense_model_enlarges_itself_is_granted_in_training_mode():
    proof = nearly_equal(1e-8)
    assert TOLERANCE < proof.relative < 1e-4
    assert len(proof.checked) == 5
    assert not proof.skipped


def test_what_is_wrong_is_found_in_an_ill_conditioned_model_as_well():
    with pytest.raises(CompactionError, match=r"in training mode, .* differs"):
        nearly_equal(1e-8, Off)


def test_where_all_is_rounding_nothing_is_said_of_training_mode():
    proof = nearly_equal(1e-15)
    assert len(proof.checked) == 3
    assert "last place" in proof.skipped[0]
    assert proof.relative <= TOLERANCE


class Inside(TwoLayer):
    """Computes in float32 whatever it is converted to, or in float64 not at all."""

    def __init__(self, refuses: str = "") -> None:
        super().__init__()
        self.refuses = refuses

    def forward(self, x: Tensor) -> Tensor:
        if str(x.dtype) in self.refuses:
            raise NotImplementedError
        return self.second(self.hidden(x).float().to(x.dtype))


@pytest.mark.parametrize("refuses", ["", "torch.float64"])
def test_two_models_are_held_against_each_other_whatever_they_round_inside(refuses: str) -> None:
    torch.manual_seed(0)
    net, x = Inside(refuses), torch.randn(5, 4)

    def pair(dtype: torch.dtype, off: float = 0.0) -> tuple[nn.Module, nn.Module]:
        first, second = (copy.deepcopy(net).to(dtype) for _ in range(2))
        with torch.no_grad():  # the same function, which rounds elsewhere
            second.first.weight.mul_(3)
            second.first.bias.mul_(3)
            second.second.weight.div_(3)
            second.second.bias.add_(off)
        return first, second

    check_same(pair, (x,))
    with pytest.raises(CompactionError, match="output 0 of the compact model differs by"):
        check_same(lambda dtype: pair(dtype, 0.01), (x,))


def test_a_model_that_runs_in_neither_precision_is_none_to_compare() -> None:
    net = Inside("torch.float64, torch.float32")
    with pytest.raises(CompactionError, match=r"does not run on its examples: .*NotImplementedError"):
        check_same(lambda dtype: (copy.deepcopy(net).to(dtype), net), (X,))
