"""Gates at what modules return: hooks that multiply, and what becomes of them when a model is cut.

Index conventions: ``Z`` gates of the model in a row, the *extended* gates ``(Z + 1,)`` end in a constant 1; ``S``
positions of the gated dimension of an output, ``B`` examples in a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map

from secateur.compaction.mask import copied, mask
from secateur.compaction.redraw import redraw_
from secateur.errors import GateError
from secateur.pruning.activations import Link, candidates, module_of, output_of
from secateur.pruning.draws import values, values_by_example
from secateur.pruning.gateset import GateSet
from secateur.pruning.rule import ACTIVATIONS
from secateur.structure.example import Example
from secateur.structure.groups import Group
from secateur.structure.nested import tensors_in
from secateur.structure.outputs import At, Output, same_units
from secateur.structure.outside import nothing_left
from secateur.structure.scale import scale_output_
from secateur.structure.structure import Structure
from secateur.structure.tensors import listed

__all__ = [
    "Multiplier",
    "OutputGate",
    "check_calls",
    "fold_",
    "links",
    "multipliers",
    "multiply_",
    "output_gates",
    "place_outputs",
    "remove_outputs",
]

#: Largest difference, as a share of the largest output, at which two models in float64 are the same function.
TOLERANCE = 1e-9


class OutputGate:
    """A forward hook: what a module returns, times the gates of the units along one dimension.

    Args:
        gates: of the model; a copy of the model copies hooks with it, and these find the copy's gates.
        output: of the module, as it was traced.
        dim: the gated dimension.
        sources: int64 ``(S,)``, the gate of each position, in the extended gates of the model, or of its rule where
            each example has a draw of its own.
        rule: number of that rule; None where one draw serves the batch.
        spread: ``sources`` in the extended gates of the model.
        folds: whether the module's own parameters can take the factors up.
    """

    def __init__(
        self, gates: GateSet, output: Output, dim: int, sources: Tensor, rule: int | None, spread: Tensor, folds: bool
    ) -> None:
        self.gates, self.output, self.dim, self.folds = gates, output, dim, folds
        self._sources, self._rule, self._spread = sources, rule, spread

    def factors(self) -> Tensor:
        """The gates of evaluation at each position, ``(S,)``."""
        gates = values(self.gates, training=False)
        return gates.index_select(0, self._spread.to(gates.device))

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor:
        """The gated output.

        Raises:
            GateError: the output is not what the trace saw.
        """
        rank, size = len(self.output.shape), self.output.shape[self.dim]
        if not isinstance(output, Tensor) or output.dim() != rank or output.shape[self.dim] != size:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise GateError(
                f"{self.output.module}: returns {got}, expected a tensor of {rank} dimensions with {size} positions "
                f"along dimension {self.dim}, as the trace saw: gates on activations need one shape but for the batch"
            )
        shape = [size if dim == self.dim else 1 for dim in range(rank)]
        drawn = None
        if self._rule is not None:
            drawn = values_by_example(self.gates, self._rule, len(output), module.training)
        if drawn is not None:
            factors = drawn.index_select(1, self._sources.to(drawn.device))
            shape[0] = len(output)
        else:
            gates = values(self.gates, module.training)
            factors = gates.index_select(0, self._spread.to(gates.device))
        return output * factors.to(output).view(shape)


class Multiplier(NamedTuple):
    """What a module's output is multiplied by in evaluation where no weight takes it up.

    Args:
        output: of the module.
        dim: its dimension.
        factors: ``(S,)``.
    """

    output: Output
    dim: int
    factors: Tensor


def check_calls(model: nn.Module, structure: Structure, groups: Sequence[Group], links: Mapping[str, Link]) -> None:
    """Refuse gates at a module that is called several times, if a cut would leave its calls different positions.

    A cut model multiplies the output of each call by the same factors, so these must be of the same units.

    Args:
        model: plain.
        structure: what the trace found.
        groups: every gated group.
        links: of activation groups, the groups that are cut with them.

    Raises:
        GateError: with the modules, and what to do.
    """
    cut = {group.name for group in groups} | {link.group for link in links.values()}
    if any(group.kind in ("inputs", "weights") for group in groups):
        cut |= {group.name for group in structure.groups}  # units that nothing reads any more go too
    problems = []
    for group in (group for group in groups if group.kind == ACTIVATIONS):
        output, dim = output_of(structure, module_of(group)), group.members[0].dim
        if _folds(structure, model.get_submodule(output.module), output, dim):
            continue  # its own parameters take the factors up, and lose what each call loses
        first, *others = (_of(cut, units.get(dim, {})) for units in (output.units, *output.others))
        if apart := [other for other in others if not same_units(first, other)]:
            problems.append(f"{output.module}: {_named(first)} at one call and {_named(apart[0])} at another")
    if problems:
        raise GateError(
            "gates at the output of a module that is called several times multiply every call alike, and a cut would"
            f" leave its calls different units along the gated dimension: {listed(problems)}. Give each call a module"
            " of its own (self.act1, self.act2), or leave the gates of the module or of these units out with exclude="
        )


def place_outputs(model: nn.Module, structure: Structure, gates: GateSet, rules: Sequence[Sequence[Group]]) -> None:
    """Hook the gates of all activation groups into a model that holds its gates, in place.

    Args:
        model: gated.
        structure: what the trace found.
        gates: of the model.
        rules: the groups of each rule.

    Raises:
        GateError: gates along two dimensions of one output, for a cut model multiplies along one.
    """
    dims: dict[str, int] = {}
    for group in (group for groups in rules for group in groups if group.kind == ACTIVATIONS):
        path, dim = module_of(group), group.members[0].dim
        if dims.setdefault(path, dim) != dim:
            raise GateError(
                f"{path}: gates along dimensions {dims[path]} and {dim} of one output; put one of them at another "
                "module, such as an nn.Identity behind it"
            )
    start = 0
    for number, groups in enumerate(rules):
        total, offset = sum(group.size for group in groups), start
        for group in groups:
            if group.kind == ACTIVATIONS:
                (member,) = group.members
                output = output_of(structure, module_of(group))
                local = np.full(output.shape[member.dim], total, dtype=np.int64)
                local[member.index] = np.arange(start - offset, start - offset + group.size)[:, None]
                spread = torch.from_numpy(np.where(local == total, gates.total, local + offset))
                rule = number if number in gates.per_example else None
                module = model.get_submodule(output.module)
                folds = _folds(structure, module, output, member.dim)
                hook = OutputGate(gates, output, member.dim, torch.from_numpy(local), rule, spread, folds)
                module.register_forward_hook(hook)
            start += group.size


def output_gates(model: nn.Module) -> Iterator[tuple[str, nn.Module, OutputGate]]:
    """Every gate at what a module returns, with the module."""
    for path, module in model.named_modules():
        for hook in module._forward_hooks.values():
            if isinstance(hook, OutputGate):
                yield path, module, hook


def remove_outputs(model: nn.Module) -> None:
    """Undo `place_outputs`."""
    for _, module, gate in list(output_gates(model)):
        for number in [number for number, hook in module._forward_hooks.items() if hook is gate]:
            del module._forward_hooks[number]


def fold_(plain: nn.Module, gated: nn.Module) -> None:
    """Multiply evaluation gates into the layers whose output is proportional to their parameters, in place.

    Args:
        plain: a copy without gates.
        gated: the model that it was copied from, in evaluation mode.
    """
    for path, _, gate in output_gates(gated):
        if gate.folds:
            target = plain.get_submodule(path)
            with torch.no_grad():
                for key in ("weight", "bias"):
                    tensor = target._parameters.get(key)
                    if tensor is not None:
                        factors = gate.factors().to(tensor)
                        tensor.mul_(factors.view([-1] + [1] * (tensor.dim() - 1)))


def multipliers(gated: nn.Module) -> dict[str, Multiplier]:
    """By module, the evaluation gates at its output that `fold_` leaves, but for those that are all 1."""
    found: dict[str, Multiplier] = {}
    for path, _, gate in output_gates(gated):
        factors = gate.factors().detach()
        if gate.folds or bool((factors == 1).all()):
            continue
        factors = factors * found[path].factors if path in found else factors
        found[path] = Multiplier(gate.output, gate.dim, factors)
    return found


def multiply_(
    small: nn.Module, left: Mapping[str, Multiplier], kept: Mapping[str, Tensor]
) -> dict[str, tuple[int, int]]:
    """Put what `multipliers` found on a cut model, in place, at the positions that it has.

    Returns:
        By module, the dimension and its size: the ``scales`` of a `CutPlan`.
    """
    scales: dict[str, tuple[int, int]] = {}
    for path, one in left.items():
        try:
            module = small.get_submodule(path)
        except AttributeError:  # it went with a block
            continue
        factors = one.factors[torch.from_numpy(one.output.kept(one.dim, kept)).to(one.factors.device)]
        if not bool((factors == 1).all()):
            scale_output_(module, factors.clone(), one.dim)
            scales[path] = one.dim, len(factors)
    return scales


def links(
    model: nn.Module, structure: Structure, groups: Sequence[Group], examples: Sequence[Example]
) -> dict[str, Link]:
    """The activation groups whose closed units can be cut: zeros at the output are zeros wherever the unit is read.

    What lies between decides: a ReLU passes zeros on, a bias or a BatchNorm does not, and a residual connection goes
    round. So it is tried, on a copy in float64 with all numbers drawn anew: half of the units closed at the output must
    give what `secateur.mask` gives, in evaluation and training mode, and so must the other half.

    Args:
        model: plain.
        structure: what the trace found.
        groups: every gated group.
        examples: inputs; without them nothing is linked.
    """
    found = candidates(structure, groups)
    if not found or not examples:
        return {}
    by_name = {group.name: group for group in groups}
    with nothing_left(model):
        if _same(model, structure, [(by_name[name], link) for name, link in found.items()], examples):
            return found
        return {
            name: link
            for name, link in found.items()
            if len(found) > 1 and _same(model, structure, [(by_name[name], link)], examples)
        }


def _of(names: Collection[str], at: At) -> At:
    return {name: unit for name, unit in at.items() if name in names}


def _named(at: At) -> str:
    return f"units of {', '.join(at)}" if at else "none that can go"


def _folds(structure: Structure, module: nn.Module, output: Output, dim: int) -> bool:
    """Whether a module's parameters can take up factors along a dimension of its output."""
    rank = len(output.shape)
    if isinstance(module, nn.Linear):
        along = rank - 1
    elif isinstance(module, _ConvNd) and not module.transposed:
        along = rank - 1 - len(module.kernel_size)
    elif isinstance(module, (_BatchNorm, nn.GroupNorm)):
        along = 1
    elif isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        along = rank - 1
    else:
        return False
    # Computed and missing weights have no entry, and what is tied has another role elsewhere.
    tied = {*structure.aliases, *structure.aliases.values()}
    own = {f"{output.module}.{key}" for key in ("weight", "bias")}
    return along == dim and f"{output.module}.weight" in structure.shapes and not own & tied


