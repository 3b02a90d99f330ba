"""Cutting: from a dense module and the positions to keep, the small module, in place.

Nothing here decides what may go: a `CutPlan` says it, and `cut_` carries it out on any module,
whatever its layers are. "Positions" are indices along one dimension of a dense tensor.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from secateur.errors import CompactionError
from secateur.structure.describe import described
from secateur.structure.scale import SCALE, scale_output_
from secateur.structure.select import Select, select_input_
from secateur.structure.slices import cut_tensor, index_of, mode_of
from secateur.structure.tensors import Slot, in_place_of, listed, misfits, slots_of
from secateur.structure.zeros import Zeros

__all__ = ["CutPlan", "cut_"]

Positions = tuple[int, ...]
Cuts = Mapping[int, Positions]


@dataclass(frozen=True)
class CutPlan:
    """What was, or is to be, cut from what: plain data, enough to rebuild the small model from a fresh dense one.

    Args:
        tensors: kept positions, ascending, of each cut dimension, by the qualified name of a parameter or buffer;
            one name is enough for a tensor that has several.
        attributes: new values, by ``"path.to.module.attribute"``, of numbers and tuples of integers that modules keep
            and that do not follow from the shapes of their own tensors.
        selects: by a layer's path, the positions of its (small) input that it reads, where it reads fewer than there
            are: along the channels of a convolution, along the last dimension of any other layer.
        rescales: by tensor name, ``(factor, offset)``: what is kept becomes ``(w + offset) * factor - offset``, as the
            weight of an RMSNorm must that is computed over fewer inputs.
        scales: by a module's path, the dimension along which its output is multiplied by a buffer of its own
            (`scale_output_`), and the (small) size of that.
        zeros: paths of modules that become ones that return zeros (`Zeros`), as large as their first argument.
        dense: shapes that the parameters and buffers have before the cut; may be left out, and is then not checked.

    Example:
        >>> plan = CutPlan({"0.weight": {0: (1, 2)}, "0.bias": {0: (1, 2)}, "2.weight": {1: (1, 2)}})
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> cut_(net, plan)
        >>> net[0]
        Linear(in_features=4, out_features=2, bias=True)
        >>> CutPlan.from_json(plan.to_json()) == plan
        True
    """

    tensors: Mapping[str, Cuts] = field(default_factory=dict)
    attributes: Mapping[str, object] = field(default_factory=dict)
    selects: Mapping[str, Positions] = field(default_factory=dict)
    dense: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    rescales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    zeros: tuple[str, ...] = ()
    scales: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON data; each distinct list of positions is written once, for many tensors share theirs."""
        numbers: dict[Positions, int] = {}

        def number(positions: Sequence[int]) -> int:
            return numbers.setdefault(tuple(int(position) for position in positions), len(numbers))

        tensors = {name: {str(dim): number(kept) for dim, kept in cuts.items()} for name, cuts in self.tensors.items()}
        selects = {path: number(kept) for path, kept in self.selects.items()}
        return {
            "positions": [list(kept) for kept in numbers],
            "tensors": tensors,
            "selects": selects,
            "attributes": {name: _as_json(value) for name, value in self.attributes.items()},
            "dense": {name: list(shape) for name, shape in self.dense.items()},
            "rescales": {name: [factor, offset] for name, (factor, offset) in self.rescales.items()},
            **({"zeros": list(self.zeros)} if self.zeros else {}),
            **({"scales": {path: list(scale) for path, scale in self.scales.items()}} if self.scales else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CutPlan:
        """The inverse of `to_json`.

        Raises:
            CompactionError: the data is not what `to_json` writes.
        """
        try:
            lists = [tuple(int(position) for position in kept) for kept in data["positions"]]
            return cls(
                tensors={
                    str(name): {int(dim): lists[number] for dim, number in cuts.items()}
                    for name, cuts in data["tensors"].items()
                },
                attributes={str(name): _from_json(value) for name, value in data["attributes"].items()},
                selects={str(path): lists[number] for path, number in data["selects"].items()},
                dense={str(name): tuple(int(size) for size in shape) for name, shape in data["dense"].items()},
                rescales={str(name): (float(f), float(o)) for name, (f, o) in data["rescales"].items()},
                zeros=tuple(str(path) for path in data.get("zeros", ())),
                scales={str(path): (int(dim), int(size)) for path, (dim, size) in data.get("scales", {}).items()},
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CompactionError(f"this does not describe a cut: {type(error).__name__}: {error}") from error

    def then(self, later: CutPlan) -> CutPlan:
        """One plan for this cut and then `later`, which was made for the small module.

        Raises:
            CompactionError: both plans select the input of the same layer.
        """
        if twice := sorted(set(self.selects) & set(later.selects)):
            raise CompactionError(f"{listed(twice)}: the input is selected already; compact the dense model in one go")
        tensors: dict[str, dict[int, Positions]] = {name: dict(cuts) for name, cuts in self.tensors.items()}
        scales = {**self.scales, **later.scales}
        for name, cuts in later.tensors.items():
            path, _, key = name.rpartition(".")
            if key == SCALE and path in self.scales:  # the dense module has no such buffer: it is made small
                scales[path] = (scales[path][0], len(cuts[0]))
                continue
            mine = tensors.setdefault(name, {})
            for dim, kept in cuts.items():
                mine[dim] = tuple(mine[dim][position] for position in kept) if dim in mine else kept
        return CutPlan(
            tensors=tensors,
            attributes={**self.attributes, **later.attributes},
            selects={**self.selects, **later.selects},
            dense=self.dense,
            rescales={**self.rescales, **later.rescales, **_both(self.rescales, later.rescales)},
            zeros=tuple(sorted({*self.zeros, *later.zeros})),
            scales=scales,
        )


def cut_(module: nn.Module, plan: CutPlan) -> None:
    """Cut a module in place: every parameter and buffer that the plan names, and the integers that describe them.

    Kept: dtype, device, ``requires_grad``, the class of a parameter and the marks set on it, the order of dimensions
    in memory (``channels_last``), persistence of buffers, and the sharing of tied tensors. Gradients are dropped.
    Works alike on real, fake and ``meta`` tensors. `secateur.structure.describe` has the table of layers whose integers
    follow from the shapes of their tensors. Checks come first: where it raises, nothing has changed.

    Args:
        module: the dense module.
        plan: what to keep.

    Raises:
        CompactionError: the plan does not fit the module; all misfits are listed.
    """
    slots = slots_of(module)
    cuts = _checked_cuts(module, plan, slots)
    attributes = _checked_attributes(module, plan)
    selected = _checked_selects(module, plan, cuts)
    branches = _checked_zeros(module, plan)
    scaled = _checked_scales(module, plan)
    rescales = {id(slots[name].tensor): how for name, how in plan.rescales.items() if name in slots}
    replaced = {
        key: in_place_of(tensor, _rescaled(cut_tensor(tensor, dims), *rescales.get(key, (1.0, 0.0))))
        for key, (tensor, dims) in cuts.items()
    }
    descriptions = _descriptions(slots, cuts, replaced)

    for slot in slots.values():
        if id(slot.tensor) in replaced:
            # Through setattr, for some modules (nn.LSTM) keep a list of their weights up to date there.
            setattr(slot.owner, slot.key, replaced[id(slot.tensor)])
    for owner, key, value in descriptions + attributes:
        setattr(owner, key, value)
    for layer, positions in selected:
        select_input_(layer, index_of(positions, cast("torch.Tensor", layer.weight)))
    for owner, key in branches:
        owner._modules[key] = Zeros().train(owner.training)
    for part, dim, size in scaled:
        like = next((slot.tensor for slot in slots.values() if slot.tensor.is_floating_point()), torch.ones(()))
        with mode_of(like):
            scale_output_(part, torch.ones(size, dtype=like.dtype, device=like.device), dim)


def _rescaled(tensor: torch.Tensor, factor: float, offset: float) -> torch.Tensor:
    if factor == 1.0 or isinstance(tensor, FakeTensor):
        return tensor
    # Through float64, so that what is stored is rounded once.
    return ((tensor.double() + offset) * factor - offset).to(tensor.dtype)


def _both(
    first: Mapping[str, tuple[float, float]], later: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Rescales that happen twice: the factors multiply."""
    return {name: (first[name][0] * factor, offset) for name, (factor, offset) in later.items() if name in first}


def _checked_cuts(module: nn.Module, plan: CutPlan, slots: Mapping[str, Slot]) -> dict[int, tuple[torch.Tensor, Cuts]]:
    """The cuts by tensor identity, after all that can be wrong with them has been looked for."""
    problems = misfits(module, plan.dense) if plan.dense else []
    cuts: dict[int, tuple[torch.Tensor, Cuts]] = {}
    first: dict[int, str] = {}
    ascending: dict[int, bool] = {}  # by identity, for many tensors share their positions
    for name, dims in plan.tensors.items():
        if name not in slots:
            problems.append(f"{name}: {_why_absent(module, name)}")
            continue
        tensor = slots[name].tensor
        problems += [f"{name}: {problem}" for problem in _cut_problems(tensor, dims, ascending)]
        if id(tensor) in cuts and dict(cuts[id(tensor)][1]) != dict(dims):
            problems.append(f"{name}: is the same tensor as {first[id(tensor)]}, but is to be cut differently")
        cuts[id(tensor)] = (tensor, dims)
        first[id(tensor)] = name
    problems += [
        f"{name}: belongs to torch.nn.utils.parametrize; call remove_parametrizations first"
        for name, slot in slots.items()
        if id(slot.tensor) in cuts and isinstance(slot.owner, ParametrizationList)
    ]
    _raise(module, problems)
    return cuts


def _cut_problems(tensor: torch.Tensor, dims: Cuts, ascending: dict[int, bool]) -> Iterator[str]:
    if is_lazy(tensor):
        yield "has no shape yet; run the lazy module once"
        return
    if tensor.layout != torch.strided:
        yield f"has layout {tensor.layout}; only strided tensors can be cut"
    for dim, kept in dims.items():
        if id(kept) not in ascending:
            ascending[id(kept)] = all(a < b for a, b in itertools.pairwise(kept))
        if not 0 <= dim < tensor.dim():
            yield f"has {tensor.dim()} dimensions, and dimension {dim} is to be cut"
        elif not kept:
            yield f"would lose all of dimension {dim}; keep at least one position"
        elif kept[0] < 0 or kept[-1] >= tensor.shape[dim] or not ascending[id(kept)]:
            yield f"positions to keep of dimension {dim} must ascend within [0, {tensor.shape[dim]})"


def _why_absent(module: nn.Module, name: str) -> str:
    path, _, key = name.rpartition(".")
    with contextlib.suppress(AttributeError):
        if is_parametrized(module.get_submodule(path), key):
            return "is computed by torch.nn.utils.parametrize; call remove_parametrizations first"
    return "no such parameter or buffer"


def _checked_attributes(module: nn.Module, plan: CutPlan) -> list[tuple[nn.Module, str, object]]:
    found: list[tuple[nn.Module, str, object]] = []
    problems = []
    for name, value in plan.attributes.items():
        path, _, key = name.rpartition(".")
        try:
            owner = module.get_submodule(path)
            old = getattr(owner, key)
        except AttributeError:
            problems.append(f"{name}: no such attribute")
            continue
        if not isinstance(old, (int, float, tuple, list, type(None))):
            problems.append(f"{name}: is a {type(old).__name__}, expected a number or a tuple of integers")
        # JSON has one kind of list; the module's own kind is what its code expects.
        found.append((owner, key, list(cast("Sequence[int]", value)) if isinstance(old, list) else value))
    _raise(module, problems)
    return found


def _checked_selects(
    module: nn.Module, plan: CutPlan, cuts: Mapping[int, tuple[torch.Tensor, Cuts]]
) -> list[tuple[nn.Module, Positions]]:
    """The layers whose input is to be selected, each once."""
    found: dict[int, tuple[nn.Module, Positions]] = {}
    problems = []
    for path, kept in plan.selects.items():
        try:
            layer = module.get_submodule(path)
            weight = layer._parameters["weight"]
        except (AttributeError, KeyError):
            weight = None
        if weight is None:
            problems.append(f"{path}: no such layer with a weight that reads its input")
            continue
        if isinstance(layer, Select):
            problems.append(f"{path}: its input is selected already; compact the dense model in one go")
        if isinstance(layer, (nn.Linear, _ConvNd)) and getattr(layer, "groups", 1) == 1:
            dim = 0 if getattr(layer, "transposed", False) else 1
            columns = cuts[id(weight)][1].get(dim) if id(weight) in cuts else None
            reads = len(columns) if columns else weight.shape[dim]
            if reads != len(kept):
                problems.append(f"{path}: its weight reads {reads} positions, and {len(kept)} are to be selected")
        if not kept or min(kept) < 0:
            problems.append(f"{path}: at least one position is needed, and none may be negative")
        found[id(layer)] = (layer, kept)
    _raise(module, problems)
    return list(found.values())


def _checked_zeros(module: nn.Module, plan: CutPlan) -> list[tuple[nn.Module, str]]:
    """Where the modules that become zeros are held."""
    found: list[tuple[nn.Module, str]] = []
    problems = []
    for path in plan.zeros:
        above, _, key = path.rpartition(".")
        try:
            owner = module.get_submodule(above)
            owner.get_submodule(key)
        except AttributeError:
            problems.append(f"{path}: no such module")
        else:
            if key:
                found.append((owner, key))
            else:
                problems.append("the whole module cannot become zeros")
    _raise(module, problems)
    return found


def _checked_scales(module: nn.Module, plan: CutPlan) -> list[tuple[nn.Module, int, int]]:
    """The modules whose output is to be multiplied, the dimension, and its size."""
    found: list[tuple[nn.Module, int, int]] = []
    problems = []
    for path, (dim, size) in plan.scales.items():
        try:
            part = module.get_submodule(path)
        except AttributeError:
            problems.append(f"{path}: no such module")
            continue
        if hasattr(part, SCALE):
            problems.append(f"{path}: its output is multiplied already; compact the dense model in one go")
        found.append((part, dim, size))
    _raise(module, problems)
    return found


def _raise(module: nn.Module, problems: Sequence[str]) -> None:
    if problems:
        raise CompactionError(
            f"the plan does not fit {type(module).__name__}; nothing was changed: {listed(problems)}. "
            "Trace the model that is to be cut."
        )


def _descriptions(
    slots: Mapping[str, Slot],
    cuts: Mapping[int, tuple[torch.Tensor, Cuts]],
    replaced: Mapping[int, torch.Tensor],
) -> list[tuple[nn.Module, str, object]]:
    """The new descriptive integers of every layer of which a tensor is cut."""
    owners = {id(slot.owner): slot.owner for slot in slots.values() if id(slot.tensor) in replaced}
    found = []
    for owner in owners.values():
        tensors = {key: t for key, t in {**owner._parameters, **owner._buffers}.items() if t is not None}
        shapes = {key: replaced.get(id(t), t).shape for key, t in tensors.items()}
        kept = {key: cuts[id(t)][1] for key, t in tensors.items() if id(t) in cuts}
        found += [(owner, key, value) for key, value in described(owner, shapes, kept).items()]
    return found


def _as_json(value: object) -> object:
    return [int(item) for item in value] if isinstance(value, (tuple, list)) else value


def _from_json(value: object) -> object:
    if isinstance(value, list):
        return tuple(int(item) for item in value)
    if value is not None and not isinstance(value, (int, float)):
        raise TypeError(f"an attribute cannot be {value!r}")
    return value
