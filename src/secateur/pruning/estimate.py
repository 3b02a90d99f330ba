"""From a closure to one scalar whose backward is right for every estimator: pathwise, AR and ARM.

A closure runs the model on one minibatch and returns its loss. Pathwise gates and AR take one pass, ARM a second one
that no graph is recorded for. What a pass leaves behind besides its loss (running statistics, random states) is that of
one pass, and of none where the loss is refused.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from numbers import Integral
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from secateur.errors import GateError
from secateur.gates.gate import Gate, ScoreFunction
from secateur.gates.settings import is_a_number
from secateur.pruning.draw import Draw
from secateur.pruning.draws import Live, gates_of, live_of
from secateur.pruning.gateset import GateSet, Norms
from secateur.pruning.placement import ConsumerGate

__all__ = ["Before", "Closure", "Credit", "task_loss"]

#: Runs the model on one minibatch and returns its loss, a finite scalar.
Closure = Callable[[], Tensor]
#: What a difference of two losses is credited to: all gates at once, or one group after another.
Credit: TypeAlias = Literal["all", "group"]
#: Share of the running mean of losses that one step leaves: it remembers about ten.
MEAN_DECAY = 0.9


def task_loss(model: nn.Module, closure: Closure, draws: int = 1, credit: Credit = "all") -> Tensor:
    r"""The closure's loss, plus terms of value 0 that carry the gradients of gates whose draws have none.

    For a score-function gate with draw z, and its antithetic draw z' where the estimator takes two passes,

    .. math:: L = f(z) + \sum_i c_i\,(\phi_i - \mathrm{sg}(\phi_i)), \qquad c_i = \hat\partial_{\phi_i} E\,f,

    where sg stops the gradient and the estimate c uses the losses' values only. In a model with several methods all
    other gates keep their draw in the second pass: the estimate is then exact in the mean given that draw.

    Where score-function gates are present, all forward passes of the closure share one draw, for the loss is a function
    of that draw alone; otherwise each root forward makes its own, and a closure that calls only parts of the model one
    for all of them. In evaluation mode gates are constants, and the closure's loss is all there is.

    With several draws c is the mean of their estimates, each from passes of its own that no graph is recorded for but
    the first one's: the weights are trained by the first draw alone.

    With credit by group, ARM gates take one second pass for each group in which the antithetic draw differs: all other
    groups keep their draw, so that c is the ARM estimate given these, unbiased, and without the noise of theirs.

    Args:
        model: gated.
        closure: runs it.
        draws: of score-function gates, at least 1.
        credit: ``"all"`` or ``"group"``.

    Raises:
        GateError: the closure is no function, or gives no scalar, or a number that is not finite; ``draws`` is no
            whole number of at least 1; or credit by group is asked for where no gate can have it. Gates, draws, buffers
            and random states are then as they were before the call.
    """
    if not is_a_number(draws, Integral) or draws < 1:
        raise GateError(
            f"draws={draws!r}; expected a whole number of at least 1, the number of draws that an estimate is the mean"
            " of"
        )
    if not callable(closure):
        raise GateError(
            f"loss: got a {type(closure).__name__}, expected a function without arguments that runs the model, as in"
            " pruner.loss(lambda: criterion(model(x), y))"
        )
    gates = gates_of(model)
    if credit not in ("all", "group"):
        raise GateError(f"credit={credit!r}, expected 'all' or 'group'")
    if credit == "group" and ("arm" not in gates.estimators or gates.per_example):
        raise GateError(
            "credit='group' is for ARM gates of which the batch shares one draw; expected sc.ARM(), no per_example=True"
        )
    live = live_of(gates)
    before = Before(model, live)
    try:
        if not gates.training or gates.estimators == {"pathwise"}:
            if not live.held:
                live.draw = live.replay = None  # a closure that never calls the root still gets a draw of its own
            return _checked(closure())
        draw = Draw.make(gates, live.generator)
        with live.hold(draw):
            loss = _checked(closure())
        other = _other_losses(gates, live, draw, closure, before, loss.detach(), credit)
        terms = [_surrogate(gates, live, draw, loss.detach(), other)]
        for _ in range(draws - 1):
            terms.append(_further(gates, live, closure, before, credit))
            live.draw = draw  # what a recomputation during backward is to repeat
        _remember(gates, live, loss.detach())
        return loss + torch.stack(terms).mean()
    except BaseException:
        before.restore()
        raise


def _surrogate(gates: GateSet, live: Live, draw: Draw, loss: Tensor, other: Tensor) -> Tensor:
    terms, stop = [], 0
    for rule, ((gate, _), noise) in enumerate(zip(gates, draw.noise, strict=True)):
        start, stop = stop, stop + gate.layout.total
        if gate.method.estimator == "pathwise":
            continue
        own = other if other.dim() == 0 else other[start:stop]
        second = own if gate.method.estimator == "arm" else None
        mean = live.mean_loss if _subtracts(gate) else None
        baseline = torch.zeros_like(loss) if mean is None else mean.to(loss)
        if rule not in gates.per_example:
            first = loss if second is None or second.dim() == 0 else loss.expand(gate.layout.total)
            terms.append(gate.surrogate(noise, first, second, baseline=baseline))
            continue
        for (number, n), one in draw.by_example.items():
            if number == rule:
                # Each example's gates are variables of their own, whose estimates add up; the surrogate takes the mean.
                each = None if second is None else (n * second).expand(n)
                batch = (n * loss).expand(n)
                terms.append(gate.surrogate(one.noise[0], batch, each, baseline=(n * baseline).expand(n)))
    return torch.stack(terms).sum().to(loss.device) if terms else loss.new_zeros(())


def _further(gates: GateSet, live: Live, closure: Closure, before: Before, credit: Credit) -> Tensor:
    """The surrogate of one more draw; its passes leave nothing behind but the gates' generator moved on."""
    draw = Draw.make(gates, live.generator)
    with before.again(), torch.no_grad(), live.hold(draw):
        loss = _checked(closure()).detach()
    return _surrogate(gates, live, draw, loss, _other_losses(gates, live, draw, closure, before, loss, credit))


