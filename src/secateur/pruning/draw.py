"""One draw of all gates of a model, and how its gradient finds its way back.

Index conventions: ``U`` gates of the model in a row; the *extended* draw ``(U + 1,)`` ends in a constant 1.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from secateur.errors import GateError
from secateur.gates.gate import Gate, Pull
from secateur.pruning.gateset import GateSet, Norms, extended

__all__ = ["Draw"]


@dataclass(eq=False)
class _Kept:
    """How a draw's gradient reaches the parameters, any number of times.

    Args:
        pulls: of rules that have one: where their gates start, the shape of their draw, the names of the tensors that
            take a gradient, and what gives it. Their parameters come first in ``sources``.
        graph: extended draw ``(U + 1,)`` as a function of ``leaves``, for all other rules; None if there are none.
        leaves: detached stand-ins of their parameters, sharing their memory.
        sources: the parameters.
    """

    pulls: list[tuple[int, torch.Size, tuple[str, ...], Pull]] = field(default_factory=list)
    graph: Tensor | None = None
    leaves: list[Tensor] = field(default_factory=list)
    sources: list[Tensor] = field(default_factory=list)

    def gradients(self, grad: Tensor) -> list[Tensor | None]:
        """Gradients of ``sources``, from that of the extended draw."""
        found: list[Tensor | None] = []
        for start, shape, names, pull in self.pulls:
            part = grad.narrow(-1, start, shape[-1])
            own = pull(part if part.shape == shape else part.sum_to_size(shape))
            found += [own[name] for name in names]
        if self.graph is not None:
            found += torch.autograd.grad(self.graph, self.leaves, grad, retain_graph=True, allow_unused=True)
        return found


class _Through(torch.autograd.Function):
    """From parameters to a draw that was made before; its backward may run again and again.

    What the gradient needs is kept aside, and nothing is saved on the outer graph. So regions under reentrant
    checkpointing, each with a backward pass of its own, share a draw, and the outer graph looks the same to a
    recomputation as it did to the forward pass.
    """

    @staticmethod
    def forward(ctx: Any, kept: _Kept, values: Tensor, *_: Tensor) -> Tensor:
        ctx.kept = kept
        return values.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.kept.gradients(grad))


class Draw:
    """One draw of every gate of a model.

    Args:
        noise: each rule's randomness.
        values: extended draw ``(U + 1,)``, detached.
        kept: how its gradient reaches parameters; None if it reaches none.
        first: the draw that this is the antithetic one of.

    Attributes:
        by_example: the draws of rules of which each example has its own, by rule and number of examples; made when a
            module that they act on is first called.
        narrowed: whether a forward pass left out the units that it closes.
    """

    def __init__(
        self,
        noise: Sequence[Tensor | None],
        values: Tensor,
        kept: _Kept | None = None,
        first: Draw | None = None,
    ) -> None:
        self.noise = tuple(noise)
        self.by_example: dict[tuple[int, int], Draw] = {}
        self.narrowed = False
        self._first = first
        self.values = values
        self._kept = kept
        self._attached: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def part(self, gates: GateSet, start: int, size: int) -> Tensor:
        """The draw of ``size`` gates in a row; groups share one operator and its backward."""
        whole = self.read()
        # Parts that one compiled graph has cut carry no gradient on from another.
        if not whole.requires_grad or torch.compiler.is_compiling():
            return whole.narrow(0, start, size)
        if not self._parts:
            sizes = [size for gate, _ in gates for size in gate.layout.sizes]
            starts = itertools.accumulate(sizes, initial=0)
            self._parts = dict(zip(starts, torch.split(whole, [*sizes, 1]), strict=True))
        group = self._parts.get(start)
        return group if group is not None and len(group) == size else whole.narrow(0, start, size)

    def read(self) -> Tensor:
        """The extended draw ``(U + 1,)``, reaching the parameters where gradients are recorded."""
        if self._kept is None or not torch.is_grad_enabled():
            return self.values
        if self._attached is None:
            _check_untransformed()
            kept = self._kept
            self._attached = _Through.apply(kept, self.values, *kept.sources)  # type: ignore[no-untyped-call]
        return self._attached

    @classmethod
    def make(cls, gates: GateSet, generator: torch.Generator) -> Draw:
        """Draw every gate once."""
        _check_untransformed()
        batch = [number not in gates.per_example for number in range(len(gates.rules))]
        noise = [gate.draw_noise(generator) if one else None for (gate, _), one in zip(gates, batch, strict=True)]
        return cls.of(gates, noise)

    @classmethod
    def of(cls, gates: GateSet, noise: Sequence[Tensor | None]) -> Draw:
        """The draw that some noise gives."""
        kept, opened, parts, start = _Kept(), list[Tensor](), list[Tensor](), 0
        with _undisturbed(gates.device), torch.enable_grad():
            for number, ((gate, norms), noise_of) in enumerate(zip(gates, noise, strict=True)):
                if number in gates.per_example:
                    parts.append(torch.ones(gate.layout.total, dtype=gate.dtype or torch.float32, device=gates.device))
                else:
                    parts.append(_sample(gate, norms, noise_of, start, kept, opened).to(gates.device))
                start += gate.layout.total
            return cls(noise, *_finished(kept, opened, extended(parts[0] if len(parts) == 1 else torch.cat(parts))))

    def antithetic(self, gates: GateSet) -> Draw:
        """The same draw but for ARM gates, which take their second one; without gradient."""
        parts, start = [], 0
        with torch.no_grad():
            for number, ((gate, _), noise_of) in enumerate(zip(gates, self.noise, strict=True)):
                stop = start + gate.layout.total
                first = self.values[start:stop]
                arm = gate.method.estimator == "arm" and number not in gates.per_example
                parts.append(gate.antithetic(noise_of).to(first) if arm else first)
                start = stop
            other = Draw(self.noise, extended(torch.cat(parts)), first=self)
        for rule, n in self.by_example:
            other.of_examples(gates, None, rule, n)
        return other

    def exchanged(self, other: Draw, start: int, stop: int) -> Draw:
        """This draw with the other's values for the gates from ``start`` to ``stop``; without gradient."""
        values = self.values.clone()
        values[start:stop] = other.values[start:stop]
        return Draw(self.noise, values, first=self)

    def of_examples(self, gates: GateSet, generator: torch.Generator | None, rule: int, n: int) -> Draw:
        """The draw of a rule for each of ``n`` examples: its values are extended ones ``(n, U_rule + 1)``."""
        if (rule, n) not in self.by_example:
            gate, _ = list(gates)[rule]
            if self._first is None:
                made = _for_examples(gate, gate.draw_noise(generator, (n,)), n)
            else:
                first = self._first.of_examples(gates, generator, rule, n)
                values = first.values
                if gate.method.estimator == "arm":
                    with torch.no_grad():
                        values = extended(gate.antithetic(first.noise[0]).to(values))
                made = Draw(first.noise, values)
            self.by_example[rule, n] = made
        return self.by_example[rule, n]

    def equals(self, other: Draw) -> bool:
        """Whether all gates of both have the same values."""
        return torch.equal(self.values, other.values) and all(
            torch.equal(one.values, other.by_example[key].values) for key, one in self.by_example.items()
        )


