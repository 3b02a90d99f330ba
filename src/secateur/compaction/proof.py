"""The numerical proof of a cut: the masked and the compact model, side by side in float64.

Trained numbers can hide a mistake: a layer that starts at zero, a bias that is zero, an input of zeros. So the
models are compared twice, with their own numbers and with every floating parameter and buffer drawn anew.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

from secateur.compaction.distance import distance
from secateur.compaction.exact import Exact
from secateur.compaction.mask import checked_keep, copied, mask, mask_tensors_, plan_of
from secateur.compaction.redraw import load_cut_, nudge_, redraw_
from secateur.errors import CompactionError
from secateur.structure.cut import CutPlan
from secateur.structure.eps import settle_eps_
from secateur.structure.example import Example, Examples, as_examples
from secateur.structure.groups import Keep
from secateur.structure.nested import tensors_in
from secateur.structure.outside import nothing_left
from secateur.structure.rounding import rounded_keep
from secateur.structure.structure import Structure
from secateur.structure.tensors import in_place_of, named_tensors, slots_of

__all__ = ["TOLERANCE", "TOLERANCE_FLOAT32", "Proof", "check_same", "prove"]

M = TypeVar("M", bound=nn.Module)

#: Largest difference, relative to the largest value of an output, that summing in another order is granted.
TOLERANCE = 1e-8
#: The same where a model has operators that do not run in float64, and is compared in float32.
TOLERANCE_FLOAT32 = 1e-3
#: Units in the last place of a rescaled weight's own dtype that its rounding may move an output by (RMSNorm).
N_ROUNDINGS = 16
#: In training mode, how many times as far as the dense model itself moves, where its numbers change in the last place,
#: the compact one may be from it: sums in another order round more often than one change of each number.
N_SWINGS = 16
#: A comparison that grants more than this share of an output says nothing.
LEAST_SAID = 1e-2
_SWINGS = "the dense model moves too far where its numbers change in the last place for a comparison to say anything"


@dataclass(frozen=True)
class Proof:
    """How far apart the masked and the compact model are; NaN where there are no numbers.

    Args:
        difference: largest absolute difference of any output, with the models' own numbers.
        redrawn: the same with every floating parameter and buffer drawn anew.
        relative: the largest of both kinds relative to the largest value of its output; at most `TOLERANCE`, but with
            the model's own numbers at most what their rounding explains where the cut rescales weights, and in
            training mode at most `N_SWINGS` times what the dense model itself moves by where its numbers change in
            the last place.
        checked: the settings that were compared.
        skipped: those that the dense model itself cannot run, each with its error, or in which it is so
            ill-conditioned that a comparison says nothing.
        precision: in which all of it was computed: ``torch.float64``, or ``torch.float32`` for a model with operators
            that do not run in it; the tolerance then is `TOLERANCE_FLOAT32`.
    """

    difference: float
    redrawn: float
    relative: float
    checked: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    precision: torch.dtype = torch.float64


class _Precision(NamedTuple):
    """What every lower precision is raised to, and the difference that is granted in it."""

    real: torch.dtype
    tolerance: float
    raised: dict[torch.dtype, torch.dtype]

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor in this precision, if it was in a lower one."""
        return tensor.to(self.raised.get(tensor.dtype, tensor.dtype))

    def inputs(self, example: Example) -> Example:
        """The example in this precision."""
        return Example(*_mapped(lambda tensor: self.of(tensor.detach()), example))

    def module_(self, module: M) -> M:
        """The module in this precision, in place; tied tensors stay tied."""
        made: dict[int, Tensor] = {}
        for slot in slots_of(module).values():
            if slot.tensor.dtype in self.raised:
                if id(slot.tensor) not in made:
                    made[id(slot.tensor)] = in_place_of(slot.tensor, self.of(slot.tensor.detach()))
                setattr(slot.owner, slot.key, made[id(slot.tensor)])
        return module


_LOW = dict.fromkeys((torch.float16, torch.bfloat16), torch.float32) | {torch.complex32: torch.complex64}
_LOWER = dict.fromkeys((*_LOW, torch.float32), torch.float64)
_LOWER |= dict.fromkeys((torch.complex32, torch.complex64), torch.complex128)
_PRECISIONS = (_Precision(torch.float64, TOLERANCE, _LOWER), _Precision(torch.float32, TOLERANCE_FLOAT32, _LOW))


class Setting(NamedTuple):
    """One way to call a model."""

    training: bool
    grad: bool
    doubled: bool

    def __str__(self) -> str:
        mode, grad = "training" if self.training else "evaluation", "with" if self.grad else "without"
        return f"{mode} mode, {grad} grad, {'doubled' if self.doubled else 'given'} batch"


#: Every pair of a mode, grad and batch occurs: what two of them provoke together is seen in half of the eight runs.
SETTINGS = (
    Setting(training=False, grad=False, doubled=False),
    Setting(training=False, grad=True, doubled=True),
    Setting(training=True, grad=True, doubled=False),
    Setting(training=True, grad=False, doubled=True),
)


