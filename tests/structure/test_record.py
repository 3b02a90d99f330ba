"""One recorded run: entries, modules, scalars, and labels after writes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.law import check_cut, linear_net, sizes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import secateur as sc
from secateur.structure.coupling import Coupling
from secateur.structure.ids import Factor, Label
from secateur.structure.record import Leaving, Recorder, watch
from secateur.structure.rulings import Rulings

UNITS = np.arange(1, 5)


def labelled(recorder: Recorder, tensor: Tensor, dim: int) -> Tensor:
    recorder.set_label(tensor, Label(tuple(tensor.shape), (Factor((dim,), UNITS),), data=True))
    return tensor


def recorder() -> Recorder:
    return Recorder(Rulings(Coupling(n_ids=5, first_made=5)))


def frozen(one: Recorder) -> set[str]:
    """Reasons for which any of the four units is frozen."""
    solution = one.coupling.solve()
    numbers = solution.frozen[solution.component[UNITS]]
    return {solution.freezes[number].reason for number in numbers if number >= 0}


def test_entries_name_operator_and_module() -> None:
    model = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), act=nn.ReLU(inplace=True)))
    one = recorder()
    x = torch.zeros(2, 4)
    with watch(model, one), one:
        model(x)
    assert [(e.operator, e.module) for e in one.entries if e.operator != "t"] == [("addmm", "first"), ("relu", "act")]
    assert one.stack == []


def test_hooks_are_gone_after_watching() -> None:
    model = nn.Linear(4, 4)
    with watch(model, recorder()):
        pass
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_scalars_that_are_no_sizes_are_kept_for_comparison() -> None:
    one = recorder()
    with one:
        x = torch.zeros(2, 4)
        F.leaky_relu(x * 3, 0.25).view(4, 2)
    kept = {e.operator: dict(e.scalars) for e in one.entries if all(len(s) == 2 for s in e.scalars)}
    assert kept["mul"] == {"other": 3}
    assert kept["leaky_relu"] == {"negative_slope": 0.25}
    assert kept["view"] == {}


def test_the_numbers_of_small_constants_are_kept() -> None:
    """A size may be among them."""
    one = recorder()
    with FakeTensorMode(allow_non_fake_inputs=True), one:
        torch.tensor([1.0, 5.0]) * 2
    assert ("1.0", "5.0") in [e.scalars for e in one.entries]


def test_an_unknown_tensor_is_a_constant() -> None:
    label = recorder().label(torch.zeros(2, 3))
    assert (label.shape, label.factors, label.neutral) == ((2, 3), (), False)


def test_an_operator_without_a_rule_freezes_what_it_meets() -> None:
    one = recorder()
    x = labelled(one, torch.rand(4, 4), 0)
    with one:
        torch.linalg.qr(x)
    assert any("which has no rule" in reason for reason in frozen(one))


def test_a_form_that_a_rule_does_not_cover_freezes_what_it_meets() -> None:
    one = recorder()
    x = labelled(one, torch.rand(2, 4), 1)
    with one:
        torch.ops.aten._pack_padded_sequence(x[:, :, None], torch.tensor([4, 3]), True)
    assert frozen(one)


def test_a_number_that_is_read_out_freezes_what_it_was_read_from() -> None:
    one = recorder()
    x = labelled(one, torch.rand(4), 0)
    with one:
        x.max().item()
    assert "is reduced over (max)" in frozen(one)


@pytest.mark.parametrize("way", ["numpy", "__array__", "tolist"])
def test_numbers_that_leave_torch_freeze_what_they_were_read_from(way: str) -> None:
    one = recorder()
    x = labelled(one, torch.rand(4), 0)
    with Leaving(one), one:
        np.asarray(x) if way == "__array__" else getattr(x, way)()
    assert f"is read out of the model as numbers ({way})" in frozen(one)


def test_data_makes_data_and_nothing_computed_from_it_is_a_weight() -> None:
    one = recorder()
    w, x = torch.rand(4), torch.rand(4)
    one.set_label(w, Label((4,), (Factor((0,), UNITS),), weight=True))
    one.set_label(x, Label((4,), data=True))
    with one:
        scaled, mixed = w * 2, w * x
    assert (one.label(scaled).weight, one.label(scaled).data) == (True, False)
    assert (one.label(mixed).weight, one.label(mixed).data) == (False, True)


class TestWrites:
    """In-place writes, seen through every tensor that looks at the storage."""

    def test_the_same_elements_get_the_same_label(self) -> None:
        one = recorder()
        with one:
            base = torch.zeros(2, 4)
            view = base.view(2, 4)
            view.copy_(labelled(one, torch.rand(2, 4), 1))
        assert one.label(base).ids_along(1).tolist() == UNITS.tolist()

    def test_a_whole_dimension_written_at_one_place_labels_the_base(self) -> None:
        one = recorder()
        with one:
            base = torch.zeros(3, 4)
            base[1].copy_(labelled(one, torch.rand(4), 0))
        label = one.label(base)
        assert label.ids_along(1).tolist() == UNITS.tolist()
        assert not label.neutral
        assert not frozen(one)

    def test_a_part_of_a_dimension_freezes(self) -> None:
        one = recorder()
        with one:
            base = torch.zeros(2, 9)
            base[:, 3:7].copy_(labelled(one, torch.rand(2, 4), 1))
        assert len(frozen(one)) > 0

    def test_a_view_of_other_elements_is_not_taken_for_the_same(self) -> None:
        """Two halves have one shape and one stride."""
        one = recorder()
        with one:
            base = torch.zeros(2, 8)
            left, right = base[:, :4], base[:, 4:]
            left.copy_(labelled(one, torch.rand(2, 4), 1))
        assert right.shape == left.shape
        assert right.stride() == left.stride()
        assert "is written through a view of another tensor" in frozen(one)

    def test_another_shape_of_a_tensor_in_place_is_no_write(self) -> None:
        one = recorder()
        x = labelled(one, torch.rand(4, 1), 0)
        with one:
            x.squeeze_(1)
        assert one.label(x).shape == (4,)
        assert one.label(x).ids_along(0).tolist() == UNITS.tolist()

    def test_statistics_that_an_operator_updates_keep_their_units(self) -> None:
        one = recorder()
        x = labelled(one, torch.rand(5, 4), 1)
        mean, var = torch.zeros(4), torch.ones(4)
        one.set_label(mean, Label((4,), (Factor((0,), UNITS),)))
        with one:
            F.batch_norm(x, mean, var, training=True)
        assert one.label(mean).ids_along(0).tolist() == UNITS.tolist()


def test_labels_of_living_tensors_are_found_and_dead_ones_are_not() -> None:
    one = recorder()
    kept = labelled(one, torch.rand(4), 0)
    labelled(one, torch.rand(4), 0)
    assert len(one.alive(besides=frozenset())) == 1
    assert one.alive(besides={id(kept)}) == []


class Compiled(nn.Module):
    """A network that compiled a function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
        self.between = torch.compile(_between, backend="eager", fullgraph=True)

    def forward(self, x: Tensor) -> Tensor:
        """One hidden layer."""
        return self.second(self.between(self.first(x)))


def _between(h: Tensor) -> Tensor:
    return torch.relu(h) * 2 + torch.tanh(h)


def test_what_a_model_compiled_is_traced_as_written_and_nothing_is_compiled() -> None:
    counted = torch._dynamo.utils.counters["frames"]
    before = dict(counted)
    assert sc.trace(Compiled(), (torch.zeros(3, 4),)).group("first").size == 8
    assert dict(counted) == before


def test_a_forward_derivative_is_traced_and_frozen_for_what_it_does() -> None:
    """That torch compares the sizes of two storages reads no number out of the model."""

    def derivative(of: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        (slope,) = torch.func.jvp(of, (h,), (torch.ones_like(h),))[1:]
        return slope

    by_element = check_cut(linear_net(lambda net, h: derivative(torch.sin, h)), torch.randn(2, 4))
    assert sizes(by_element) == [8]
    net = linear_net(lambda net, h: derivative(lambda z: z @ net.w, h), reads=6, w=torch.randn(8, 6))
    assert "product of two activations" in check_cut(net, torch.randn(2, 4)).why_frozen("a.weight")
