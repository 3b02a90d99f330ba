"""Tracing: from a model and example inputs to its structure.

The way through: every index of every parameter gets an id (``sites``); the model runs on fake tensors
in both modes while rules tie and freeze ids (``runs``, ``record``, ``rules``); ids are solved into units
and groups (``coupling``, ``grouping``); all groups are cut at once on fake tensors, and what does not
survive that is frozen (``trial``).
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._pytree import tree_leaves

from secateur.errors import TraceError
from secateur.structure.attributes import SizedAttributes, apart, of_bare_norms, settle, shared
from secateur.structure.coupling import Coupling, Freeze
from secateur.structure.example import Example, Examples, as_examples, summary
from secateur.structure.grouping import Grouping, group_units
from secateur.structure.ids import Label
from secateur.structure.modes import worth_trying
from secateur.structure.normed import freeze_read_weights
from secateur.structure.norms import RmsNorm, find_rms_norms
from secateur.structure.outputs import outputs_of
from secateur.structure.outside import Outside
from secateur.structure.plain import kept_whole, unfit
from secateur.structure.rulings import Rulings
from secateur.structure.runs import Run, RunFailure, Setting, run
from secateur.structure.sites import Sites
from secateur.structure.structure import Structure
from secateur.structure.trial import Deviation, Recorded, Trial

__all__ = ["trace"]


def trace(model: nn.Module, examples: Examples) -> Structure:
    """Find which units of a model can go, and what is coupled to what.

    The model itself is not run and not changed: a copy on fake tensors is, in evaluation and training
    mode, for every example. Models that look at values fall back to a real copy. What the forward keeps outside of
    the model (tables in globals, classes and caches) is afterwards as it was before.

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
    with _collector_at_rest():
        return _traced(model, as_examples(examples))


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """No garbage collection by the way: a trace makes many objects that stay, and a full search costs as much as it."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _traced(model: nn.Module, calls: tuple[Example, ...]) -> Structure:
    coupling = Coupling()
    sites = Sites.of(model, coupling)
    _freeze_from_the_start(model, coupling, sites)
    outside = Outside(model)
    norms = find_rms_norms(model, outside.nothing_left)
    rulings = Rulings(coupling)
    labels = {name: rulings.one(label) for name, label in sites.labels().items()}
    recorded, notes = _record(model, calls, labels, rulings, norms, outside)
    read = frozenset().union(*(one.run.read for one in recorded))
    for one in recorded:
        _freeze_outputs(coupling, one.run)
        freeze_read_weights(coupling, sites, norms, labels, one.run.entries)
    attributes = SizedAttributes()
    tried = worth_trying(model, recorded)
    while True:
        grouping = group_units(coupling, sites, read, norms, notes)
        if not grouping.structure.groups:
            return _with_calls(grouping.structure, recorded[0].run, grouping)
        failed = _failed(model, tried, sites, grouping, norms, attributes)
        if failed is None:
            followed = attributes.rules(grouping) + of_bare_norms(model, recorded[0].run.returned, grouping)
            structure = replace(grouping.structure, attributes=followed)
            return _with_calls(structure, recorded[0].run, grouping)
        trial, deviation, told_apart = failed
        blamed = trial.blame(deviation)
        if not blamed:
            raise TraceError(
                f"a trial cut failed and no unit explains it: {deviation.freeze}. Please report this model."
            )
        if pairs := shared(trial, deviation, blamed, grouping, attributes):
            for group, partner in pairs:
                coupling.tie(grouping.firsts_of(group), grouping.firsts_of(partner))
            continue
        for group in _largest(grouping, blamed) if told_apart else blamed:
            coupling.freeze_at(grouping.ids_of(group), blamed[group])


def _failed(
    model: nn.Module,
    tried: list[Recorded],
    sites: Sites,
    grouping: Grouping,
    norms: Mapping[str, RmsNorm],
    attributes: SizedAttributes,
) -> tuple[Trial, Deviation, bool] | None:
    """The first trial that fails, with where it does.

    One cut of all groups, groups of two apart; and the one that shows what the sizes of this one may hide, with True.
    """
    for pairs in (False, True) if any(group.size == 2 for group in grouping.structure.groups) else (False,):
        trial = Trial(model, tried, sites, grouping, norms, pairs=pairs)
        if (deviation := settle(model, tried, trial, grouping, attributes)) is not None:
            return trial, deviation, False
        # By now the attributes that the first cut needed are accepted.
        if not pairs or attributes.rules(grouping):
            trial = trial.with_keep(apart(grouping, attributes, pairs=pairs))
            if (deviation := settle(model, tried, trial, grouping, attributes)) is not None:
                return trial, deviation, True
    return None


def _largest(grouping: Grouping, blamed: Mapping[int, Freeze]) -> list[int]:
    """At each place the largest of the groups blamed for it: smaller ones never become as large as it is whole."""
    at: dict[str, list[int]] = defaultdict(list)
    for group, freeze in blamed.items():
        at[freeze.module].append(group)
    return [max(groups, key=lambda group: grouping.structure.groups[group].size) for groups in at.values()]


def _with_calls(structure: Structure, one: Run, grouping: Grouping) -> Structure:
    """The structure with what a run showed of the calls of modules."""
    return replace(structure, outputs=outputs_of(one.returned, grouping), branches=one.branches)


def _record(
    model: nn.Module,
    calls: tuple[Example, ...],
    labels: Mapping[str, Label],
    rulings: Rulings,
    norms: Mapping[str, RmsNorm],
    outside: Outside,
) -> tuple[list[Recorded], tuple[str, ...]]:
    """Run every example in evaluation and training mode; on fake tensors wherever they do."""
    coupling = rulings.coupling
    recorded: list[Recorded] = []
    notes: list[str] = []
    fake = True
    for position, example in enumerate(calls):
        for training in (False, True):
            coupling.count_products = position == 0 and not training
            try:
                try:
                    setting = Setting(example, training, fake, outside)
                    one = run(model, setting, labels, rulings, norms, calls=not recorded)
                except RunFailure as failure:
                    # Once evaluation has run on fake tensors, training is given real ones only where it asks for
                    # numbers: what else fails there, as a BatchNorm on one example, fails on them as well.
                    asks = isinstance(failure.error, _LOOKS_AT_VALUES)
                    if not fake or (training and recorded and not asks) or _on_meta(model):
                        raise
                    fake = False
                    if coupling.count_products:
                        coupling.products.clear()
                    setting = Setting(example, training, fake, outside)
                    one = run(model, setting, labels, rulings, norms, calls=not recorded)
                    where = " in training mode" if training else ""
                    notes.append(
                        f"the model does not run on fake tensors{where}, so it was traced on the examples themselves, "
                        f"and another path for other values is not covered ({type(failure.error).__name__})"
                    )
            except RunFailure as failure:
                if not (training and recorded):
                    raise _does_not_run(model, f"examples[{position}]", setting, failure) from failure.error
                notes.append(
                    f"training mode could not be traced ({type(failure.error).__name__}: {failure.error}); "
                    f"only evaluation mode is covered{_BATCH if _ONE_VALUE in str(failure.error) else ''}"
                )
                continue
            recorded.append(Recorded(setting, one))
    if outside.kept():
        notes.append(_KEPT)
    return recorded, tuple(dict.fromkeys(notes))


def _freeze_from_the_start(model: nn.Module, coupling: Coupling, sites: Sites) -> None:
    """Freeze what weights are computed from before they are read, with that as the first reason."""
    for name, reason in kept_whole(model).items():
        first = sites.aliases.get(name, name)
        for site, tensor in enumerate(sites.tensors):
            if tensor == first:
                coupling.freeze_at(sites.ids(site), Freeze(reason, module=name.partition(".parametrizations.")[0]))


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
    if problem := unfit(model):
        raise TraceError(f"{problem}.")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    devices = sorted({str(tensor.device) for _, tensor in tensors})
    if len(devices) > 1:
        raise TraceError(
            f"model: its tensors are on several devices ({', '.join(devices)}); move it to one to trace it."
        )
    if not any(True for _ in model.parameters()):
        raise TraceError(f"model: {type(model).__name__} has no parameters, so there is nothing to prune.")


def _on_meta(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in model.parameters())


def _does_not_run(model: nn.Module, name: str, setting: Setting, failure: RunFailure) -> TraceError:
    where = failure.stack[-1] if failure.stack and failure.stack[-1] else "the model's forward"
    after = f"after {failure.entries[-1].operator}" if failure.entries else "before its first operator"
    own = str(next(model.parameters()).device)
    given = sorted(
        {
            str(leaf.device)
            for leaf in tree_leaves(setting.example.args) + tree_leaves(dict(setting.example.kwargs))
            if isinstance(leaf, torch.Tensor)
        }
    )
    asks = isinstance(failure.error, _LOOKS_AT_VALUES) or "meta tensor" in str(failure.error)
    if asks and _on_meta(model) and given in ([], ["meta"]):
        advice = (
            "It looks at values, and tensors on the meta device have none: trace a model and inputs that are on the CPU"
        )
    elif given not in ([], [own]):
        advice = f"The inputs are on {', '.join(given)} and the model on {own}: move them there"
    else:
        advice = f"It was called with {summary(setting.example)}; give inputs that its forward accepts"
    return TraceError(
        f"{name} does not run through the model in {'training' if setting.training else 'evaluation'} mode: in "
        f"{where}, {after}: {type(failure.error).__name__}: {failure.error}. {advice}."
    )


_KEPT = (
    "the forward keeps tensors where they could not be taken back, and what this trace left there has no numbers: call"
    " the model once before it is traced, so that what it keeps is there"
)
#: What fake tensors raise where a number is asked of them.
_LOOKS_AT_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
#: What torch's BatchNorm says of a batch that it cannot train on.
_ONE_VALUE = "Expected more than 1 value per channel"
_BATCH = ": BatchNorm cannot train on one example, so give two or more"