def prove(
    model: nn.Module,
    small: nn.Module,
    structure: Structure,
    keep: Keep,
    examples: Examples,
    *,
    round_to: int = 1,
    seed: int = 0,
) -> Proof:
    """Prove on copies in float64 that the compact model computes what the masked one computes.

    Casts to a lower precision inside the models are raised and dropout is off, so that in training mode too
    nothing but the order of summation may differ. On ``meta`` tensors the shapes of the outputs are compared.

    Args:
        model: the dense model, its closed units zero or not.
        small: the compact model.
        structure: of the dense model.
        keep: kept units by group name.
        examples: inputs; where they are zero everywhere, they are drawn anew together with the parameters.
        round_to: number to whose multiples the compact model's widths were rounded.
        seed: of all that is drawn.

    Raises:
        CompactionError: an output differs by more than `TOLERANCE`, or the compact model fails where the dense one
            runs.
    """
    kept = checked_keep(structure, keep)
    if any(isinstance(tensor, FakeTensor) for tensor in named_tensors(model).values()):
        return Proof(math.nan, math.nan, math.nan, (), ("fake tensors have no numbers to compare",))
    with nothing_left(model):
        return _proven(model, small, structure, kept, as_examples(examples), round_to, seed)


def _proven(
    model: nn.Module,
    small: nn.Module,
    structure: Structure,
    kept: Keep,
    examples: Sequence[Example],
    round_to: int,
    seed: int,
) -> Proof:
    plan = plan_of(structure, rounded_keep(structure, kept, round_to))
    for precision in _PRECISIONS:
        calls = tuple(precision.inputs(example) for example in examples)
        twin = copied(small)
        settle_eps_(twin, structure.norms)  # as mask does, before the type changes
        pair = _Pair(precision.module_(mask(model, structure, kept)), precision.module_(twin), precision, seed)
        rounded = precision._replace(tolerance=max(precision.tolerance, N_ROUNDINGS * _rounding(model, plan)))
        own = pair._replace(precision=rounded).compare(calls, SETTINGS[:1])
        if own.checked:
            break
    else:
        raise CompactionError(f"the dense model does not run on its examples: {own.skipped[0]}")
    if any(tensor.is_meta for tensor in named_tensors(model).values()):
        return Proof(math.nan, math.nan, math.nan, own.checked, precision=precision.real)
    # Random buffers can break the dense model itself (floats that are used as indices): then they keep their values.
    for redraw_buffers in (True, False):
        generator = torch.Generator().manual_seed(seed)
        redraw_(pair.dense, model, generator, redraw_buffers)
        mask_tensors_(named_tensors(pair.dense), structure, kept)
        load_cut_(pair.small, pair.dense, plan)
        redrawn = pair.compare([_nonzero_inputs(example, generator) for example in calls], SETTINGS)
        if redrawn.checked:
            break
    else:
        raise CompactionError(f"the dense model does not run with re-drawn numbers: {redrawn.skipped[0]}")
    return Proof(
        difference=own.absolute,
        redrawn=redrawn.absolute,
        relative=max(own.relative, redrawn.relative),
        checked=("own numbers, " + own.checked[0], *(f"re-drawn numbers, {setting}" for setting in redrawn.checked)),
        skipped=redrawn.skipped,
        precision=precision.real,
    )


def check_same(
    pair: Callable[[torch.dtype], tuple[nn.Module, nn.Module]], examples: Examples, *, seed: int = 0
) -> None:
    """Hold two models against each other in evaluation mode, with their own numbers, as `prove` does its two.

    Args:
        pair: makes both in a precision, of which they are changed: in float64, or in float32 where they do not run.
        examples: inputs.
        seed: of what they draw.

    Raises:
        CompactionError: an output differs by more than `TOLERANCE`, or the first one runs in neither.
    """
    for precision in _PRECISIONS:
        calls = [precision.inputs(example) for example in as_examples(examples)]
        found = _Pair(*pair(precision.real), precision, seed).compare(calls, SETTINGS[:1])
        if found.checked:
            return
    raise CompactionError(f"the model does not run on its examples: {found.skipped[0]}")


def _rounding(model: nn.Module, plan: CutPlan) -> float:
    """The coarsest relative rounding of the weights that the plan rescales."""
    tensors = named_tensors(model)
    scaled = [tensors[name].dtype for name, (factor, _) in plan.rescales.items() if factor != 1.0]
    return max((torch.finfo(dtype).eps for dtype in scaled), default=0.0)


class _Compared(NamedTuple):
    absolute: float
    relative: float
    checked: tuple[str, ...]
    skipped: tuple[str, ...]


