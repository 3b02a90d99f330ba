"""Conditional computation: whether a training step leaves closed units out, and proof that this changes nothing."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import GateError
from secateur.gates.gate import Method
from secateur.pruning.draw import Draw
from secateur.pruning.draws import Live, gates_of, live_of
from secateur.pruning.estimate import Before, Closure
from secateur.pruning.gateset import extended
from secateur.pruning.narrowable import ways
from secateur.pruning.narrowing import DrawsRandomlyError, Narrowing
from secateur.pruning.resize import check_unwrapped
from secateur.pruning.shrink import Removal
from secateur.pruning.units import Units
from secateur.structure.cut import CutPlan

__all__ = ["Conditional", "When", "paying"]

#: Loss, gradients of the weights, buffers and random state after a pass.
_Left: TypeAlias = tuple[Sequence[Tensor | None], ...]
#: Never, wherever possible, or where the time of a step was measured to fall.
When: TypeAlias = Literal["auto"] | bool

#: Share of multiply-accumulates at which measuring begins: above it little could be gained.
MEASURED_FROM = 0.9
#: Roundings that gates are off by where it is tried what a network makes of rounding, and by how much farther apart a
#: pass on open units may be from the full one.
SHAKEN, FARTHER = 16, 4
#: Shares of open units that steps are measured at, besides full ones.
SHARES = (0.75, 0.5, 0.25)
#: Steps of each that count, turn by turn: as many as this number of seconds holds, within these bounds.
SECONDS, ROUNDS = 0.5, (3, 20)
#: Time of a full step that a narrowed one must save.
LEAST_GAIN = 0.02
#: Steps until a draw is looked at again while the share is far above what pays, and how far that is.
REST, FAR = 16, 0.1
#: Steps after which a measurement is repeated, and share of the multiply-accumulates, by shrinking, from which on.
AGAIN, SMALLER = 5000, 2 / 3


class Conditional:
    """What `Pruner.loss` leaves out of its passes: units whose gates the draw puts at exactly 0.

    A pass on the open units gives the loss, all gradients, buffers and random states of the full pass, up to rounding;
    only activations of closed units that are not finite would tell them apart. The first time, both are taken on the
    caller's batch and compared, from one pattern of closed units; where they differ nothing is ever left out. What
    ``"auto"`` leaves out depends on measured times, so a run repeats up to rounding and not bit by bit.

    Args:
        when: `False` for never, `True` for every step with closed units, ``"auto"`` where it pays: steps are timed once
            some units are closed, with a few extra passes of the closure on the same batch that leave nothing behind,
            and again after thousands of steps or once `Pruner.shrink` has taken a third of the model.
        units: of the model.
        removal: what is gone from it.

    Attributes:
        when: as given.
        pays_from: the share of multiply-accumulates up to which a narrowed step was measured to pay, 0 if none did;
            None before a measurement.
        off: why nothing is left out of this model; "" where something may be.
    """

    def __init__(self, when: When, units: Units, removal: Removal) -> None:
        self.when = when
        self.pays_from: float | None = None
        self.off = "" if when else "attached with conditional=False"
        self._units = units
        self._removal = removal
        self._narrowing: Narrowing | None = None
        self._made_for: CutPlan | None = None
        self._random = self._proven = self._due = False
        self._rest = self._steps = self._measured_at = 0
        self._measured_macs = 0.0

    @property
    def share(self) -> float:
        """Share of the multiply-accumulates that the last draw looked at leaves; 1 before any."""
        return 1.0 if self._narrowing is None else self._narrowing.share

    @property
    def passes(self) -> int:
        """How many forward passes left units out since the last shrink."""
        return 0 if self._narrowing is None else self._narrowing.passes

    @property
    def why(self) -> Mapping[str, str]:
        """Gated groups whose units are never left out, with the reason; empty before the first step."""
        return {} if self._narrowing is None else self._narrowing.how.why

    def run(self, model: nn.Module, closure: Closure, take: Callable[[], Tensor]) -> Tensor:
        """What ``take`` returns, which calls the closure; its passes of the model may be on open units alone.

        Raises:
            GateError: units are to be left out wherever possible, and the proof failed.
        """
        gates = gates_of(model)
        if self.off or not gates.training:
            return take()
        self._steps += 1
        if self._rest:
            self._rest -= 1
            return take()
        live = live_of(gates)
        narrowing = self._current(model)
        if narrowing is not None and (self._due or (self.when is True and not self._proven)):
            narrowing = self._looked_at(model, closure, live)
        if narrowing is None:
            return take()
        narrowing.limit = 1.0 if self.when is True else self.pays_from or -1.0
        try:
            with _acting(live, narrowing):
                loss = take()
        except DrawsRandomlyError:  # dropout was switched on; nothing of the refused pass is left
            self._random = True
            self._made(model)
            return self.run(model, closure, take)
        self._plan_ahead(narrowing)
        return loss

    def _plan_ahead(self, narrowing: Narrowing) -> None:
        """Whether to measure at the next step, and when to look at a draw again."""
        if self.when is True:
            return
        known = self.pays_from is not None
        smaller = narrowing.macs < SMALLER * self._measured_macs
        stale = not known or smaller or self._steps - self._measured_at >= AGAIN
        self._due = stale and narrowing.share <= MEASURED_FROM
        far = narrowing.share > (MEASURED_FROM if self.pays_from is None else self.pays_from + FAR)
        self._rest = REST if far and not self._due else 0

    def _current(self, model: nn.Module) -> Narrowing | None:
        """For the model as it is; None where nothing is to be left out."""
        if self._narrowing is None or self._made_for is not self._removal.plan:
            self._refuse(self._made(model))
        return None if self.off else self._narrowing

    def _made(self, model: nn.Module) -> str:
        """Make it for the model as it is; why it cannot be used."""
        units, removal = self._units, self._removal
        how = ways(units.groups, list(_methods(model, units)), model, units.structure, random=self._random)
        self._narrowing = Narrowing(model, units.groups, how, units.structure, removal.gone, removal.plan)
        self._narrowing.random, self._made_for = self._random, removal.plan
        if not self._narrowing.possible:
            name, reason = next(iter(how.why.items()))
            return f"no unit of any group can be left out; of {name}: {reason}"
        if any(module._compiled_call_impl is not None for module in model.modules()):
            return "part of the model is compiled in place, and would be compiled anew for every draw"
        return ""

    def _looked_at(self, model: nn.Module, closure: Closure, live: Live) -> Narrowing | None:
        """Prove and, where that decides, measure, on the caller's batch; nothing of the passes stays."""
        self._due = False
        if _is_wrapped(model):
            self._refuse("the model is wrapped or sharded (DistributedDataParallel, FSDP) and cannot be tried alone")
            return None
        passes = _Passes(model, closure, live)
        try:
            if not self._proven:
                self._refuse(self._differs(passes))
                self._proven = True
            narrowing = self._current(model)
            if self.when == "auto" and narrowing is not None:
                self.pays_from = passes.pay_from(narrowing)
                self._measured_at, self._measured_macs = self._steps, narrowing.macs
        finally:
            passes.forget()
        return self._current(model)

    def _refuse(self, reason: str) -> None:
        self.off = self.off or reason
        if self.off and self.when is True:
            raise GateError(f"conditional=True: {self.off}; attach with conditional='auto' or False")

    def _differs(self, passes: _Passes) -> str:
        """How a pass with half of the units left out differs from the full one; "" where it does not."""
        narrowing = self._current(passes.model)
        if narrowing is None:
            return self.off
        draw = passes.drawn(narrowing, 0.5)
        full = passes.take(narrowing, draw, limit=-1.0)
        if narrowing.random:
            self._random = True
            self._refuse(self._made(passes.model))
            narrowing = self._current(passes.model)
        if narrowing is None:
            return self.off
        try:
            part = passes.take(narrowing, draw, limit=1.0)
        except Exception as error:  # noqa: BLE001 - models fail in many ways
            return f"a pass without closed units fails with {type(error).__name__}: {error}"
        reason = _difference(full, part, narrowing.coarseness)
        if reason:
            # Some networks blow rounding up: how far, a full pass with slightly other gates tells.
            other = passes.take(narrowing, passes.shaken(draw, narrowing.coarseness), limit=-1.0)
            reason = _difference(full, part, narrowing.coarseness, _distances(full, other, narrowing.coarseness))
        return reason

    def __repr__(self) -> str:
        if self.off:
            return f"Conditional(off: {self.off})"
        return f"Conditional({self.when!r}, pays_from={self.pays_from}, share={self.share:.3f}, passes={self.passes})"


