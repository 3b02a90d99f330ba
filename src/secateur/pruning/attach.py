"""Attaching gates to a model, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from secateur.budgets.budget import Budget, feasible
from secateur.budgets.costs import CostModel
from secateur.budgets.penalty import Penalty
from secateur.errors import GateError
from secateur.gates import Gate, Layout, Method
from secateur.pruning.activations import module_of
from secateur.pruning.activity import ActivityL2
from secateur.pruning.arguments import check_attach
from secateur.pruning.blocks import branch_of
from secateur.pruning.choose import Chosen, choose, with_custom
from secateur.pruning.conditional import When
from secateur.pruning.draws import live_of
from secateur.pruning.gateset import GateSet, Norms
from secateur.pruning.loading import accept_dense_keys, refuse_dense_keys
from secateur.pruning.outputs import check_calls, links, place_outputs
from secateur.pruning.placement import gated_sites, maps_of, place, strip
from secateur.pruning.probe import probe
from secateur.pruning.pruner import Pruner
from secateur.pruning.rule import ACTIVATIONS, Rule
from secateur.pruning.units import Units
from secateur.pruning.weights import columns
from secateur.structure.example import Examples, as_examples
from secateur.structure.groups import Group
from secateur.structure.plain import unfit
from secateur.structure.structure import Structure
from secateur.structure.tensors import listed, misfits, named_tensors
from secateur.structure.trace import trace

__all__ = ["attach"]


def attach(  # noqa: PLR0913 - all but the model by name
    model: nn.Module,
    *,
    examples: Examples | None = None,
    structure: Structure | None = None,
    method: Method | str | None = None,
    gates: Sequence[Rule] | None = None,
    budget: Budget | None = None,
    penalty: Penalty | None = None,
    l2: ActivityL2 | None = None,
    seed: int = 0,
    conditional: When = False,
) -> Pruner:
    """Put gates on a model, in place, and return the pruner that trains them; `Pruner.detach` undoes it.

    Gates multiply the slices of weights that read gated units. The model stays the same object, with the same
    parameters, and trains in any loop: its forward draws gates in training mode and uses fixed ones in evaluation mode.

    Args:
        model: a plain module, before it is wrapped (DDP), compiled or scripted.
        examples: inputs to trace with: a tuple of positional inputs, an ``sc.Example``, or a list of these. They are
            also kept for the proof at the end.
        structure: what ``sc.trace`` found, instead of tracing here.
        method: of all gates for which a rule names none; `HardConcrete` by default.
        gates: rules; one that gates every structured group by default.
        budget: the share of the dense cost to end at.
        penalty: a weight times the cost, instead of a budget. Without either only the task moves the gates.
        l2: of the gated weights, weighed by the chance that they are open; beside a budget or penalty, or alone.
        seed: of the gates' start and of all draws.
        conditional: whether `Pruner.loss` leaves units out of a step whose gates it draws as 0: `False`, ``"auto"``
            where that was measured to pay, or `True`. It changes no result.

    Raises:
        GateError: the model cannot take gates, nothing can go, a rule finds nothing, or an argument is of another kind
            than expected. The model is as it was then.
        TraceError: the model cannot be traced with these examples.
        BudgetError: the budget cannot be reached.

    Example:
        >>> import torch, secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> pruner = sc.attach(net, examples=(torch.zeros(2, 4),), budget=sc.Budget(keep_params=0.5))
        >>> optimizer = torch.optim.Adam(pruner.param_groups(lr=1e-2))
        >>> x, y = torch.randn(16, 4), torch.randn(16, 2)
        >>> for _ in range(3):
        ...     loss = pruner.loss(lambda: (net(x) - y).square().mean())
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     pruner.step()
        >>> small, report = pruner.finalize()
        >>> report.compact.params <= 0.5 * report.dense.params
        True
    """
    check_attach(
        examples=examples,
        structure=structure,
        gates=gates,
        budget=budget,
        penalty=penalty,
        l2=l2,
        seed=seed,
        conditional=conditional,
    )
    rules = [Rule()] if gates is None else list(gates)
    _check(model, computed=all(getattr(rule, "acts_on_outputs", False) for rule in rules))
    calls = () if examples is None else as_examples(examples)
    if structure is None:
        assert examples is not None
        structure = trace(model, examples)
    if problems := misfits(model, structure.shapes):
        raise GateError(f"the structure is not of this model: {listed(problems)}. Trace the model as it is now")
    structure = with_custom(structure, rules)
    chosen = choose(model, structure, rules, method)
    gated = [group for one in chosen for group in one.groups]
    linked = links(model, structure, gated, calls)
    check_calls(model, structure, gated, linked)
    units = Units(structure, chosen, columns(model, structure, gated), linked)
    costs = CostModel(units.counted, () if budget is None else budget.parts)
    goal = budget if budget is not None else penalty
    calibrated = all(one.method.calibrated for one in chosen)
    controller = None if goal is None else goal.start(costs, calibrated=calibrated)
    if budget is not None:
        feasible(costs, budget.targets(costs.dense), costs.exact(units.open(torch.zeros(sum(units.sizes)))))
    seed = int(seed)  # which NumPy's integers are not, to torch
    generator = torch.Generator().manual_seed(seed)
    gate_set, norms = _made(model, chosen, generator, seed)
    place(model, gate_set, maps_of(units.groups, structure.shapes))
    try:
        place_outputs(model, structure, gate_set, [one.groups for one in chosen])
        accept_dense_keys(model)
        _bind(model, norms, structure)
        probe(model, calls, [branch_of(group) for group in gated if group.kind == "blocks"])
        live = live_of(gate_set)
        live.generator, live.remember = generator, not calls
        return Pruner(model, units, costs, budget, controller, calls, l2, conditional)
    except BaseException:
        strip(model)
        refuse_dense_keys(model)
        raise


def _check(model: nn.Module, *, computed: bool) -> None:
    """Refuse what cannot be gated as it is, each with what to do.

    Args:
        model: as it was given.
        computed: whether its weights may be computed: gates at outputs alone leave them as they are.
    """
    if not isinstance(model, nn.Module):
        raise GateError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    advice = {
        "DistributedDataParallel": "attach to model.module before wrapping it",
        "DataParallel": "attach to model.module before wrapping it",
        "FullyShardedDataParallel": "attach before sharding",
        "OptimizedModule": "attach to model._orig_mod, which was given to torch.compile, and compile afterwards",
        "ScriptModule": "attach before torch.jit",
    }
    for kind in type(model).__mro__:
        if kind.__name__ in advice:
            raise GateError(f"model: a {type(model).__name__} cannot take gates; {advice[kind.__name__]}")
    if any(isinstance(module, GateSet) for module in model.modules()):
        raise GateError("model: it is gated already; call detach() of its pruner first")
    parametrized = [path or "the model" for path, module in model.named_modules() if is_parametrized(module)]
    if parametrized and not computed:
        raise GateError(
            f"model: {listed(parametrized)} has parametrizations (weight norm, spectral norm or others), and a weight"
            " that is computed cannot be cut; call torch.nn.utils.parametrize.remove_parametrizations first"
        )
    if problem := unfit(model):
        raise GateError(problem)


def _made(
    model: nn.Module, chosen: Sequence[Chosen], generator: torch.Generator, seed: int
) -> tuple[GateSet, list[Norms | None]]:
    """The gates of every rule, on the device and in at least the precision of the weights they act on."""
    tensors = named_tensors(model)
    gates: list[Gate] = []
    norms: list[Norms | None] = []
    for one in chosen:
        weight = _weight(model, tensors, one.groups[0])
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if one.method.uses_norms and any(group.kind == ACTIVATIONS for group in one.groups):
            raise GateError(
                f"{type(one.method).__name__} looks at the norms of weights, and gates on activations have none: give "
                "these units another method"
            )
        norm = Norms(one.groups).to(weight.device) if one.method.uses_norms else None
        start = None
        if norm is not None:
            with torch.no_grad():
                start = norm([tensors[name] for name in norm.tensors], dtype).cpu()
        layout = _layout(one)
        gates.append(Gate(one.method, layout, generator, dtype, weight.device, start))
        norms.append(norm)
    return GateSet(gates, norms, seed, [number for number, one in enumerate(chosen) if one.per_example]), norms


def _layout(one: Chosen) -> Layout:
    """Which gates of a rule make a group to its method: the units of each of its groups, or all of its blocks.

    Raises:
        GateError: the method leaves one unit of each group open, and a group has only one.
    """
    sizes = tuple(group.size for group in one.groups)
    if all(group.kind == "blocks" for group in one.groups):  # single units, of which some go
        sizes = (sum(sizes),)
    alone = [group.name for group, size in zip(one.groups, sizes, strict=False) if size == 1]
    if one.method.keeps_one and alone:
        raise GateError(
            f"{type(one.method).__name__} always leaves one unit of a group open, so the single unit of"
            f" {listed(alone)} can never close; give these units another method"
        )
    return Layout(sizes)


def _weight(model: nn.Module, tensors: Mapping[str, Tensor], group: Group) -> Tensor:
    """A tensor whose device and type gates of a group take: what they act on, or what is near it."""
    if group.kind != ACTIVATIONS:
        return tensors[group.gated[0].tensor]
    near = [*model.get_submodule(module_of(group)).parameters(), *model.parameters()]
    return next((tensor for tensor in near if tensor.is_floating_point()), torch.zeros(()))


def _bind(model: nn.Module, norms: Sequence[Norms | None], structure: Structure) -> None:
    """Tell norms where the weights are, now that parametrizations hold them."""
    chains = {structure.aliases.get(site.name, site.name): site.chain for site in gated_sites(model)}
    for norm in norms:
        if norm is not None:
            norm.bind([chains[name] for name in norm.tensors])