class _Pair(NamedTuple):
    """The masked dense model and the small one, both in one precision, and how their draws are seeded."""

    dense: nn.Module
    small: nn.Module
    precision: _Precision
    seed: int

    def compare(self, calls: Sequence[Example], settings: Sequence[Setting]) -> _Compared:
        """Run both in every setting that the dense one can run, and raise where they differ."""
        absolute = relative = 0.0
        checked: list[str] = []
        skipped: list[str] = []
        for wanted in settings:
            # A batch that the dense model cannot take (one example in training) gives way to the other one.
            for setting in (wanted, wanted._replace(doubled=not wanted.doubled)):
                inputs = [_doubled(example) for example in calls] if setting.doubled else list(calls)
                try:
                    expected = [self._outputs(self.dense, example, setting) for example in inputs]
                except Exception as error:  # noqa: BLE001 - whatever a user's model raises is the reason to skip
                    skipped.append(f"{setting}: {type(error).__name__}: {error}")
                    continue
                doubts = ""
                for example, outputs in zip(inputs, expected, strict=True):
                    try:
                        found = self._outputs(self.small, example, setting)
                    except Exception as error:
                        raise CompactionError(
                            f"in {setting}, the compact model fails where the dense one runs; nothing was changed. "
                            f"{type(error).__name__}: {error}"
                        ) from error
                    try:
                        apart = _differences(outputs, found, str(setting), self.precision)
                    except CompactionError:
                        # BatchNorm over few values that are nearly one divides by next to nothing.
                        granted = N_SWINGS * self._swing(example, outputs, setting) if setting.training else 0.0
                        if granted > LEAST_SAID:
                            doubts = f"{setting}: {_SWINGS}"
                            continue
                        wider = self.precision._replace(tolerance=max(self.precision.tolerance, granted))
                        apart = _differences(outputs, found, str(setting), wider)
                    absolute, relative = max(absolute, apart[0]), max(relative, apart[1])
                (skipped if doubts else checked).append(doubts or str(setting))
                break
        return _Compared(absolute, relative, tuple(checked), tuple(skipped))

    def _swing(self, example: Example, outputs: Sequence[Tensor], setting: Setting) -> float:
        """How far the dense model moves, relative to its outputs, where its numbers change in the last place."""
        twin = copied(self.dense)
        nudge_(twin, torch.Generator().manual_seed(self.seed))
        moved = self._outputs(twin, example, setting)
        swings = [distance(a, b) for a, b in zip(outputs, moved, strict=True) if not a.is_meta and a.numel()]
        return max((apart / scale for apart, scale in swings), default=0.0)

    def _outputs(self, module: nn.Module, example: Example, setting: Setting) -> list[Tensor]:
        module.train(setting.training)
        args, kwargs = _mapped(lambda tensor: tensor.clone(), example)
        devices = sorted({tensor.device.index for tensor in named_tensors(module).values() if tensor.is_cuda})
        with (
            torch.random.fork_rng(devices),
            torch.set_grad_enabled(setting.grad),
            _by_default(self.precision.real),
            Exact(self.precision.raised),
        ):
            torch.manual_seed(self.seed)
            outputs = tensors_in(module(*args, **kwargs))
        if not outputs:
            raise CompactionError("no tensor was found in what the model returns")
        return [output.detach() for output in outputs]


def _differences(
    expected: Sequence[Tensor], found: Sequence[Tensor], setting: str, precision: _Precision
) -> tuple[float, float]:
    """The largest absolute and relative difference."""
    absolute = relative = 0.0
    shapes = [tuple(tensor.shape) for tensor in expected], [tuple(tensor.shape) for tensor in found]
    if shapes[0] != shapes[1]:
        raise CompactionError(
            f"in {setting}, the compact model returns shapes {shapes[1]}, and the dense one {shapes[0]}; nothing was "
            "changed."
        )
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a.is_meta or a.numel() == 0:
            continue
        apart, scale = distance(a, b)
        absolute, relative = max(absolute, apart), max(relative, apart / scale)
        if not apart <= precision.tolerance * scale:
            raise CompactionError(
                f"in {setting}, output {number} of the compact model differs by {apart:.3g} from the masked model's, "
                f"whose largest value is {scale:.3g}; at most {precision.tolerance:g} of that is expected. Nothing was "
                "changed. The trace of this model is wrong somewhere: please report it, with model and structure."
            )
    return absolute, relative


def _mapped(change: Any, example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def each(leaf: Any) -> Any:
        return change(leaf) if isinstance(leaf, Tensor) else leaf

    return tree_map(each, tuple(example.args)), tree_map(each, dict(example.kwargs))


def _nonzero_inputs(example: Example, generator: torch.Generator) -> Example:
    def filled(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and not tensor.any():
            return torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator).to(tensor.device)
        return tensor

    return Example(*_mapped(filled, example))


def _doubled(example: Example) -> Example:
    """Every tensor whose first dimension is the batch, followed by itself in reverse."""
    sizes = [leaf.shape[0] for leaf in tree_leaves((example.args, dict(example.kwargs))) if _has_batch(leaf)]

    def twice(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.flip(0)]) if _has_batch(tensor) and tensor.shape[0] == sizes[0] else tensor

    return Example(*_mapped(twice, example))


def _has_batch(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


@contextlib.contextmanager
def _by_default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