class _Passes:
    """Passes of a closure that are only looked at.

    Args:
        model: gated.
        closure: runs it on a batch.
        live: of its gates.
    """

    def __init__(self, model: nn.Module, closure: Closure, live: Live) -> None:
        self.model = model
        self._closure = closure
        self._live = live
        self._before = Before(model, live)
        self._generator = np.random.default_rng(0)
        gates = {id(parameter) for parameter in gates_of(model).parameters()}
        self._weights = [p for p in model.parameters() if p.requires_grad and id(p) not in gates]

    def forget(self) -> None:
        """Undo what they left behind."""
        self._before.restore()

    def drawn(self, narrowing: Narrowing, share: float) -> Draw:
        """A draw that leaves this share of each group's units open."""
        gates = gates_of(self.model)
        dtypes = [gate.dtype or torch.float32 for gate, _ in gates]
        values = extended(narrowing.pattern(share, self._generator))
        return Draw([None] * len(dtypes), values.to(gates.device, max(dtypes, key=lambda dtype: dtype.itemsize)))

    def shaken(self, draw: Draw, coarseness: float) -> Draw:
        """The draw with its open gates off by some roundings."""
        eps = max(coarseness, torch.finfo(draw.values.dtype).eps)
        signs = torch.from_numpy(self._generator.choice([-1.0, 1.0], len(draw.values))).to(draw.values)
        signs[-1] = 0.0
        return Draw(draw.noise, draw.values * (1.0 + SHAKEN * eps * signs))

    def take(self, narrowing: Narrowing, draw: Draw, limit: float) -> _Left:
        """What a pass returns and leaves behind."""
        narrowing.limit = limit
        with self._before.again(), _acting(self._live, narrowing), self._live.hold(draw):
            loss: object = self._closure()
            grads: Sequence[Tensor | None] = ()
            if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
                grads = torch.autograd.grad(loss, self._weights, allow_unused=True)
            # What is no loss will be refused where it counts.
            losses = [loss.detach()] if isinstance(loss, Tensor) else []
            buffers = [buffer.detach().clone() for buffer in self.model.buffers()]
            return losses, grads, buffers, [torch.get_rng_state()]

    def pay_from(self, narrowing: Narrowing) -> float:
        """The share of multiply-accumulates up to which a narrowed pass takes less time."""
        draws = [self.drawn(narrowing, share) for share in SHARES]
        shares = [1.0] * len(draws)

        def turn() -> list[float]:
            full = _timed(partial(self.take, narrowing, draws[0], -1.0))
            found = []
            for number, draw in enumerate(draws):
                found.append(_timed(partial(self.take, narrowing, draw, 1.0)) / full)
                shares[number] = narrowing.share
            return found

        turn()  # the first passes pay for allocation
        start = time.perf_counter()
        turns = [turn()]
        took = max(time.perf_counter() - start, 1e-6)
        turns += [turn() for _ in range(min(max(int(SECONDS / took), ROUNDS[0]), ROUNDS[1]) - 1)]
        ratios = list(zip(*turns, strict=True))
        return paying(shares, [statistics.median(each) for each in ratios])