def _subtracts(gate: Gate) -> bool:
    return isinstance(gate.method, ScoreFunction) and gate.method.control_variate


def _remember(gates: GateSet, live: Live, loss: Tensor) -> None:
    """Move the running mean on, after the loss's own estimate: only then is the mean independent of the draw."""
    if any(_subtracts(gate) for gate, _ in gates):
        mean = loss if live.mean_loss is None else live.mean_loss.to(loss)
        live.mean_loss = torch.lerp(loss, mean, MEAN_DECAY)


def _other_losses(
    gates: GateSet, live: Live, draw: Draw, closure: Closure, before: Before, loss: Tensor, credit: Credit
) -> Tensor:
    """The loss under the antithetic draw, a scalar; or for each gate under that of its group alone, ``(Z,)``."""
    if "arm" not in gates.estimators:
        return loss
    second = draw.antithetic(gates)
    if credit == "all":
        return loss if draw.equals(second) else _again(live, draw, second, closure, before)
    losses = loss.expand(gates.total).clone()
    start = 0
    for size in (size for gate, _ in gates for size in gate.layout.sizes):
        stop = start + size
        if not torch.equal(draw.values[start:stop], second.values[start:stop]):
            losses[start:stop] = _again(live, draw, draw.exchanged(second, start, stop), closure, before)
        start = stop
    return losses


def _again(live: Live, draw: Draw, other: Draw, closure: Closure, before: Before) -> Tensor:
    """The loss under another draw of the same minibatch, dropout masks and state."""
    try:
        with before.again(), torch.no_grad(), live.hold(other):
            return _checked(closure()).detach()
    finally:
        live.draw = draw  # what a recomputation during backward is to repeat


def _checked(loss: object) -> Tensor:
    problem = ""
    if not isinstance(loss, Tensor):
        problem = f"a {type(loss).__name__}, expected a tensor with one number"
    elif loss.numel() != 1:
        problem = f"a tensor of shape {tuple(loss.shape)}, expected one number; reduce it with .mean() or .sum()"
    elif not loss.is_floating_point():
        problem = f"a tensor of {loss.dtype}, expected a floating-point loss"
    elif not math.isfinite(loss.item()):
        problem = f"{loss.item()}, expected a finite number; lower the learning rate or look at this minibatch"
    if problem:
        raise GateError(f"the closure returned {problem}. The step is refused; gates, draws and buffers are unchanged")
    assert isinstance(loss, Tensor)
    return loss.reshape(())


def _modules(model: nn.Module) -> list[nn.Module]:
    """All modules of a model, each once, as `Module.modules` has them, without its generators: every step asks."""
    found, seen = [model], {id(model)}
    for module in found:
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


#: Modules whose buffers no pass changes.
_OURS = (GateSet, Gate, Norms, ConsumerGate)


class Before:
    """What a pass may change besides the loss it returns: buffers, random states, draws."""

    def __init__(self, model: nn.Module, live: Live) -> None:
        self._live = live
        self._draws = live.draw, live.replay, live.generator.get_state()
        in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        devices = {p.device for p in model.parameters()} if in_use else set()
        self._devices = sorted((device for device in devices if device.type == "cuda"), key=str)
        self._random = self._random_states()
        self._slots = [
            (module._buffers, key, buffer)
            for module in _modules(model)
            if module._buffers and not isinstance(module, _OURS)
            for key, buffer in module._buffers.items()
            if buffer is not None
        ]
        copies: dict[int, Tensor] = {}
        for _, _, buffer in self._slots:
            copies.setdefault(id(buffer), buffer.detach().clone())
        self._copies = [copies[id(buffer)] for _, _, buffer in self._slots]

    def restore(self) -> None:
        """Undo the pass."""
        self._live.draw, self._live.replay, state = self._draws
        self._live.generator.set_state(state)
        self._set_random_states(self._random)
        with torch.no_grad():
            for (buffers, key, buffer), copy in zip(self._slots, self._copies, strict=True):
                buffers[key] = buffer
                if not torch.equal(buffer, copy):
                    buffer.copy_(copy)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Within it the model is as before the first pass; afterwards as after it.

        Buffers are exchanged rather than written to: the first pass's graph may still need them.
        """
        after = [buffers.get(key) for buffers, key, _ in self._slots], self._random_states()
        fresh = {id(copy): copy.clone() for copy in self._copies}
        for (buffers, key, _), copy in zip(self._slots, self._copies, strict=True):
            buffers[key] = fresh[id(copy)]
        self._set_random_states(self._random)
        try:
            yield
        finally:
            for (buffers, key, _), buffer in zip(self._slots, after[0], strict=True):
                buffers[key] = buffer
            self._set_random_states(after[1])

    def _random_states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]

    def _set_random_states(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
