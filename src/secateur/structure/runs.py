"""Runs of a model under the recorder: on fake tensors, or on a real copy where fake ones do not do.

Both the trace and the trial run a model this way; neither touches the model itself.
"""

from __future__ import annotations

import logging
import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from secateur.errors import TraceError
from secateur.structure.branches import Branches
from secateur.structure.copies import deep_copy, fake_copy
from secateur.structure.example import Example
from secateur.structure.ids import Label
from secateur.structure.nested import tensors_in
from secateur.structure.normed import as_one_operator
from secateur.structure.norms import RmsNorm
from secateur.structure.outside import Outside
from secateur.structure.plain import with_graph
from secateur.structure.record import Entry, Leaving, Recorder, watch
from secateur.structure.rulings import Rulings
from secateur.structure.tensors import distinct_tensors, listed

__all__ = ["Run", "RunFailure", "Setting", "run"]


@dataclass(frozen=True, eq=False)
class Setting:
    """How a model is run.

    Args:
        example: its inputs.
        training: its mode.
        fake: whether on fake tensors.
        outside: what its code may write to without it, as it was.
    """

    example: Example
    training: bool
    fake: bool
    outside: Outside


@dataclass(frozen=True, eq=False)
class Run:
    """What one forward did.

    Args:
        entries: its operators.
        outputs: labels of the tensors that it returned.
        escaped: labels of tensors that outlived it in another way.
        read: names of the parameters and buffers that it read.
        returned: labels of what the modules returned, call by call, where calls were noted.
        branches: paths of its residual branches, where calls were noted.
    """

    entries: list[Entry]
    outputs: list[Label]
    escaped: list[Label]
    read: frozenset[str]
    returned: Mapping[str, Sequence[Label]]
    branches: tuple[str, ...]


class RunFailure(Exception):  # noqa: N818 - what failed is the user's model, not this code
    """A forward raised; carries how far it came.

    Args:
        entries: operators until then.
        stack: modules in execution, the innermost last.
        error: what was raised.
    """

    def __init__(self, entries: list[Entry], stack: list[str], error: Exception) -> None:
        super().__init__(str(error))
        self.entries, self.stack, self.error = entries, stack, error


