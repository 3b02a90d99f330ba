"""How long a draw of the gates lives.

A draw serves one training forward of the root module: a plain forward pre-hook makes it, every weight that is read
until the next root forward shares it, and a recomputation (activation checkpointing) finds the draw of the forward
that it repeats. Draws lie outside modules, each kept as long as its `GateSet`, so that copies of a model, their state
dicts and broadcasts of buffers never meet them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map

from secateur.errors import GateError
from secateur.pruning.distributed import reaching
from secateur.pruning.draw import Draw
from secateur.pruning.gateset import GateSet, extended
from secateur.pruning.repeats import Repeats
from secateur.structure.example import Example

__all__ = [
    "GATES",
    "Live",
    "Narrows",
    "begin_forward",
    "drawn_now",
    "end_forward",
    "first_rows",
    "fixed_now",
    "gates_of",
    "in_backward",
    "live_of",
    "values",
    "values_by_example",
]

#: The name under which a root module holds its gates.
GATES = "secateur_gates"
#: Up to this many bytes the inputs of the first training forward are noted whole: little beside what training takes.
NOTED_BYTES = 2**26


class Narrows(Protocol):
    """Leaves the closed units of a draw out of a forward pass of the root, between its two hooks."""

    def begin(self, draw: Draw) -> None:
        """Before the pass."""

    def end(self) -> None:
        """After it, even if it raised."""


@dataclass(eq=False)
class Live:
    """What is going on with one `GateSet` at the moment; never part of a module.

    Args:
        generator: source of all draws.
        replay: the draw of the forward pass whose backward is running, as far as its output tells.
        fixed: evaluation gates during a root forward, with the state of the tensors they were computed from.
        override: extended gates that act instead of all others, for probing.
        held: whether root forwards keep the draw that there is.
        remember: whether to note the inputs of the first training forward, for a proof at the end.
        example: these inputs, of large ones the first rows.
        mean_loss: running mean of the losses so far, where a gate's method subtracts it.
        narrowing: what leaves closed units out of training forwards, where that is wanted now.
        unfinished: training forwards whose graph is alive and has not been through a backward pass.
        repeats: which draw acted when.
    """

    generator: torch.Generator
    replay: Draw | None = None
    fixed: tuple[tuple[tuple[int, int], ...], Tensor] | None = None
    override: Tensor | None = None
    held: bool = False
    remember: bool = False
    example: Example | None = None
    mean_loss: Tensor | None = None
    narrowing: Narrows | None = None
    unfinished: WeakSet[_Passed] = field(default_factory=WeakSet)
    repeats: Repeats = field(default_factory=Repeats)
    _draw: Draw | None = None

    @property
    def draw(self) -> Draw | None:
        """The current draw."""
        return self._draw

    @draw.setter
    def draw(self, draw: Draw | None) -> None:
        self._draw = draw
        self.repeats.note(draw)

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


#: By the identity of the gate set, each until its gate set is gone. What torch.compile makes depends on the one entry
#: that it reads; with weak keys it would depend on how many other models with gates there are.
_LIVE: dict[int, Live] = {}


def live_of(gates: GateSet) -> Live:
    """The state of a gate set; a copy of a model, which has none yet, starts one from the gate set's own seed."""
    live = _LIVE.get(id(gates))
    if live is None:
        live = _LIVE[id(gates)] = Live(torch.Generator().manual_seed(gates.seed))
        weakref.finalize(gates, _LIVE.pop, id(gates)).atexit = False
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
    draw = drawn_now(gates, training)
    return fixed_now(gates) if draw is None else draw.read()


def drawn_now(gates: GateSet, training: bool) -> Draw | None:
    """The draw that acts now; None where gates are fixed, or others act instead."""
    live = live_of(gates)
    return _acting(gates, live) if live.override is None and training and gates.training else None


def fixed_now(gates: GateSet) -> Tensor:
    """The extended gates ``(U + 1,)`` that act where none are drawn."""
    live = live_of(gates)
    return _fixed(gates, live) if live.override is None else live.override


