"""Which units a training step may leave out while their gates are at 0, and where.

A unit is left out in one of two ways. *Whole*: its producers do not compute it, nor does anything up to its consumers.
*At consumers*: it is computed, and the layers that read it read only the open units. The second is for units that must
be computed although nothing reads them: running statistics on their way see them, or dropout draws for them.

=============================================================  =============================================
units                                                          left out
=============================================================  =============================================
with running statistics or other buffers of their own           at linear layers and convolutions that read them
of a model that draws random numbers                            at these alone as well
of layers that keep a list of their weights (``nn.LSTM``)       not at all there
single inputs of a layer                                        at that layer
whose gates hear the task while closed (`hears_closed`)         never: that gradient needs the unit
before an RMSNorm, blocks, single weights, activations          never
=============================================================  =============================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from secateur.gates.gate import Method
from secateur.pruning.placement import Map, Site, cut_maps, gated_sites, maps_of
from secateur.pruning.reading import reads_some
from secateur.pruning.rule import ACTIVATIONS
from secateur.structure.cut import CutPlan
from secateur.structure.groups import FLAT, Group, Member
from secateur.structure.select import Select
from secateur.structure.structure import Structure
from secateur.structure.tensors import slots_of

__all__ = ["Held", "Narrowable", "Ways", "held", "narrowable", "ways"]

#: Layers of which single inputs can be left out: they read a weight's second dimension along one of their input's.
_READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Where these layers' weights hold what they read.
_READ_DIM = 1


@dataclass(frozen=True, eq=False)
class Held:
    """One place of a tensor.

    Args:
        store: the dictionary that holds it: of parameters or buffers, or of a parametrization.
        key: there.
        owner: the module whose attribute it is.
        name: of that attribute.
    """

    store: dict[str, Tensor]
    key: str
    owner: nn.Module
    name: str


@dataclass(frozen=True)
class Ways:
    """How each gated group is left out.

    Args:
        whole: numbers of the groups, in the order of their gates, that are left out whole.
        read: by number of the other groups, the members at whose layers they are left out.
        why: reasons of the groups that are always computed and read, by name.
        binary: numbers of the groups left out whose gates are drawn as 0 or 1.
    """

    whole: frozenset[int]
    read: Mapping[int, tuple[Member, ...]]
    why: Mapping[str, str]
    binary: frozenset[int]


@dataclass(frozen=True)
class Narrowable:
    """By tensor and dimension, the gates that must be open for a position, as `maps_of` gives them.

    Args:
        whole: positions that are absent while one is closed.
        read: positions that a layer does not read while one is closed.
    """

    whole: Mapping[str, Mapping[int, Map]]
    read: Mapping[str, Mapping[int, Map]]


def held(model: nn.Module) -> dict[str, list[Held]]:
    """Every place of every tensor of a gated model, by each name that it has without gates."""
    by_tensor: dict[int, dict[tuple[int, str], Held]] = {}
    names: dict[str, int] = {}
    for name, slot in slots_of(model).items():
        owner, plain = slot.owner, name
        store = owner._parameters if slot.key in owner._parameters else owner._buffers
        key = slot.key
        if isinstance(owner, ParametrizationList) and key == "original":
            path, _, key = name.removesuffix(".original").rpartition(".")
            path = path.removesuffix("parametrizations").removesuffix(".")
            owner, plain = model.get_submodule(path), f"{path}.{key}" if path else key
        one = Held(store, slot.key, owner, key)  # type: ignore[arg-type]
        names[plain] = id(slot.tensor)
        by_tensor.setdefault(id(slot.tensor), {}).setdefault((id(store), slot.key), one)
    return {name: list(by_tensor[tensor].values()) for name, tensor in names.items()}


def ways(
    groups: Sequence[Group], methods: Sequence[Method], model: nn.Module, structure: Structure, *, random: bool
) -> Ways:
    """How each group may be left out.

    Args:
        groups: gated, in the order of their gates.
        methods: of each group's gates.
        model: gated.
        structure: of the model.
        random: whether the model draws random numbers as it runs.
    """
    places = held(model)
    sites: dict[int, Site] = {id(site.chain.original): site for site in gated_sites(model)}
    known = {group.name: group.size for group in structure.groups}
    computed = any(group.kind == ACTIVATIONS for group in groups)
    single = {member.tensor for group in groups for member in group.members if member.dim == FLAT}
    whole: set[int] = set()
    read: dict[int, tuple[Member, ...]] = {}
    why: dict[str, str] = {}
    for number, (group, method) in enumerate(zip(groups, methods, strict=True)):
        if reason := _never(group, method):
            why[group.name] = reason
            continue
        if not (
            random
            or computed
            or group.kind == "inputs"
            or known.get(group.name) != group.size
            or any(_must_stay(member, places, sites, single) for member in group.members)
        ):
            whole.add(number)
            continue
        members = tuple(member for member in group.consumers if _reader(member, places, single))
        if members:
            read[number] = members
        else:
            why[group.name] = (
                "its units are computed for running statistics, dropout or gates on outputs, and no linear layer or"
                " convolution reads them"
            )
    binary = frozenset(number for number in (*whole, *read) if methods[number].binary)
    return Ways(frozenset(whole), read, why, binary)


def narrowable(groups: Sequence[Group], how: Ways, structure: Structure, cut: CutPlan | None) -> Narrowable:
    """The gates behind every position that a step may leave out, of the model as it is after a cut."""
    none: tuple[Member, ...] = ()
    all_of = [
        replace(group, members=group.members if number in how.whole else none) for number, group in enumerate(groups)
    ]
    some = [replace(group, members=how.read.get(number, none)) for number, group in enumerate(groups)]
    kept = {} if cut is None else cut.tensors
    return Narrowable(
        *(cut_maps(maps_of(_all_gated(part), structure.shapes), structure.shapes, kept) for part in (all_of, some))
    )


def _all_gated(groups: Sequence[Group]) -> list[Group]:
    """The groups as if a gate acted at each of their members."""
    return [
        replace(group, members=tuple(replace(member, consumer=True) for member in group.members)) for group in groups
    ]


def _never(group: Group, method: Method) -> str:
    if method.hears_closed:
        return f"{type(method).__name__} gives gates at 0 a gradient, which needs their units"
    if group.kind in ("weights", "blocks", ACTIVATIONS):
        return f"it is of kind {group.kind!r}"
    if group.at_producers:
        return "an RMSNorm averages over its units"
    if any(member.stays for member in group.members):
        return "part of its unit stays"
    return ""


def _must_stay(member: Member, places: Mapping[str, list[Held]], sites: Mapping[int, Site], single: set[str]) -> bool:
    """Whether a tensor of a unit sees to it that the unit is computed, or cannot be exchanged for a part of it."""
    if member.tensor in single:
        return True
    for place in places[member.tensor]:
        owner, tensor = place.owner, place.store[place.key]
        buffer = not isinstance(tensor, nn.Parameter)
        foreign = isinstance(place.owner, ParametrizationList) and id(tensor) not in sites
        if buffer or foreign or isinstance(owner, (nn.RNNBase, Select)) or reads_some(owner):
            return True
    return False


def _reader(member: Member, places: Mapping[str, list[Held]], single: set[str]) -> bool:
    """Whether the layers that read these units can be given only some of them."""
    return (
        member.dim == _READ_DIM
        and member.tensor not in single
        and all(
            type(place.owner) in {*_READERS, *_gated_classes(place.owner)}
            and place.name == "weight"
            and getattr(place.owner, "groups", 1) == 1
            and not reads_some(place.owner)
            for place in places[member.tensor]
        )
    )


def _gated_classes(owner: nn.Module) -> tuple[type[nn.Module], ...]:
    """The class that a parametrization made for one of the layers."""
    bases = type(owner).__bases__
    return (type(owner),) if len(bases) == 1 and bases[0] in _READERS and hasattr(owner, "parametrizations") else ()
