"""Which draw a part of a forward pass had that is computed again during backward.

Operators are numbered in the order in which a thread makes their nodes. So the node whose backward is running says when
it was made, and what was noted here, which draw acted then.
"""

from __future__ import annotations

import sys
import threading
import weakref
from functools import partial
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils.checkpoint import CheckpointFunction

from secateur.errors import GateError
from secateur.pruning.draw import Draw

__all__ = ["Repeats", "keep_with"]

#: Under this name a node of a graph keeps its draw.
_KEY = "secateur_draw"
#: What runs a region under reentrant checkpointing.
_REGION = CheckpointFunction.forward.__code__


class Repeats:
    """The draws of one gate set over time, each as long as somebody else keeps it."""

    def __init__(self) -> None:
        #: from which number on which draw acted, in order
        self._since: list[tuple[int, weakref.ref[Draw] | None]] = []
        self._thread = 0
        #: by backward pass that is under way, the draw that it repeated last
        self._running: dict[int, Draw] = {}

    def note(self, draw: Draw | None) -> None:
        """From now on this draw acts."""
        if torch.compiler.is_compiling():
            self._since.clear()  # nodes are made later, and numbered otherwise
            return
        if self._thread != threading.get_ident():  # each numbers its own
            self._thread = threading.get_ident()
            self._since.clear()
        if torch._C._current_graph_task_id() == -1:
            self._running.clear()  # left by a backward pass that failed
        # Of those in a row that are gone, the first says it for all.
        gone = [seen is None or seen() is None for _, seen in self._since]
        self._since = [one for at, one in enumerate(self._since) if not (gone[at] and at and gone[at - 1])]
        number = _number_now()
        if self._since and self._since[-1][1] is None:
            number, _ = self._since.pop()  # no gate was read before this draw was made
        self._since.append((number, None if draw is None else weakref.ref(draw)))

    def find(self) -> Draw | None:
        """The draw to repeat in the backward pass that is running; None where nothing is known.

        Raises:
            GateError: it is gone.
        """
        task = torch._C._current_graph_task_id()
        # A pass within another one is of nodes that a repetition made.
        above = [other for other in self._running if other < task]
        draw = self._running[max(above)] if above else self._then()
        if draw is None:
            return None
        if task not in self._running:
            Variable._execution_engine.queue_callback(partial(self._done, task))
        self._running[task] = draw
        if self._thread == threading.get_ident():
            self._since.append((_next_number(), weakref.ref(draw)))
        return draw

    def _done(self, task: int) -> None:
        self._running.pop(task, None)

    def _then(self) -> Draw | None:
        """The draw that acted when the node was made whose backward is running."""
        node = cast("Any", torch._C._current_autograd_node())
        number = -1 if node is None else node._sequence_nr()
        seen = next((seen for since, seen in reversed(self._since) if since <= number), self)
        if seen is self:
            return None
        draw = None if seen is None else cast("weakref.ref[Draw]", seen)()
        if draw is None:
            raise GateError(
                "part of a forward pass is computed again (activation checkpointing), but the draw that it had is gone:"
                " the model has run since, and what that pass returned was dropped. Keep its output until the backward"
                " pass, use torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or call backward before the"
                " model runs again"
            )
        return draw


def keep_with(tensor: Tensor, draw: Draw) -> Tensor:
    """The tensor, with whose graph the draw stays, where parts of that graph will be computed again."""
    if tensor.grad_fn is not None and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        cast("dict[str, Any]", tensor.grad_fn.metadata)[_KEY] = draw
    return tensor


def _number_now() -> int:
    """The next node's number; within a reentrant region, whose only node was made before it ran, the number of that."""
    region = None
    if not torch.is_grad_enabled():
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code is _REGION:
                region = frame.f_locals["ctx"]
            frame = frame.f_back
    return _next_number() if region is None else int(region._sequence_nr())


def _next_number() -> int:
    return int(torch._C._autograd._get_sequence_nr())
