"""One draw of all gates of a model, and how its gradient finds its way back.

Index conventions: ``U`` gates of the model in a row; the *extended* draw ``(U + 1,)`` ends in a constant 1.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from secateur.gates.gate import Gate
from secateur.pruning.gateset import GateSet, Norms, extended

__all__ = ["Draw"]


@dataclass(frozen=True)
class _Kept:
    """The draw's own little graph, kept so that any number of backward passes can go through it.

    Args:
        graph: extended draw ``(U + 1,)`` as a function of ``leaves``.
        leaves: detached stand-ins of the parameters, sharing their memory.
    """

    graph: Tensor
    leaves: tuple[Tensor, ...]


class _Through(torch.autograd.Function):
    """From parameters to a draw that was made before; its backward may run again and again.

    The graph of the draw is retained aside and saves nothing on the outer one. So regions under reentrant
    checkpointing, each with a backward pass of its own, share a draw, and the outer graph looks the same to a
    recomputation as it did to the forward pass.
    """

    @staticmethod
    def forward(ctx: Any, kept: _Kept, *_: Tensor) -> Tensor:
        ctx.kept = kept
        return kept.graph.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        leaves = ctx.kept.leaves
        return (None, *torch.autograd.grad(ctx.kept.graph, leaves, grad, retain_graph=True, allow_unused=True))


class Draw:
    """One draw of every gate of a model.

    Args:
        noise: each rule's randomness.
        values: extended draw ``(U + 1,)``, detached.
        kept: its graph, None if no parameter is reached through it.
        sources: the parameters that ``kept.leaves`` stand for.
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
        sources: Sequence[Tensor] = (),
        first: Draw | None = None,
    ) -> None:
        self.noise = tuple(noise)
        self.by_example: dict[tuple[int, int], Draw] = {}
        self.narrowed = False
        self._first = first
        self.values = values
        self._kept = kept
        self._sources = tuple(sources)
        self._attached: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def part(self, gates: GateSet, start: int, size: int) -> Tensor:
        """The draw of a group, flat, by where it starts; all groups share one operator and its backward."""
        whole = self.read()
        if not whole.requires_grad:
            return whole.narrow(0, start, size)
        if not self._parts:
            sizes = [size for gate, _ in gates for size in gate.layout.sizes]
            starts = itertools.accumulate(sizes, initial=0)
            self._parts = dict(zip(starts, torch.split(whole, [*sizes, 1]), strict=True))
        return self._parts[start]

    def read(self) -> Tensor:
        """The extended draw ``(U + 1,)``, reaching the parameters where gradients are recorded."""
        if self._kept is None or not torch.is_grad_enabled():
            return self.values
        if self._attached is None:
            self._attached = _Through.apply(self._kept, *self._sources)  # type: ignore[no-untyped-call]
        return self._attached

    @classmethod
    def make(cls, gates: GateSet, generator: torch.Generator) -> Draw:
        """Draw every gate once."""
        batch = [number not in gates.per_example for number in range(len(gates.rules))]
        noise = [gate.draw_noise(generator) if one else None for (gate, _), one in zip(gates, batch, strict=True)]
        return cls.of(gates, noise)

    @classmethod
    def of(cls, gates: GateSet, noise: Sequence[Tensor | None]) -> Draw:
        """The draw that some noise gives."""
        leaves: list[Tensor] = []
        sources: list[Tensor] = []
        with _undisturbed(gates.device), torch.enable_grad():
            parts = [
                _sample(gate, norms, noise_of, leaves, sources)
                if number not in gates.per_example
                else torch.ones(gate.layout.total, dtype=gate.dtype, device=gates.device)
                for number, ((gate, norms), noise_of) in enumerate(zip(gates, noise, strict=True))
            ]
            one = torch.ones(1, dtype=parts[0].dtype, device=gates.device)
            graph = torch.cat([*(part.to(gates.device) for part in parts), one])
        kept = _Kept(graph, tuple(leaves)) if graph.requires_grad else None
        return cls(noise, graph.detach(), kept, sources)

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


def _for_examples(gate: Gate, noise: Tensor | None, n: int) -> Draw:
    leaves: list[Tensor] = []
    sources: list[Tensor] = []
    with _undisturbed(gate.layout.segment.device), torch.enable_grad():
        graph = extended(_sample(gate, None, noise, leaves, sources).expand(n, -1))
    kept = _Kept(graph, tuple(leaves)) if graph.requires_grad else None
    return Draw((noise,), graph.detach(), kept, sources)


def _sample(
    gate: Gate, norms: Norms | None, noise: Tensor | None, leaves: list[Tensor], sources: list[Tensor]
) -> Tensor:
    """One rule's draw from detached stand-ins; those that need a gradient join ``leaves``, as ``sources``."""
    pathwise = gate.method.estimator == "pathwise"

    def stand_in(tensor: Tensor) -> Tensor:
        twin = tensor.detach()
        if pathwise and tensor.requires_grad:
            leaves.append(twin.requires_grad_())
            sources.append(tensor)
        return twin

    dtype = gate.dtype or torch.float32
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