def paying(shares: Sequence[float], ratios: Sequence[float]) -> float:
    """The largest share of multiply-accumulates at which a narrowed step takes less time than a full one; 0 for none.

    Args:
        shares: that were measured, at least two, all different.
        ratios: of the time of a narrowed step to that of a full one. Between the shares it goes along straight lines,
            and beyond the largest one along the last of these.

    Example:
        >>> paying([0.75, 0.5, 0.25], [1.1, 0.9, 0.5])
        0.6
        >>> paying([0.75, 0.25], [1.2, 1.1])
        0.0
    """
    most = 1.0 - LEAST_GAIN
    points = sorted(zip(shares, ratios, strict=True), reverse=True)
    (high, after), (low, before) = points[:2]
    if after <= most:
        slope = (after - before) / (high - low)
        return min(1.0, round(high + (most - after) / slope, 6)) if slope > 0 else 1.0
    for (high, after), (low, before) in itertools.pairwise(points):
        if before <= most:
            return round(low + (high - low) * (most - before) / (after - before), 6)
    return 0.0


@contextlib.contextmanager
def _acting(live: Live, narrowing: Narrowing) -> Iterator[None]:
    live.narrowing = narrowing
    try:
        yield
    finally:
        live.narrowing = None
        narrowing.end(watched=False)


def _methods(model: nn.Module, units: Units) -> Iterator[Method]:
    """The method of each gated group's gates."""
    groups = iter(units.groups)
    for gate, _ in gates_of(model):
        left = gate.layout.total
        while left:
            left -= next(groups).size
            yield gate.method


def _is_wrapped(model: nn.Module) -> bool:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    try:
        check_unwrapped(model)
    except GateError:
        return True
    return False


def _timed(call: Callable[[], object]) -> float:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    call()
    return time.process_time() - start


def _difference(full: _Left, part: _Left, coarseness: float, noise: Mapping[str, float] | None = None) -> str:
    """What differs by more than rounding.

    Args:
        full: from a full pass.
        part: from one on open units.
        coarseness: relative distance of neighbouring numbers that the passes computed with, at least.
        noise: how far full passes are apart that differ by little more than rounding.
    """
    for what, distance in _distances(full, part, coarseness).items():
        if distance > max(1.0, FARTHER * (noise or {}).get(what, 0.0)):
            return f"a pass without closed units gives other {what}"
    return ""


def _distances(one: _Left, other: _Left, coarseness: float) -> dict[str, float]:
    """How far two passes are apart, 1 being what rounding explains, infinite where kinds or integers differ.

    Of all gradients together, for those of single weights may be nothing but noise.
    """
    found = {}
    for what, ones, others in zip(("loss", "gradients", "buffers", "random state"), one, other, strict=True):
        apart, size, eps, alike = 0.0, 0.0, coarseness, True
        for a, b in zip(ones, others, strict=True):
            if a is None or b is None:
                alike = alike and a is b
            elif not a.is_floating_point():
                alike = alike and torch.equal(a, b)
            else:
                eps = max(eps, torch.finfo(a.dtype).eps)
                apart += float((a.double() - b.double()).square().sum())
                size += float(a.double().square().sum())
        within = 4 * eps**0.5 * size**0.5
        found[what] = (apart**0.5 / within if within else apart) if alike else math.inf
    return found
