"""Where gates act in a user's model: on slices of the weights that read gated units, by parametrization.

Index conventions: ``U`` units of all gates in a row; the *extended* gates ``(U + 1,)`` end in a constant 1;
``S`` size of one dimension of a weight; ``L`` gates that meet at one position (coarse and fine ones multiply).
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from secateur.errors import GateError
from secateur.pruning.draws import GATES, begin_forward, drawn_now, end_forward, fixed_now
from secateur.pruning.gateset import GateSet
from secateur.pruning.index import Index
from secateur.pruning.outputs import remove_outputs
from secateur.pruning.registering import register_gate, reorder
from secateur.pruning.repeats import keep_with
from secateur.structure.groups import FLAT, Group
from secateur.structure.tensors import listed, slots_of

__all__ = ["ConsumerGate", "Map", "Site", "cut_maps", "gated_sites", "maps_of", "place", "regated", "strip"]

#: How many times smaller than the weight a linear layer's input is, for gates to act on it instead.
LESS = 2
#: Sources of the gates at every position of one dimension: int64 ``(L, S)``, positions in the extended gates.
Map = NDArray[np.int64]


class Site(NamedTuple):
    """One place of a gated tensor.

    Args:
        owner: module that holds it.
        key: its attribute there.
        name: its qualified name.
        gate: what multiplies it.
        chain: the parametrization; its ``original`` is the tensor as it was before.
    """

    owner: nn.Module
    key: str
    name: str
    gate: ConsumerGate
    chain: ParametrizationList


class ConsumerGate(nn.Module):
    r"""A weight times the gates of the units that it reads.

    .. math:: \tilde W_{\ldots i \ldots j \ldots} = W_{\ldots i \ldots j \ldots}\; v_i\, w_j, \qquad
        v_i = \prod_l z_{m(l, i)}

    A closed unit's slices are exactly 0 there, and so is their gradient. Whatever lies between the units' producer and
    this weight (bias, BatchNorm, activations) is untouched.

    While gates are drawn, those of a linear layer's columns act on the layer's input instead, where that is far smaller
    than its weight: :math:`(W \odot v)\, x = W (v \odot x)`.

    Args:
        gates: of the model; referred to, not registered a second time.
        maps: by dimension, which gates meet at each of its positions; under `FLAT` those of single weights.
        order: names of the owner's tensors in their order before, to be restored.
        persistent: whether the tensor is part of the state dict (a buffer may not be).
    """

    def __init__(self, gates: GateSet, maps: Mapping[int, Map], order: tuple[str, ...], persistent: bool) -> None:
        super().__init__()
        # In a tuple, so that it is no submodule: copies still find their own gates, for a copy follows references.
        self._gates = (gates,)
        self.order = order
        #: types of gates and weight that a pinned product is computed in, whatever the model is converted to later
        self.exact_in: tuple[torch.dtype, torch.dtype] | None = None
        self.persistent = persistent
        #: by dimension the maps that act instead of its own on a weight that is narrowed; None for its own
        self.acting: Mapping[int, Tensor] | None = None
        #: by dimension where its gates stand in the extended gates, start and number, if they are one row of them, for
        #: which a slice serves; ``maps`` say it too, but for single weights, of which there are many
        self.rows: dict[int, tuple[int, int]] = {}
        self.maps: dict[int, Index] = {}
        #: whether the gates of the call that is going on act on the layer's input
        self.entered = False
        self.dims = tuple(sorted(dim for dim in maps if dim != FLAT))
        self.has_flat = FLAT in maps
        for dim, layers in maps.items():
            first, size = int(layers[0, 0]), layers.shape[1]
            if len(layers) == 1 and np.array_equal(layers[0], np.arange(first, first + size)):
                self.rows[dim] = first, size
            if dim != FLAT or dim not in self.rows:
                self.maps[dim] = Index(layers)

    def forward(self, weight: Tensor) -> Tensor:
        """``(..., S, ...)`` to the same shape."""
        gates = self._gates[0]
        draw = drawn_now(gates, self.training)
        if draw is not None:
            if self.entered:
                return weight
            gated = self._product(weight, draw.read(), lambda start, size: draw.part(gates, start, size))
            return gated if torch.compiler.is_compiling() else keep_with(gated, draw)
        fixed = fixed_now(gates)
        if self.exact_in is not None and gates.pinned is not None and not (self.training and gates.training):
            return self.product(weight.to(self.exact_in[1]), fixed.to(self.exact_in[0])).to(weight.dtype)
        return self.product(weight, fixed)

    def enter(self, owner: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook of a linear layer: its input times the gates, where that is less work than the weight."""
        gates = self._gates[0]
        x = args[0] if args else None
        if not isinstance(x, Tensor) or torch.compiler.is_compiling() or not _bare(owner):
            return None
        if parametrize._cache_enabled:
            return None  # the weight that this call computes may serve one with a larger input
        draw = drawn_now(gates, self.training)
        chain = cast("ParametrizationList", cast("nn.ModuleDict", owner.parametrizations)["weight"])
        # A narrowed layer may have its input narrowed by a hook that is still to come.
        if draw is None or draw.narrowed or self.acting is not None or LESS * x.numel() > chain.original.numel():
            return None
        device = chain.original.device
        factor = self._factor(1, draw.read(), lambda start, size: draw.part(gates, start, size), device)
        if factor.requires_grad and not x.requires_grad:
            return None  # the input's gradient, which nobody else asks for, is a product of matrices
        self.entered = True
        # In the weight's type, as on the weight: under autocast the gates keep theirs.
        return (keep_with(x * factor.to(x.device, chain.original.dtype), draw), *args[1:])

    def leave(self, owner: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the same layer."""
        self.entered = False

    def product(self, weight: Tensor, gates: Tensor) -> Tensor:
        """The weight times extended gates ``(U + 1,)``."""
        return self._product(weight, gates, lambda start, size: gates.narrow(0, start, size))

    def _product(self, weight: Tensor, gates: Tensor, row: Callable[[int, int], Tensor]) -> Tensor:
        """The same, with what gives the gates of a row."""
        device, dtype, last = weight.device, weight.dtype, weight.dim() - 1
        for dim, factor in self._factors(gates, row, device).items():
            along = factor.to(device, dtype)
            weight = weight * (along if dim == last else along.view(-1, *[1] * (last - dim)))
        if not self.has_flat:
            return weight
        return weight * self._factor(FLAT, gates, row, device).to(device, dtype).view(weight.shape)

    def factors(self, gates: Tensor) -> dict[int, Tensor]:
        """By dimension the factor ``(S,)`` of each position, from extended gates ``(U + 1,)``."""
        return self._factors(gates, lambda start, size: gates.narrow(0, start, size), gates.device)

    def own(self, gates: Tensor) -> Tensor | None:
        """The gates of single weights, flat, from extended gates ``(U + 1,)``; None without them."""
        if not self.has_flat:
            return None
        return self._factor(FLAT, gates, lambda start, size: gates.narrow(0, start, size), gates.device)

    def _factors(self, gates: Tensor, row: Callable[[int, int], Tensor], device: torch.device) -> dict[int, Tensor]:
        if self.acting is not None:
            return {dim: _met(gates, sources) for dim, sources in self.acting.items()}
        return {dim: self._factor(dim, gates, row, device) for dim in self.dims}

    def _factor(self, dim: int, gates: Tensor, row: Callable[[int, int], Tensor], device: torch.device) -> Tensor:
        place = self.rows.get(dim)
        return row(*place) if place is not None else _met(gates, self.maps[dim].on(device))

    def forget(self) -> None:
        """Let its own maps act again."""
        self.acting = None

    def extra_repr(self) -> str:
        """The gated dimensions."""
        if not self.has_flat:
            return f"dims={self.dims}"
        weights = self.rows[FLAT][1] if FLAT in self.rows else self.maps[FLAT].shape[1]
        return f"dims={self.dims}, weights={weights}"


def _bare(owner: nn.Module) -> bool:
    """Whether a layer has no hooks but those of its gate: others are to see the input as it is without gates."""
    backward = owner._backward_hooks or owner._backward_pre_hooks
    return len(owner._forward_pre_hooks) == len(owner._forward_hooks) == 1 and not backward


def _met(gates: Tensor, sources: Tensor) -> Tensor:
    """Product of the gates that meet at each position, by a map ``(L, S)``."""
    gates = gates.to(sources.device)
    factor = gates.index_select(0, sources[0])
    for layer in sources[1:]:
        factor = factor * gates.index_select(0, layer)
    return factor


def maps_of(groups: Sequence[Group], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[int, Map]]:
    """By tensor and dimension, which gates meet at each position, for groups whose units stand in a row.

    Args:
        groups: every gated group, rule by rule.
        shapes: dense shapes by tensor name.
    """
    total = sum(group.size for group in groups)
    layers: dict[tuple[str, int], list[Map]] = defaultdict(list)
    start = 0
    for group in groups:
        for member in group.gated:
            shape = shapes[member.tensor]
            size = math.prod(shape) if member.dim == FLAT else shape[member.dim]
            _lay(layers[member.tensor, member.dim], member.index, start, total, size)
        start += group.size
    maps: dict[str, dict[int, Map]] = defaultdict(dict)
    for (tensor, dim), rows in layers.items():
        maps[tensor][dim] = np.stack(rows)
    return maps


def cut_maps(
    maps: Mapping[str, Mapping[int, Map]],
    shapes: Mapping[str, tuple[int, ...]],
    kept: Mapping[str, Mapping[int, Sequence[int]]],
) -> dict[str, dict[int, Map]]:
    """Maps of tensors that keep only some positions of some dimensions.

    Args:
        maps: of the dense tensors, by tensor and dimension.
        shapes: dense shapes.
        kept: by tensor and dimension the positions that stay.
    """
    cut: dict[str, dict[int, Map]] = {}
    for name, dims in maps.items():
        stays = kept.get(name, {})
        cut[name] = {dim: layers.take(stays[dim], axis=1) if dim in stays else layers for dim, layers in dims.items()}
        if FLAT in dims and stays:
            grid = dims[FLAT].reshape(shapes[name])
            for dim, positions in stays.items():
                grid = grid.take(positions, axis=dim)
            cut[name][FLAT] = grid.reshape(1, -1)
    return cut


def _lay(rows: list[Map], index: NDArray[np.int64], start: int, total: int, size: int) -> None:
    """Write a member's gates into the first row where its positions are free, for most members share one row."""
    positions = index.reshape(-1)
    units = np.repeat(np.arange(start, start + len(index)), index.shape[1])
    for row in rows:
        if np.all(row[positions] == total):
            row[positions] = units
            return
    rows.append(np.full(size, total, dtype=np.int64))
    rows[-1][positions] = units


def place(model: nn.Module, gates: GateSet, maps: Mapping[str, Mapping[int, Map]]) -> None:
    """Put gates on weights, in place; where it raises, nothing has changed.

    A tied weight is gated under all its names and stays tied.

    Raises:
        GateError: a weight is missing, parametrized already or in a module that takes no parametrization.
    """
    places = _places(model)
    problems = [f"{name}: the model has no such parameter" for name in maps if name not in places]
    for name in maps:
        for owner, key in places.get(name, ()):
            if is_parametrized(owner):
                taken = ", ".join(cast("nn.ModuleDict", owner.parametrizations))
                problems.append(
                    f"{name}: the {type(owner).__name__} that holds {key} is parametrized already (on {taken})"
                )
    if hasattr(model, GATES):
        problems.append(f"the model has an attribute {GATES!r}")
    if problems:
        raise GateError(
            f"gates cannot be placed; nothing was changed: {listed(sorted(problems))}. Remove foreign parametrizations"
            " first (torch.nn.utils.parametrize.remove_parametrizations), or leave these layers out with"
            " sc.Rule(where=...)"
        )
    try:
        for name, dims in maps.items():
            for owner, key in places[name]:
                _gate(owner, key, gates, dims)
    except BaseException:
        strip(model)
        raise
    setattr(model, GATES, gates.train(model.training))
    model.register_forward_pre_hook(begin_forward, with_kwargs=True)
    model.register_forward_hook(end_forward, always_call=True)


def _places(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """By tensor name, every module and attribute that holds this tensor, a module that is used twice once."""
    slots = slots_of(model)
    found: dict[int, dict[tuple[int, str], tuple[nn.Module, str]]] = defaultdict(dict)
    for slot in slots.values():
        found[id(slot.tensor)][id(slot.owner), slot.key] = slot.owner, slot.key
    return {name: list(found[id(slot.tensor)].values()) for name, slot in slots.items()}


def _gate(owner: nn.Module, key: str, gates: GateSet, dims: Mapping[int, Map]) -> None:
    kind = owner._parameters if key in owner._parameters else owner._buffers
    order = tuple(kind)
    for site in _sites_in(owner, ""):  # a second tensor of the same module: the first saw the whole order
        order = site.gate.order if key in site.gate.order else order
    _put(owner, key, ConsumerGate(gates, dims, order, key not in owner._non_persistent_buffers_set))


def _put(owner: nn.Module, key: str, gate: ConsumerGate) -> None:
    plain = type(owner).forward is nn.Linear.forward and "forward" not in vars(owner)
    register_gate(owner, key, gate)
    if plain and key == "weight" and gate.dims == (1,) and not gate.has_flat:
        owner.register_forward_pre_hook(gate.enter)
        owner.register_forward_hook(gate.leave, always_call=True)


@contextlib.contextmanager
def regated(model: nn.Module, gates: GateSet, maps: Mapping[str, Mapping[int, Map]]) -> Iterator[None]:
    """Within it the gated tensors of a model are plain; afterwards they are gated by new maps, even if it raised.

    The model's own hooks stay, and all modules keep their modes.
    """
    sites = gated_sites(model)
    names = {id(site.chain.original): site.name for site in sites if site.name in maps}
    placed = [(site, names[id(site.chain.original)]) for site in sites]
    for site in sites:
        _ungate(site)
    done = False
    try:
        yield
        done = True
    finally:
        for site, name in placed:
            if done:
                _gate(site.owner, site.key, gates, maps[name])
            else:
                _put(site.owner, site.key, site.gate)


def gated_sites(model: nn.Module) -> list[Site]:
    """Every gated tensor of a model, under every name that it has."""
    return [site for path, module in model.named_modules() for site in _sites_in(module, path)]


def _sites_in(module: nn.Module, path: str) -> Iterator[Site]:
    if not is_parametrized(module):
        return
    for key, chain in cast("nn.ModuleDict", module.parametrizations).items():
        gate = cast("ParametrizationList", chain)[0]
        if isinstance(gate, ConsumerGate):
            yield Site(module, key, f"{path}.{key}" if path else key, gate, cast("ParametrizationList", chain))


def strip(model: nn.Module) -> None:
    """Take all gates off a model, in place, and leave the weights as they are without gates.

    The model has the tensors, classes, hooks and order of names that it had before. Nothing that a copy of the model
    shares with it, the classes of parametrized modules in particular, is written to.
    """
    for module in list(model.modules()):
        for site in list(_sites_in(module, "")):
            _ungate(site)
    remove_outputs(model)
    model._modules.pop(GATES, None)
    _unhook(model, begin_forward, end_forward)


def _unhook(module: nn.Module, *ours: Callable[..., Any]) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number, hook in hooks.items() if hook in ours]:
            del hooks[number]
            module._forward_hooks_always_called.pop(number, None)
            module._forward_pre_hooks_with_kwargs.pop(number, None)


def _ungate(site: Site) -> None:
    owner, key = site.owner, site.key
    _unhook(owner, site.gate.enter, site.gate.leave)
    original = site.chain.original
    parametrizations = cast("nn.ModuleDict", owner.parametrizations)
    del parametrizations[key]
    gated_class = type(owner)
    if len(parametrizations):
        # Copies of the model share the class, so it is left alone and followed by one without this property.
        rest = {name: value for name, value in vars(gated_class).items() if name != key}
        owner.__class__ = type(gated_class.__name__, gated_class.__bases__, rest)
    else:
        delattr(owner, "parametrizations")
        owner.__class__ = gated_class.__bases__[0]
    if isinstance(original, nn.Parameter):
        owner.register_parameter(key, original)
        reorder(owner._parameters, site.gate.order)
    else:
        owner.register_buffer(key, original, persistent=site.gate.persistent)
        reorder(owner._buffers, site.gate.order)