def _same(
    model: nn.Module, structure: Structure, linked: Sequence[tuple[Group, Link]], examples: Sequence[Example]
) -> bool:
    """Whether closing half of the units at outputs is what masking them is, for either half."""
    try:
        redrawn = copied(model).double()
        redraw_(redrawn, model, torch.Generator().manual_seed(0), redraw_buffers=True)
        return all(_same_half(redrawn, structure, linked, examples, half) for half in (0, 1))
    except Exception:  # noqa: BLE001 - a model that does not run so stays as it is, with its gates as multipliers
        return False


def _same_half(
    model: nn.Module, structure: Structure, linked: Sequence[tuple[Group, Link]], examples: Sequence[Example], half: int
) -> bool:
    closed_at_output, keep = copied(model), {}
    for group, link in linked:
        (member,) = group.members
        closed = np.arange(group.size) % 2 == half
        factors = torch.ones(output_of(structure, module_of(group)).shape[member.dim], dtype=torch.float64)
        factors[torch.from_numpy(member.index[closed].reshape(-1))] = 0.0
        scale_output_(closed_at_output.get_submodule(module_of(group)), factors, member.dim)
        keep[link.group] = torch.from_numpy(np.sort(link.units[~closed]))
    masked = mask(model, structure, keep)
    return all(
        _agree(_outputs(closed_at_output, example, training), _outputs(masked, example, training))
        for example in examples
        for training in (False, True)
    )


def _outputs(model: nn.Module, example: Example, training: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)

    def given(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().double() if value.any() else torch.randn(value.shape, generator=generator).double()

    model.train(training)
    devices = sorted({tensor.device.index for tensor in model.parameters() if tensor.is_cuda})
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        args, kwargs = tree_map(given, (tuple(example.args), dict(example.kwargs)))
        return tensors_in(model(*args, **kwargs))


def _agree(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(
        a.shape == b.shape and bool(((a - b).abs() <= TOLERANCE * a.abs().amax().clamp(min=1.0)).all())
        for a, b in zip(first, second, strict=True)
        if a.is_floating_point()
    )
