"""Tracing: from a model and example inputs to its structure.

The way through: every index of every parameter gets an id (``sites``); the model runs on fake tensors
in both modes while rules tie and freeze ids (``runs``, ``record``, ``rules``); ids are solved into units
and groups (``coupling``, ``grouping``); all groups are cut at once on fake tensors, and what does not
survive that is frozen (``trial``).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin

from secateur.errors import TraceError
from secateur.structure.coupling import Coupling
from secateur.structure.example import Example, Examples, as_examples
from secateur.structure.grouping import Grouping, group_units
from secateur.structure.groups import Structure
from secateur.structure.runs import NEEDS_VALUES, Run, RunFailure, run
from secateur.structure.sites import Sites
from secateur.structure.trial import Trial, TrialFailure

__all__ = ["trace"]

_MAX_TRIALS = 200


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
    runs, notes = _runs(model, calls, sites, coupling)
    read = frozenset().union(*(one.read for _, one, _, _ in runs))
    for _, one, _, _ in runs:
        _freeze_outputs(coupling, one)
    for _ in range(_MAX_TRIALS):
        grouping = group_units(coupling, sites, read, notes)
        failure = _try(model, runs, sites, coupling, grouping)
        if failure is None:
            return grouping.structure
        if not failure.groups:
            raise TraceError(
                f"the trial cut failed and no unit explains it; please report this model: {failure.freeze.reason}"
            )
        for name in failure.groups:
            coupling.freeze_at(grouping.ids_of(name), failure.freeze)
    raise TraceError(f"after {_MAX_TRIALS} trial cuts some still failed, the last because it {failure.freeze.reason}.")


_Runs = list[tuple[Example, Run, bool, bool]]


def _runs(
    model: nn.Module, calls: tuple[Example, ...], sites: Sites, coupling: Coupling
) -> tuple[_Runs, tuple[str, ...]]:
    """Record every example in evaluation and training mode."""
    labels = sites.labels()
    runs: _Runs = []
    notes: list[str] = []
    fake = True
    for position, example in enumerate(calls):
        for training in (False, True):
            coupling.count_products = position == 0 and not training
            while True:
                try:
                    one = run(model, example, labels, coupling, training=training, fake=fake)
                except RunFailure as failure:
                    if fake and (
                        isinstance(failure.error, NEEDS_VALUES) or isinstance(failure.error.__cause__, NEEDS_VALUES)
                    ):
                        _check_values_at_hand(model, failure)
                        fake = False
                        notes.append(
                            "the model looks at values, so it was traced on the examples themselves: another path for "
                            "other values is not covered"
                        )
                        continue
                    if training and runs:
                        notes.append(
                            f"training mode could not be traced ({type(failure.error).__name__}: {failure.error}); "
                            "only evaluation mode is covered"
                        )
                        break
                    raise _does_not_run(position, training, failure) from failure.error
                runs.append((example, one, training, fake))
                break
    return runs, tuple(dict.fromkeys(notes))


def _freeze_outputs(coupling: Coupling, one: Run) -> None:
    coupling.operator = coupling.module = ""
    for label in one.outputs:
        for factor in label.factors:
            coupling.freeze(factor.ids, "is a model output")
    for label in one.escaped:
        for factor in label.factors:
            coupling.freeze(factor.ids, "escapes: a tensor that holds it is still alive after the forward")


def _try(model: nn.Module, runs: _Runs, sites: Sites, coupling: Coupling, grouping: Grouping) -> TrialFailure | None:
    if not grouping.structure.groups:
        return None
    trial = Trial(sites, grouping)
    for example, one, training, fake in runs:
        failure = trial.check(model, example, one, training=training, fake=fake)
        if failure is not None:
            return failure
    return None


def _check(model: nn.Module) -> None:
    """Refuse what cannot be traced as it is, each with what to do."""
    if not isinstance(model, nn.Module):
        raise TraceError(f"model: got {type(model).__name__}, expected a torch.nn.Module.")
    wrapped = {
        "DistributedDataParallel": "trace model.module, and wrap again afterwards",
        "DataParallel": "trace model.module",
        "FullyShardedDataParallel": "trace the module before it is sharded",
        "OptimizedModule": "trace the module that was given to torch.compile (model._orig_mod), and compile again afterwards",
    }
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            f"model: {kind} is scripted, and its Python forward is gone; trace the module before torch.jit."
        )
    if kind in wrapped:
        raise TraceError(f"model: {kind} wraps the model; {wrapped[kind]}.")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, tensor in tensors if isinstance(tensor, UninitializedTensorMixin)]
    if lazy:
        raise TraceError(f"model: {lazy[0]} has no shape yet (a lazy module); run the model once first.")
    devices = sorted({str(tensor.device) for _, tensor in tensors})
    if len(devices) > 1:
        raise TraceError(
            f"model: its tensors are on several devices ({', '.join(devices)}); move it to one to trace it."
        )
    if not any(True for _ in model.parameters()):
        raise TraceError(f"model: {kind} has no parameters, so there is nothing to prune.")


def _check_values_at_hand(model: nn.Module, failure: RunFailure) -> None:
    if any(tensor.is_meta for tensor in model.parameters()):
        raise TraceError(
            f"the model looks at values (in {failure.stack[-1] if failure.stack else 'its forward'}: {failure.error}), and "
            "on the meta device there are none. Build it on a real device, or leave that part out of the traced module."
        ) from failure.error


def _does_not_run(position: int, training: bool, failure: RunFailure) -> TraceError:
    where = failure.stack[-1] if failure.stack and failure.stack[-1] else "the model's forward"
    after = failure.entries[-1].operator if failure.entries else "no operator yet"
    return TraceError(
        f"examples[{position}] does not run through the model in {'training' if training else 'evaluation'} mode: in "
        f"{where}, after {after}: {type(failure.error).__name__}: {failure.error}. Give inputs that the model's forward "
        "accepts, with their dtypes and device."
    )
