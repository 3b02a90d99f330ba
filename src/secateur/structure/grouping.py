"""From solved units to groups, cost axes and the list of what is frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.structure.coupling import Coupling, Product, Solution
from secateur.structure.groups import Axis, Frozen, Group, Member, NormWidth, Term
from secateur.structure.heads import with_heads
from secateur.structure.ids import Ids
from secateur.structure.norms import RmsNorm
from secateur.structure.sites import Sites
from secateur.structure.structure import Structure

__all__ = ["Grouping", "group_units"]

_NO_CONSUMER = "has no consumer: no weight reads it in a way that could be zeroed"
_ALONE = "is the only unit of its kind, and one must stay"
_UNREAD = "is not read by the model's forward"


@dataclass(frozen=True)
class Grouping:
    """Groups with the ids they came from.

    Args:
        structure: what users see.
        solution: the components.
        group_of: per component, position of its group, or -1.
        unit_of: per component, position of the unit in its group, or -1.
    """

    structure: Structure
    solution: Solution
    group_of: NDArray[np.int64]
    unit_of: NDArray[np.int64]

    def ids_of(self, group: int) -> Ids:
        """All ids of the units of one group."""
        return np.flatnonzero(self.group_of[self.solution.component] == group)

    def firsts_of(self, group: int) -> Ids:
        """One id of each unit of a group, in the order of its units."""
        ids = self.ids_of(group)
        _, first = np.unique(self.unit_of[self.solution.component[ids]], return_index=True)
        return np.asarray(ids[first], dtype=np.int64)

    def axis(self, ids: Ids) -> Axis:
        """The number of these ids that stay, as a function of open units."""
        return count_axis(ids, self.solution.component, self.group_of, [g.size for g in self.structure.groups])

    def groups_in(self, ids: Iterable[Ids]) -> set[int]:
        """Positions of the groups that own any of these ids."""
        arrays = [array.ravel() for array in ids]
        if not arrays:
            return set()
        found = np.unique(self.group_of[self.solution.component[np.concatenate(arrays)]])
        return set(found[found >= 0].tolist())


def group_units(
    coupling: Coupling, sites: Sites, read: frozenset[str], norms: Mapping[str, RmsNorm], notes: tuple[str, ...] = ()
) -> Grouping:
    """Solve the coupling and put units with the same signature together.

    A signature is what a unit owns: how many positions of which sites, and whether they consume. Units are
    ordered by their first position, groups by their first site.
    """
    solution = coupling.solve()
    component = solution.component
    n = int(component.max()) + 1
    site_of = sites.of_id(np.arange(coupling.n_ids))
    places = _Places.of(component, site_of, len(sites))
    consumer_ids = _consumers(coupling, places)
    carrier_ids = _marked(coupling.carried, coupling.n_ids)
    has_consumer = np.zeros(n, dtype=bool)
    has_consumer[component[consumer_ids]] = True
    free = (solution.frozen < 0) & has_consumer
    free[component[0]] = False

    ids = np.arange(1, sites.starts[-1])  # those beyond are of tensors that the model made while it ran
    ids = ids[free[component[ids]]]
    signature = _signatures(places, consumer_ids, n, len(sites))
    first_id = np.full(n, coupling.n_ids, dtype=np.int64)
    first_id[component[ids[::-1]]] = ids[::-1]
    live = np.flatnonzero(first_id < coupling.n_ids)
    group_of = np.full(n, -1, dtype=np.int64)
    unit_of = np.full(n, -1, dtype=np.int64)
    alone = np.zeros(n, dtype=bool)
    order = live[np.argsort(first_id[live], kind="stable")]
    _, start, inverse = np.unique(signature[order], return_index=True, return_inverse=True)
    rank = np.empty(len(start), dtype=np.int64)
    rank[np.argsort(start)] = np.arange(len(start))
    labels = rank[inverse.ravel()] if len(order) else np.zeros(0, np.int64)
    sizes = np.bincount(labels, minlength=len(start))
    number = np.where(sizes > 1, np.cumsum(sizes > 1) - 1, -1)
    by_label = order[np.argsort(labels, kind="stable")]
    alone[order[sizes[labels] == 1]] = True
    group_of[order] = number[labels]
    unit_of[by_label] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    unit_of[group_of < 0] = -1

    member_ids = ids[group_of[component[ids]] >= 0]
    cuttable = {norms[path].weight for _, path in coupling.normalised}
    norm_weights = frozenset(sites.aliases.get(name, name) for name in cuttable)
    at = component[member_ids]
    marks = _Marks(consumer_ids, carrier_ids, norm_weights)
    groups = _groups(member_ids, group_of[at], unit_of[at], sites, marks)
    axes = _Axes(component, group_of, [group.size for group in groups])
    param_terms = tuple(
        axes.term(1.0, [sites.ids(s) for s in _sites_of(sites, name)], name, sites.shapes[name])
        for name in sites.shapes
        if name in sites.parameters
    )
    mac_terms = tuple(axes.product(product) for product in coupling.products)
    frozen = _frozen(sites, solution, component, group_of, has_consumer, alone, read)
    structure = Structure(
        groups=with_heads(groups, [axes.of(ids) for ids in coupling.batches]),
        frozen=frozen,
        shapes=dict(sites.shapes),
        aliases=dict(sites.aliases),
        axes=tuple(axes.known),
        param_terms=param_terms,
        mac_terms=mac_terms,
        norms=_norm_widths(coupling, norms, axes),
        widths=tuple(dict.fromkeys(axis for ids in coupling.widths if (axis := axes.of(ids)).per_group)),
        notes=notes,
    )
    return Grouping(structure, solution, group_of, unit_of)


def _norm_widths(coupling: Coupling, norms: Mapping[str, RmsNorm], axes: _Axes) -> tuple[NormWidth, ...]:
    """The width of each RMSNorm that has units to lose."""
    widths: dict[str, NormWidth] = {}
    for ids, path in coupling.normalised:
        axis = axes.of(ids)
        if axis.per_group:
            norm = norms[path]
            widths[path] = NormWidth(norm.weight, norm.eps, norm.eps_value, norm.kind.offset, axis)
    return tuple(widths.values())


def _marked(arrays: list[Ids], n_ids: int) -> NDArray[np.bool_]:
    marked = np.zeros(n_ids, dtype=bool)
    for array in arrays:
        marked[array.ravel()] = True
    marked[0] = False
    return marked


@dataclass(frozen=True)
class _Places:
    """Where components own positions: the pairs of a component and a site, sorted by component and then by site.

    Args:
        component: of each place.
        site: of each place.
        count: how many ids each place has.
        of_id: the place of each id.
    """

    component: NDArray[np.int64]
    site: NDArray[np.int64]
    count: NDArray[np.int64]
    of_id: NDArray[np.int64]

    @classmethod
    def of(cls, component: NDArray[np.int64], site_of: NDArray[np.int64], n_sites: int) -> _Places:
        """The places of all ids; ids that no site has are at a site of their own, -1 or the last."""
        pair, inverse, count = np.unique(
            component * np.int64(n_sites + 2) + site_of + 1, return_inverse=True, return_counts=True
        )
        return cls(pair // (n_sites + 2), pair % (n_sites + 2) - 1, count, inverse.ravel())


def _consumers(coupling: Coupling, places: _Places) -> NDArray[np.bool_]:
    """Which ids a contraction reads.

    Where weights were joined into one, all are read; and where positions of one tensor's dimension go
    together, the rules speak of the first of them for all.
    """
    consumed = _marked(coupling.consumed, coupling.n_ids)
    pairs = [np.broadcast_arrays(a, b) for a, b in coupling.joined]
    pairs = [(a[(a != 0) & (b != 0)], b[(a != 0) & (b != 0)]) for a, b in pairs]
    while any((consumed[a] != consumed[b]).any() for a, b in pairs):
        for a, b in pairs:
            either = consumed[a] | consumed[b]
            consumed[a], consumed[b] = either, either
    read = np.zeros(len(places.count), dtype=bool)
    read[places.of_id[consumed]] = True
    consumed = read[places.of_id]
    consumed[0] = False
    return consumed


def _signatures(places: _Places, consumer: NDArray[np.bool_], n_components: int, n_sites: int) -> NDArray[np.uint64]:
    """A 64-bit hash, per component, of the multiset of sites that it owns positions of, and whether they consume."""
    at = np.flatnonzero((places.site >= 0) & (places.site < n_sites))
    consumed = np.zeros(len(places.count), dtype=bool)
    consumed[places.of_id[consumer]] = True
    code = (2 * places.site[at] + consumed[at]).astype(np.uint64)
    mixed = _mix(code * np.uint64(0x9E3779B97F4A7C15) + places.count[at].astype(np.uint64))
    signature = np.zeros(n_components, dtype=np.uint64)
    np.add.at(signature, places.component[at], mixed)
    return signature


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: spreads nearby integers over 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)), dtype=np.uint64)


@dataclass(frozen=True)
class _Marks:
    """What the rules said of single ids.

    Args:
        consumer: a contraction reads it.
        carrier: it carries its unit onward.
        norm_weights: tensors that are the weight of an RMSNorm.
    """

    consumer: NDArray[np.bool_]
    carrier: NDArray[np.bool_]
    norm_weights: frozenset[str]


def _groups(
    ids: NDArray[np.int64],
    group: NDArray[np.int64],
    unit: NDArray[np.int64],
    sites: Sites,
    marks: _Marks,
) -> list[Group]:
    site = sites.of_id(ids)
    most = int(unit.max(initial=0)) + 1
    order = np.argsort((group * len(sites) + site) * most + unit, kind="stable")  # the ids ascend already
    ids, group, unit, site = ids[order], group[order], unit[order], site[order]
    cuts = np.flatnonzero(np.diff(group) | np.diff(site)) + 1
    parts = np.split(np.arange(len(ids)), cuts) if len(ids) else []
    members: dict[int, list[Member]] = {}
    sizes: dict[int, int] = {}
    for part in parts:
        g, s = int(group[part[0]]), int(site[part[0]])
        size = int(unit[part[-1]]) + 1
        sizes[g] = max(sizes.get(g, 0), size)
        index = (ids[part] - sites.starts[s]).reshape(size, -1)
        members.setdefault(g, []).append(
            Member(
                tensor=sites.tensors[s],
                dim=sites.dims[s],
                index=index,
                consumer=bool(marks.consumer[ids[part]].all()),
                carrier=bool(marks.carrier[ids[part]].any()) or not marks.consumer[ids[part]].any(),
                rescaled=sites.tensors[s] in marks.norm_weights,
            )
        )
    names: dict[str, int] = {}
    groups: list[Group] = []
    for g in sorted(members):
        name = _module_name(members[g])
        names[name] = names.get(name, 0) + 1
        unique = name if names[name] == 1 else f"{name}#{names[name]}"
        groups.append(Group(unique, sizes[g], tuple(members[g])))
    return groups


def _module_name(members: list[Member]) -> str:
    """The module that first carries the units; its parameter where a module holds several of its own."""
    carrier = next((m for m in members if m.carrier), members[0])
    module, _, leaf = carrier.tensor.rpartition(".")
    return module if module and leaf in ("weight", "bias") else carrier.tensor


def _sites_of(sites: Sites, name: str) -> list[int]:
    first = sites.tensors.index(name) if sites.shapes[name] else 0
    return list(range(first, first + len(sites.shapes[name])))


class _Axes:
    """Cost axes, each kept once."""

    def __init__(self, component: NDArray[np.int64], group_of: NDArray[np.int64], sizes: list[int]) -> None:
        self.known: dict[Axis, int] = {}
        self._component, self._group_of, self._sizes = component, group_of, sizes

    def term(self, coefficient: float, axes: list[Ids], label: str, shape: tuple[int, ...] = ()) -> Term:
        places: list[int] = []
        for ids in axes:
            axis = self.of(ids)
            if axis.per_group:
                places.append(self.known.setdefault(axis, len(self.known)))
            else:
                coefficient *= axis.fixed
        return Term(coefficient, tuple(places), label)

    def product(self, product: Product) -> Term:
        return self.term(product.coefficient, list(product.axes), product.label)

    def of(self, ids: Ids) -> Axis:
        """The axis of an array of ids."""
        return count_axis(ids, self._component, self._group_of, self._sizes)


def count_axis(ids: Ids, component: NDArray[np.int64], group_of: NDArray[np.int64], sizes: list[int]) -> Axis:
    """How many of some ids are fixed, and how many each unit of each group owns."""
    groups = group_of[component[ids]]
    counts = np.bincount(groups.ravel() + 1, minlength=1)
    present = np.flatnonzero(counts[1:])
    return Axis(int(counts[0]), tuple((int(g), int(counts[g + 1] // sizes[g])) for g in present))


def _frozen(
    sites: Sites,
    solution: Solution,
    component: NDArray[np.int64],
    group_of: NDArray[np.int64],
    has_consumer: NDArray[np.bool_],
    alone: NDArray[np.bool_],
    read: frozenset[str],
) -> tuple[Frozen, ...]:
    """One entry for each site and reason."""
    found: list[Frozen] = []
    for site, (name, dim) in enumerate(zip(sites.tensors, sites.dims, strict=True)):
        components = component[sites.ids(site)]
        stuck = components[group_of[components] < 0]
        if not len(stuck):
            continue
        if name not in read:
            found.append(Frozen(name, dim, len(stuck), _UNREAD))
            continue
        numbers, counts = np.unique(solution.frozen[stuck], return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            if number >= 0:
                freeze = solution.freezes[number]
                found.append(Frozen(name, dim, count, freeze.reason, freeze.operator, freeze.module))
            else:
                lonely = alone[stuck[solution.frozen[stuck] < 0]].all()
                found.append(Frozen(name, dim, count, _ALONE if lonely else _NO_CONSUMER))
    return tuple(found)