def values_by_example(gates: GateSet, rule: int, n: int, training: bool) -> Tensor | None:
    """The extended gates ``(n, U_rule + 1)`` of a rule that act now on each of ``n`` examples.

    None where gates are fixed, or others act instead, which are the same for all examples.
    """
    draw = drawn_now(gates, training)
    return None if draw is None else draw.of_examples(gates, live_of(gates).generator, rule, n).read()


def _acting(gates: GateSet, live: Live) -> Draw:
    """The draw that acts now; made where there is none."""
    draw = live.draw
    if in_backward() and not torch.compiler.is_compiling():
        draw = live.repeats.find() or live.replay or draw
        if draw is not None and draw.narrowed:
            raise GateError(
                "part of a forward pass that left closed units out is computed again (activation checkpointing), and"
                " would not leave them out; attach with conditional=False"
            )
    if draw is None:
        draw = live.draw = Draw.make(gates, live.generator)
    return draw


def begin_forward(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the root: a new draw for a new training forward."""
    gates = gates_of(root)
    live = live_of(gates)
    if in_backward():
        return
    _forget_cached(root)
    if live.override is not None:
        return
    if not gates.training:
        live.fixed = _stamp(gates), extended(gates.fixed())
        return
    if live.remember and live.example is None:
        live.example = _noted(args, kwargs)
    if not live.held:
        live.draw, live.replay = Draw.make(gates, live.generator), None
    if live.draw is not None and not torch.compiler.is_compiling():
        live.draw.read()  # here, for what ties it to its parameters cannot be made where layers are mapped
    if live.narrowing is not None and live.draw is not None and not torch.compiler.is_compiling():
        live.narrowing.begin(live.draw)


def end_forward(root: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of the root: the backward pass of this output will know which draw to repeat."""
    gates = gates_of(root)
    live = live_of(gates)
    if live.narrowing is not None and not in_backward():
        live.narrowing.end()
    live.fixed = None
    draw = live.draw
    if draw is None or not gates.training or not torch.is_grad_enabled() or in_backward():
        return None
    if not torch.compiler.is_compiling():
        output = reaching(output, gates.trained)
    # Nodes run in the reverse order of their making, so this fires before any region of this forward is repeated.
    passed = _Passed(live, draw)
    for tensor in _tensors(output):
        if tensor.grad_fn is not None:
            tensor.register_hook(passed)  # type: ignore[no-untyped-call]
            live.unfinished.add(passed)
    return output


def _forget_cached(root: nn.Module) -> None:
    """Within `torch.nn.utils.parametrize.cached`: weights of an earlier forward, which had other gates, go."""
    if parametrize._cache_enabled and not torch.compiler.is_compiling():
        own = {id(module) for module in root.modules()}
        for key in [key for key in parametrize._cache if key[0] in own]:
            del parametrize._cache[key]


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


def first_rows(example: Example) -> Example:
    """A call with the first two rows where all tensors have as many rows, else with all of them; no copy."""
    given = example.args, dict(example.kwargs)
    shapes = [leaf.shape for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    rows = {shape[0] if shape else 0 for shape in shapes}
    stop = 2 if len(rows) == 1 else None
    return Example(*tree_map(lambda leaf: leaf[:stop] if isinstance(leaf, Tensor) and leaf.dim() else leaf, given))


def _noted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
    """A copy of a forward's inputs. Whether its rows are examples shows when the model is called with some of them."""
    example = Example(args, kwargs)
    size = sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    if size > NOTED_BYTES:
        example = first_rows(example)
    given = example.args, dict(example.kwargs)
    return Example(*tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, given))


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of an output: of containers, and one level deep into objects of a user's own class."""
    for leaf in (output,) if isinstance(output, Tensor) else tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif leaf is not None and hasattr(leaf, "__dict__"):
            inner: Mapping[str, Any] = vars(leaf)
            yield from (item for item in tree_leaves(list(inner.values())) if isinstance(item, Tensor))
