"""How long a draw of the gates lives, and how its gradient finds its way back.

A draw serves one training forward of the root module: a plain forward pre-hook makes it, every weight that is read
until the next root forward shares it, and a recomputation (activation checkpointing) finds the draw of the forward
that it repeats. Draws lie outside modules, keyed weakly by their `GateSet`, so that copies of a model, their state
dicts and broadcasts of buffers never meet them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map

from secateur.gates.gate import Gate
from secateur.pruning.gateset import GateSet, Norms, extended
from secateur.structure.example import Example

__all__ = [
    "GATES",
    "Draw",
    "Live",
    "begin_forward",
    "end_forward",
    "gates_of",
    "in_backward",
    "live_of",
    "values",
    "values_by_example",
    "values_of",
]

#: The name under which a root module holds its gates.
GATES = "secateur_gates"


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


@dataclass(eq=False)
class Live:
    """What is going on with one `GateSet` at the moment; never part of a module.

    Args:
        generator: source of all draws.
        draw: the current draw.
        replay: the draw of the forward pass whose backward is running.
        fixed: evaluation gates during a root forward, with the state of the tensors they were computed from.
        override: extended gates that act instead of all others, for probing.
        held: whether root forwards keep the draw that there is.
        remember: whether to note the inputs of the first training forward, for a proof at the end.
        example: these inputs.
        mean_loss: running mean of the losses so far, where a gate's method subtracts it.
        unfinished: training forwards whose graph is alive and has not been through a backward pass.
    """

    generator: torch.Generator
    draw: Draw | None = None
    replay: Draw | None = None
    fixed: tuple[tuple[tuple[int, int], ...], Tensor] | None = None
    override: Tensor | None = None
    held: bool = False
    remember: bool = False
    example: Example | None = None
    mean_loss: Tensor | None = None
    unfinished: WeakSet[_Passed] = field(default_factory=WeakSet)

    @contextlib.contextmanager
    def hold(self, draw: Draw) -> Iterator[None]:
        """Within it every forward pass uses ``draw``."""
        before, self.held, self.draw, self.replay = self.held, True, draw, None
        try:
            yield
        finally:
            self.held = before

    @contextlib.contextmanager
    def overridden(self, gates: Tensor) -> Iterator[None]:
        """Within it the extended gates ``(U + 1,)`` act, whatever the mode."""
        self.override = gates
        try:
            yield
        finally:
            self.override = None


_LIVE: WeakKeyDictionary[GateSet, Live] = WeakKeyDictionary()


def live_of(gates: GateSet) -> Live:
    """The state of a gate set; a copy of a model, which has none yet, starts one from the gate set's own seed."""
    live = _LIVE.get(gates)
    if live is None:
        live = _LIVE[gates] = Live(torch.Generator().manual_seed(gates.seed))
    return live


def gates_of(root: nn.Module) -> GateSet:
    """The gates that a root module holds."""
    gates = root._modules[GATES]
    assert isinstance(gates, GateSet)
    return gates


def values(gates: GateSet, training: bool) -> Tensor:
    """The extended gates ``(U + 1,)`` that act now.

    Args:
        gates: of the model.
        training: whether the module that reads them is in training mode. Gates are drawn where both it and the model's
            gates are, and fixed elsewhere.
    """
    live = live_of(gates)
    if live.override is not None:
        return live.override
    if not (training and gates.training):
        return _fixed(gates, live)
    return _acting(gates, live).read()


def values_of(gates: GateSet, training: bool, start: int, size: int) -> Tensor:
    """The gates ``(size,)`` of one group, by where it starts, that act now."""
    live = live_of(gates)
    if live.override is None and training and gates.training:
        return _acting(gates, live).part(gates, start, size)
    return values(gates, training).narrow(0, start, size)


def values_by_example(gates: GateSet, rule: int, n: int, training: bool) -> Tensor | None:
    """The extended gates ``(n, U_rule + 1)`` of a rule that act now on each of ``n`` examples.

    None where gates are fixed, or others act instead, which are the same for all examples.
    """
    live = live_of(gates)
    if live.override is not None or not (training and gates.training):
        return None
    return _acting(gates, live).of_examples(gates, live.generator, rule, n).read()


def _acting(gates: GateSet, live: Live) -> Draw:
    """The draw that acts now; made where there is none."""
    draw = live.replay if live.replay is not None and in_backward() else live.draw
    if draw is None:
        draw = live.draw = Draw.make(gates, live.generator)
    return draw


def begin_forward(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the root: a new draw for a new training forward."""
    gates = gates_of(root)
    live = live_of(gates)
    if in_backward() or live.override is not None:
        return
    if not gates.training:
        live.fixed = _stamp(gates), extended(gates.fixed())
        return
    if live.remember and live.example is None:
        live.example = _noted(args, kwargs)
    if not live.held:
        live.draw, live.replay = Draw.make(gates, live.generator), None


def end_forward(root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of the root: the backward pass of this output will know which draw to repeat."""
    gates = gates_of(root)
    live = live_of(gates)
    live.fixed = None
    draw = live.draw
    if draw is None or not gates.training or not torch.is_grad_enabled() or in_backward():
        return
    # Nodes run in the reverse order of their making, so this fires before any region of this forward is repeated.
    passed = _Passed(live, draw)
    for tensor in _tensors(output):
        if tensor.grad_fn is not None:
            tensor.register_hook(passed)  # type: ignore[no-untyped-call]
            live.unfinished.add(passed)


class _Passed:
    """Hook on a forward's outputs, which lives as long as its graph: the backward pass knows which draw to repeat."""

    def __init__(self, live: Live, draw: Draw) -> None:
        self._live = live
        self._draw = draw

    def __call__(self, grad: Tensor) -> None:
        self._live.replay = self._draw
        self._live.unfinished.discard(self)


def _fixed(gates: GateSet, live: Live) -> Tensor:
    if live.fixed is not None and live.fixed[0] == _stamp(gates):
        return live.fixed[1]
    return extended(gates.fixed())


def _stamp(gates: GateSet) -> tuple[tuple[int, int], ...]:
    """Which tensors the fixed gates come from, and how often each was written: what an interrupted forward left behind
    must not outlive a change.
    """  # noqa: D205
    tensors: list[Tensor | None] = [gates.pinned, gates.left]
    for gate, norms in gates:
        tensors += [*gate._parameters.values(), *gate._buffers.values(), *(() if norms is None else norms.weights)]
    return tuple((id(item), 0 if item is None or item.is_inference() else item._version) for item in tensors)


def in_backward() -> bool:
    """Whether autograd is at work: a forward pass now is a recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)


def _noted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
    """A copy of a forward's inputs: the first two rows where all tensors have as many rows, else all of them."""
    shapes = [leaf.shape for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    rows = {shape[0] if shape else 0 for shape in shapes}
    stop = 2 if len(rows) == 1 else None

    def copy(leaf: Any) -> Any:
        return leaf[:stop].detach().clone() if isinstance(leaf, Tensor) and leaf.dim() else leaf

    return Example(*tree_map(copy, (args, kwargs)))


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of an output: of containers, and one level deep into objects of a user's own class."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif leaf is not None and hasattr(leaf, "__dict__"):
            inner: Mapping[str, Any] = vars(leaf)
            yield from (item for item in tree_leaves(list(inner.values())) if isinstance(item, Tensor))