def run(
    model: nn.Module,
    setting: Setting,
    labels: Mapping[str, Label],
    rulings: Rulings,
    norms: Mapping[str, RmsNorm],
    *,
    calls: bool = False,
    prepare: Callable[[nn.Module], None] | None = None,
    on_entry: Callable[[int, Entry], None] | None = None,
) -> Run:
    """Run a copy of ``model`` once and record it.

    Args:
        model: any module; only a copy runs.
        setting: its inputs and mode.
        labels: label of each parameter and buffer, after ``prepare``.
        rulings: the rules, and where they write; the same for all runs with these labels.
        norms: its RMSNorm layers.
        calls: whether to note what modules return, and which of them are residual branches.
        prepare: changes the copy before it runs (the trial cuts it).
        on_entry: called with each recorded operator; may raise to end the run.

    Raises:
        RunFailure: the forward raised.
        TraceError: the model cannot be copied.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True) if setting.fake else None
    recorder = Recorder(rulings, mode, on_entry, branches=Branches() if calls else None)
    try:
        found = _recorded(model, setting, labels, norms, recorder, prepare)
    finally:
        _take_back(setting, recorder)
    if isinstance(found, RunFailure):
        raise found from found.error
    return found


def _recorded(
    model: nn.Module,
    setting: Setting,
    labels: Mapping[str, Label],
    norms: Mapping[str, RmsNorm],
    recorder: Recorder,
    prepare: Callable[[nn.Module], None] | None,
) -> Run | RunFailure:
    """What the run of a copy did, or how it failed; nothing holds the copy afterwards."""
    mode = recorder.fake_mode
    twin = _copied(model, mode)
    if prepare is not None:
        prepare(twin)
    twin.train(setting.training)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in distinct_tensors(twin).items():
        tensors[name] = tensor
        if tensor.is_floating_point():
            tensor.requires_grad_(isinstance(tensor, nn.Parameter))
        recorder.set_label(tensor, labels[name])
    convert: Callable[[Any], Any] = torch.clone if mode is None else mode.from_tensor

    def give(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        made = convert(value.detach())
        recorder.set_label(made, Label(tuple(made.shape), data=True))
        return made

    args, kwargs = tree_map(give, tuple(setting.example.args)), tree_map(give, dict(setting.example.kwargs))
    error: Exception | None = None
    # What a model compiled by itself runs as it was written, or a compiler would compile the recorder.
    with (
        as_one_operator(twin, norms),
        watch(twin, recorder),
        _same_draws(twin),
        _quiet(),
        torch.compiler.set_stance("force_eager"),
        _in_single_operators(),
    ):
        try:
            with Leaving(recorder) if mode is None else mode, recorder:
                out = twin(*args, **kwargs)
        except Exception as raised:  # noqa: BLE001 - any error of a user's model is reported with its place
            error = raised
    if error is not None:
        if prepare is not None:
            error = _without_frames(error)
        return RunFailure(recorder.entries, list(recorder.stack), error)
    returned = tensors_in(out)
    if not returned:
        raise TraceError(
            f"the model returned {type(out).__name__}, in which no tensor was found; expected a tensor or a container, "
            "dataclass or object that holds tensors. Wrap the model so that its forward returns the tensors themselves."
        )
    outputs = [recorder.label(tensor) for tensor in returned]
    known = {id(tensor) for tensor in tensors.values()}
    read = frozenset(name for name, tensor in tensors.items() if id(tensor) in recorder.read)
    del out, returned, args, kwargs
    escaped = recorder.alive(besides=known) if recorder.coupling.recording else []
    branches = () if recorder.branches is None else tuple(recorder.branches.found())
    return Run(recorder.entries, outputs, escaped, read, recorder.returned, branches)


def _take_back(setting: Setting, recorder: Recorder) -> None:
    """Undo what the run left outside of its copy; costly only where tensors of it are still there."""
    recorder.unwrite()
    mode = recorder.fake_mode
    left = {id(tensor) for tensor in recorder.left()}
    if left:
        setting.outside.take_back(
            lambda value: id(value) in left if mode is None else type(value) is FakeTensor and value.fake_mode is mode
        )
        if mode is not None:
            setting.outside.suspects += map(weakref.ref, recorder.left())


def _without_frames(error: Exception) -> Exception:
    """The error of a cut copy, which nobody debugs, without the frames that hold the tensors of its forward."""
    one: BaseException | None = error
    while one is not None:
        one.__traceback__, one = None, one.__cause__ or one.__context__
    return error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep fake tensors from logging an error that is expected and handled."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@contextmanager
def _same_draws(model: nn.Module) -> Iterator[None]:
    """Let each run draw the same numbers, for a model may branch on one, and leave the caller's generators alone."""
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the generator that models draw from
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


@contextmanager
def _in_single_operators() -> Iterator[None]:
    """Without oneDNN: with it an LSTM is one operator, not the products that it is made of."""
    onednn: Any = torch.backends.mkldnn
    before, onednn.enabled = onednn.enabled, False
    try:
        yield
    finally:
        onednn.enabled = before


def _copied(model: nn.Module, mode: FakeTensorMode | None) -> nn.Module:
    try:
        return deep_copy(model) if mode is None else fake_copy(model, mode)
    except Exception as error:
        named = listed(with_graph(model))
        raise TraceError(
            f"the model ({type(model).__name__}) cannot be copied: {type(error).__name__}: {error}. Tracing works on a "
            "copy; make the model pass copy.deepcopy: no open files, locks, or tensors with a graph as attributes"
            f"{named and f' (it has {named})'}."
        ) from error
