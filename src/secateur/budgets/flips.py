"""Which units a shift of the threshold flips, so that exact costs come to their limits.

Index conventions: ``U`` units of all groups in a row, ``G`` groups. Costs never fall when a unit opens, which is what
every search here relies on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from secateur.budgets.costs import KINDS, CostModel
from secateur.budgets.runs import on_host

__all__ = ["NEAR", "first_length", "flips", "goals", "movable_units", "settled", "within"]

#: How near to the target the fixed gates are to land, as a share of it, where units are small enough.
NEAR = 0.05
#: Lengths that a search tries at once.
WIDE = 16
#: Units that are flipped one after the other before any search.
ONE_BY_ONE = 6
#: Units that a search looks at first, for mostly few are to flip; more only where these do not suffice.
FIRST_LOOK = 32
#: Units up to which every number of them is tried at once.
AT_ONCE = 64
#: Of many units every so many-th is looked at first, to find out which ones are worth sorting; from so many looked at.
STRIDE = 64
SAMPLED = 256
#: So many scores are sorted at once rather than parted first.
SORTED = 1024


def goals(limits: Mapping[str, int]) -> list[dict[str, int]]:
    """Limits that are met one after another: each part's own, then those of the whole model together.

    Example:
        >>> goals({"params": 9, "macs": 8, "macs of layer3": 7})
        [{'macs of layer3': 7}, {'params': 9, 'macs': 8}]
    """
    whole: dict[str, int] = {name: limit for name, limit in limits.items() if name in KINDS}
    parts = [{name: limit} for name, limit in limits.items() if name not in KINDS]
    return [*parts, whole] if whole else parts


def flips(
    costs: CostModel,
    scores: Tensor | NDArray[Any],
    is_open: Tensor | NDArray[np.bool_],
    limits: Mapping[str, int],
    goal: Iterable[str],
    *,
    closing: bool,
) -> NDArray[np.int64]:
    """Units that a shift of the threshold alone would flip to come to the limits.

    Closing: the fewest lowest-scored open units whose end brings every cost to its limit or under it (all that may go
    where that is not enough). Opening: as many of the highest-scored closed units as fit. The last open unit of a
    group stays, a group without one stays as it is, and units of infinite score or without a cost in the goal keep
    their state.

    Args:
        costs: what units cost.
        scores: ``(U,)``, larger stays longer.
        is_open: bool ``(U,)``.
        limits: largest allowed cost by kind.
        goal: kinds that are to come nearer to their limits.
        closing: whether to close units or to open some.

    Returns:
        int64 positions, in the order in which they flip.
    """
    scores, is_open = on_host(scores), on_host(is_open)
    segment = costs.segment.numpy()
    n_open = costs.n_open(is_open)
    movable = movable_units(costs, scores, goal) & (is_open if closing else ~is_open)
    if not closing:
        movable &= _one_more_fits(costs, n_open, limits)[segment]
    n_movable = int(np.count_nonzero(movable))
    found = np.zeros(0, dtype=np.int64)
    if n_movable and (first := _one_by_one(costs, scores, movable, n_open, limits, closing=closing)) is not None:
        return first
    look = FIRST_LOOK
    while n_movable:
        found = _foremost(scores, movable, min(look, n_movable), lowest=closing)
        groups = segment[found]
        # Without the last open unit of each group, and without groups that are closed.
        floor = costs.floor[groups]
        allowed = _occurrence(groups) < n_open[groups] - floor if closing else n_open[groups] >= floor
        found, groups = found[allowed], groups[allowed]

        def over(lengths: NDArray[np.int64], groups: NDArray[np.int64] = groups) -> NDArray[np.bool_]:
            change = _counts_within(groups, lengths, len(n_open))
            return ~within(costs, n_open - change if closing else n_open + change, limits)

        if len(found) <= AT_ONCE:
            ends = over(np.arange(len(found) + 1))
            if look >= n_movable or bool(ends[-1]) != closing:
                turned = np.flatnonzero(ends != closing)
                length = int(turned[0]) if len(turned) else len(ends)
                few: NDArray[np.int64] = found[: min(length, len(found)) if closing else max(length - 1, 0)]
                return few
        elif look >= n_movable or bool(over(np.array([len(found)]))[0]) != closing:
            length = first_length(lambda k: ~over(k), len(found)) if closing else first_length(over, len(found)) - 1
            chosen: NDArray[np.int64] = found[: max(length, 0)]
            return chosen
        look *= 8
    return found


def _one_by_one(
    costs: CostModel,
    scores: NDArray[Any],
    movable: NDArray[np.bool_],
    n_open: NDArray[np.int64],
    limits: Mapping[str, int],
    *,
    closing: bool,
) -> NDArray[np.int64] | None:
    """What `flips` is to find, where it is among the first few; None where it is not.

    From one optimizer step to the next there is little to flip, and the same numbers of units are asked about again.
    """
    candidates = _foremost(scores, movable, ONE_BY_ONE, lowest=closing)
    counts, chosen = n_open.copy(), list[int]()

    def fits() -> bool:
        return costs.cut(counts).within(limits)

    if closing and fits():
        return np.zeros(0, dtype=np.int64)
    for unit, group in zip(candidates.tolist(), costs.segment.numpy()[candidates].tolist(), strict=True):
        if counts[group] <= costs.floor[group] if closing else n_open[group] < costs.floor[group]:
            continue
        counts[group] += -1 if closing else 1
        if not closing and not fits():
            return np.array(chosen, dtype=np.int64)
        chosen.append(unit)
        if closing and fits():
            return np.array(chosen, dtype=np.int64)
    return np.array(chosen, dtype=np.int64) if len(candidates) < ONE_BY_ONE else None


def settled(
    costs: CostModel,
    scores: Tensor | NDArray[Any],
    is_open: Tensor | NDArray[np.bool_],
    limits: Mapping[str, int],
    goal: Iterable[str],
    move: NDArray[np.int64],
    *,
    closing: bool,
) -> NDArray[np.int64]:
    """What `flips` found, with the last unit exchanged where it is too large for the goal to land near its limits.

    Closing: where the last unit takes all costs below the limits by more than `NEAR` (a share of them), the
    lowest-scored unit of another group that does not takes its place. Opening: where the costs stay below by more, the
    highest-scored unit follows that brings them near, or else one that fits.
    """
    scores, is_open = on_host(scores), on_host(is_open)
    segment = costs.segment.numpy()
    step = -1 if closing else 1
    first = move[:-1] if closing else move
    n_first = costs.n_open(is_open) + step * np.bincount(segment[first], minlength=len(costs.sizes))

    def lands(n_open: NDArray[np.int64]) -> bool:
        cost = costs.cut(n_open)
        return bool(within(costs, n_open, limits)) and any(cost.of(k) >= (1.0 - NEAR) * limits[k] for k in goal)

    def one_more(group: int) -> NDArray[np.int64]:
        n_open: NDArray[np.int64] = n_first.copy()
        n_open[group] += step
        return n_open

    if lands(one_more(int(segment[move[-1]]))) if closing else lands(n_first):
        return move
    movable = movable_units(costs, scores, goal) & (is_open if closing else ~is_open)
    movable[move] = False
    candidates = np.flatnonzero(movable)
    starts = np.flatnonzero(np.diff(segment[candidates], prepend=-1))
    first_of = [part[np.argmin(-step * scores[part])] for part in np.split(candidates, starts[1:]) if len(part)]
    alive = n_first > costs.floor if closing else n_first >= np.maximum(costs.floor, 1)
    order = sorted(first_of, key=lambda unit: -step * float(scores[unit]))
    best = {int(segment[unit]): int(unit) for unit in order if alive[segment[unit]]}
    chosen = next((g for g in best if lands(one_more(g))), None)
    if chosen is None and not closing:
        chosen = next((g for g in best if bool(within(costs, one_more(g), limits))), None)
    return move if chosen is None else np.append(first, best[chosen])


def within(costs: CostModel, n_open: NDArray[np.int64], limits: Mapping[str, int]) -> NDArray[np.bool_]:
    """Whether models with so many units of each group, ``(..., G)``, are within the limits."""
    kinds = [costs.rows[kind] for kind in limits]
    fits: NDArray[np.bool_] = np.all(costs.cuts(n_open)[..., kinds] <= np.array(list(limits.values())), axis=-1)
    return fits


def _one_more_fits(costs: CostModel, n_open: NDArray[np.int64], limits: Mapping[str, int]) -> NDArray[np.bool_]:
    """Whether the model stays within the limits with one more unit of each group alone, bool ``(G,)``."""
    return within(costs, n_open + np.eye(len(n_open), dtype=np.int64), limits)


def movable_units(costs: CostModel, scores: NDArray[Any], kinds: Iterable[str]) -> NDArray[np.bool_]:
    """Units that have a gate and whose number enters one of these costs, bool ``(U,)``."""
    finite: NDArray[np.bool_] = np.isfinite(scores)
    priced = [costs.priced[kind] for kind in kinds]
    return finite if any(row.all() for row in priced) else finite & costs.spread(np.any(priced, axis=0))


def _foremost(scores: NDArray[Any], among: NDArray[np.bool_], n: int, *, lowest: bool) -> NDArray[np.int64]:
    """Positions of the ``n`` lowest or highest scores among some units, in that order, ties by position."""
    chosen = np.flatnonzero(_tail(scores, among, n, lowest=lowest) if len(scores) > SAMPLED * STRIDE else among)
    keys = scores[chosen] if lowest else -scores[chosen]
    if len(keys) > max(2 * n, SORTED):
        last = np.partition(keys, n - 1)[n - 1]
        chosen, keys = chosen[keys <= last], keys[keys <= last]
    return chosen[np.argsort(keys, kind="stable")[:n]]


def _tail(scores: NDArray[Any], among: NDArray[np.bool_], n: int, *, lowest: bool) -> NDArray[np.bool_]:
    """Units that hold the ``n`` lowest or highest scores, and few others: from a threshold that a sample suggests."""
    sample = scores[::STRIDE][among[::STRIDE]]
    rank = 2 * n // STRIDE + SAMPLED // 4
    if rank < len(sample):
        place = rank if lowest else len(sample) - 1 - rank
        threshold = np.partition(sample, place)[place]
        tail: NDArray[np.bool_] = (scores <= threshold if lowest else scores >= threshold) & among
        if np.count_nonzero(tail) >= n:
            return tail
    return among


def _counts_within(groups: NDArray[np.int64], lengths: NDArray[np.int64], n_groups: int) -> NDArray[np.int64]:
    """How many of the first so many units are of each group: ``(L,)`` ascending lengths to ``(L, G)``."""
    # Each unit counts from the first length on that it lies within.
    since = np.searchsorted(lengths, np.arange(len(groups)), side="right")
    counts = np.bincount(since * n_groups + groups, minlength=(len(lengths) + 1) * n_groups)
    return counts.reshape(-1, n_groups)[: len(lengths)].cumsum(0)


def first_length(holds: Callable[[NDArray[np.int64]], NDArray[np.bool_]], last: int) -> int:
    """The first length in [0, last] at which a monotone property holds, many lengths tried at once; else last + 1."""
    low, high = 0, last + 1
    doubling = 2 ** np.arange(max(last, 1).bit_length() + 1) - 1
    lengths = np.unique(np.minimum(doubling, last))
    while True:
        found = holds(lengths)
        if found.any():
            high = int(lengths[found.argmax()])
        if not found.all():
            low = int(lengths[~found][-1]) + 1
        if low >= high:
            return high
        lengths = np.unique(np.linspace(low, high - 1, min(high - low, WIDE)).astype(np.int64))


def _occurrence(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each value has come before: ``[a, b, a, a]`` gives ``[0, 0, 1, 2]``."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    lengths = np.diff(np.append(starts, len(ordered)))
    result = np.empty(len(values), dtype=np.int64)
    result[order] = np.arange(len(ordered)) - np.repeat(starts, lengths)
    return result