def _check_untransformed() -> None:
    """A draw is of one forward pass of a whole batch; torch.func would repeat it, or differentiate it its own way."""
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        raise GateError(
            "gates are drawn within torch.vmap or another transform of torch.func, expected a call of the whole model"
            " outside of it; map layers inside the model's forward, or bring it to evaluation mode, where gates are"
            " fixed"
        )


def _for_examples(gate: Gate, noise: Tensor | None, n: int) -> Draw:
    kept, opened = _Kept(), list[Tensor]()
    with _undisturbed(gate.layout.segment.device), torch.enable_grad():
        drawn = _sample(gate, None, noise, 0, kept, opened)
        return Draw((noise,), *_finished(kept, opened, extended(drawn.expand(n, -1))))


def _finished(kept: _Kept, opened: list[Tensor], values: Tensor) -> tuple[Tensor, _Kept | None]:
    """The draw, detached, and how its gradient reaches parameters, those in ``opened`` through its graph."""
    if values.requires_grad:
        kept.graph = values
        kept.sources += opened
        values = values.detach()
    return values, kept if kept.sources else None


def _sample(
    gate: Gate, norms: Norms | None, noise: Tensor | None, start: int, kept: _Kept, opened: list[Tensor]
) -> Tensor:
    """One rule's draw, in the gates' type; what needs a gradient joins ``kept``, or ``opened`` where autograd is asked.

    Args:
        gate: of the rule.
        norms: that its method looks at.
        noise: its randomness.
        start: of its gates among those of the model.
        kept: of the whole draw.
        opened: parameters that ``kept.leaves`` stand for.
    """
    dtype, pathwise = gate.dtype or torch.float32, gate.method.estimator == "pathwise"
    if norms is None and (found := gate.drawn(noise)) is not None:
        values, pull = found
        sources = {name: tensor for name, tensor in gate.tensors.items() if tensor.requires_grad}
        if pathwise and sources:
            kept.pulls.append((start, values.shape, tuple(sources), pull))
            kept.sources += sources.values()
        return values.to(dtype)

    def stand_in(tensor: Tensor) -> Tensor:
        twin = tensor.detach()
        if pathwise and tensor.requires_grad:
            kept.leaves.append(twin.requires_grad_())
            opened.append(tensor)
        return twin

    tensors = {name: stand_in(tensor) for name, tensor in gate.tensors.items()}
    norm = None if norms is None else norms([stand_in(weight) for weight in norms.weights], dtype)
    drawn = gate.method.sample(tensors, gate.layout, noise, norm)
    return (drawn if pathwise else drawn.detach()).to(dtype)


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Whatever surrounds the forward pass: inference mode, autocast, and hooks on saved tensors end here.

    Checkpointing counts the tensors that its region saves; a draw made inside would be counted the first time only.
    """
    hooks: object = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None and not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled(device.type):
        yield
        return
    with (
        torch.inference_mode(False),
        torch.autocast(device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(_same, _same),
    ):
        yield


def _same(tensor: Tensor) -> Tensor:
    return tensor
