"""Tracing: from a model and example inputs to its structure.

The way through: every index of every parameter gets an id (``sites``); the model runs on fake tensors
in both modes while rules tie and freeze ids (``runs``, ``record``, ``rules``); ids are solved into units
and groups (``coupling``, ``grouping``); all groups are cut at once on fake tensors, and what does not
survive that is frozen (``trial``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from secateur.errors import TraceError
from secateur.structure.attributes import SizedAttributes, settle
from secateur.structure.coupling import Coupling
from secateur.structure.example import Example, Examples, as_examples
from secateur.structure.grouping import group_units
from secateur.structure.groups import Structure
from secateur.structure.norms import RmsNorm, find_rms_norms
from secateur.structure.runs import Run, RunFailure, Setting, run
from secateur.structure.sites import Sites
from secateur.structure.trial import Recorded, Trial

__all__ = ["trace"]


def trace(model: nn.Module, examples: Examples) -> Structure:
    """Find which units of a model can go, and what is coupled to what.

    The model itself is not run and not changed: a copy on fake tensors is, in evaluation and training
    mode, for every example. Models that look at values fall back to a real copy.

    Args:
        model: any ``nn.Module``, on any one device, ``meta`` included.
        examples: a tuple of positional inputs, an ``sc.Example(args, kwargs)``, or a list of these. Use
            two or more examples a batch, for BatchNorm cannot train on one.

    Returns:
        The structure; ``print`` it.

    Raises:
        TraceError: the model is wrapped, lazy, or on several devices; the examples do not fit it.

    Example:
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> sc.trace(net, examples=(torch.zeros(2, 4),)).group("0").size
        8
    """
    _check(model)
    calls = as_examples(examples)
    coupling = Coupling()
    sites = Sites.of(model, coupling)
    norms = find_rms_norms(model)
    recorded, notes = _record(model, calls, sites, coupling, norms)
    read = frozenset().union(*(one.run.read for one in recorded))
    for one in recorded:
        _freeze_outputs(coupling, one.run)
    attributes = SizedAttributes()
    while True:
        grouping = group_units(coupling, sites, read, norms, notes)
        if not grouping.structure.groups:
            return grouping.structure
        pairs = any(group.size == 2 for group in grouping.structure.groups)
        for trial in [
            Trial(model, recorded, sites, grouping, norms, pairs=p) for p in ((False, True) if pairs else (False,))
        ]:
            deviation = settle(model, recorded, trial, grouping, attributes)
            if deviation is not None:
                break
        else:
            return replace(grouping.structure, attributes=attributes.rules(grouping))
        blamed = trial.blame(deviation)
        if not blamed:
            raise TraceError(
                f"a trial cut failed and no unit explains it: {deviation.freeze}. Please report this model."
            )
        for group, freeze in blamed.items():
            coupling.freeze_at(grouping.ids_of(group), freeze)


def _record(
    model: nn.Module,
    calls: tuple[Example, ...],
    sites: Sites,
    coupling: Coupling,
    norms: Mapping[str, RmsNorm],
) -> tuple[list[Recorded], tuple[str, ...]]:
    """Run every example in evaluation and training mode; on fake tensors wherever they do."""
    labels = sites.labels()
    recorded: list[Recorded] = []
    notes: list[str] = []
    fake = True
    for position, example in enumerate(calls):
        for training in (False, True):
            coupling.count_products = position == 0 and not training
            try:
                try:
                    setting = Setting(example, training, fake)
                    one = run(model, setting, labels, coupling, norms)
                except RunFailure as failure:
                    if not fake or (training and recorded) or _on_meta(model):
                        raise
                    fake = False
                    if coupling.count_products:
                        coupling.products.clear()
                    setting = Setting(example, training, fake)
                    one = run(model, setting, labels, coupling, norms)
                    notes.append(
                        "the model does not run on fake tensors, so it was traced on the examples themselves, and "
                        f"another path for other values is not covered ({type(failure.error).__name__})"
                    )
            except RunFailure as failure:
                if not (training and recorded):
                    raise _does_not_run(position, training, failure) from failure.error
                notes.append(
                    f"training mode could not be traced ({type(failure.error).__name__}: {failure.error}); "
                    "only evaluation mode is covered"
                )
                continue
            recorded.append(Recorded(setting, one))
    return recorded, tuple(dict.fromkeys(notes))


def _freeze_outputs(coupling: Coupling, one: Run) -> None:
    coupling.operator = coupling.module = ""
    for label in one.outputs:
        for factor in label.factors:
            coupling.freeze(factor.ids, "is a model output")
    for label in one.escaped:
        for factor in label.factors:
            coupling.freeze(factor.ids, "escapes: a tensor that holds it is still alive after the forward")


def _check(model: nn.Module) -> None:
    """Refuse what cannot be traced as it is, each with what to do."""
    if not isinstance(model, nn.Module):
        raise TraceError(f"model: got {type(model).__name__}, expected a torch.nn.Module.")
    wrapped = {
        "DistributedDataParallel": "trace model.module, and wrap again afterwards",
        "DataParallel": "trace model.module",
        "FullyShardedDataParallel": "trace the module before it is sharded",
        "OptimizedModule": "trace what was given to torch.compile (model._orig_mod), and compile again afterwards",
    }
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            f"model: {kind} is scripted, and its Python forward is gone; trace the module before torch.jit."
        )
    if kind in wrapped:
        raise TraceError(f"model: {kind} wraps the model; {wrapped[kind]}.")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy:
        raise TraceError(f"model: {lazy[0]} has no shape yet (a lazy module); run the model once first.")
    devices = sorted({str(tensor.device) for _, tensor in tensors})
    if len(devices) > 1:
        raise TraceError(
            f"model: its tensors are on several devices ({', '.join(devices)}); move it to one to trace it."
        )
    if not any(True for _ in model.parameters()):
        raise TraceError(f"model: {kind} has no parameters, so there is nothing to prune.")


def _on_meta(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in model.parameters())


def _does_not_run(position: int, training: bool, failure: RunFailure) -> TraceError:
    where = failure.stack[-1] if failure.stack and failure.stack[-1] else "the model's forward"
    after = failure.entries[-1].operator if failure.entries else "no operator yet"
    return TraceError(
        f"examples[{position}] does not run through the model in {'training' if training else 'evaluation'} mode: in "
        f"{where}, after {after}: {type(failure.error).__name__}: {failure.error}. Give inputs that its forward "
        "accepts, with their dtypes and device; a model that looks at values cannot be traced on the meta device."
    )
