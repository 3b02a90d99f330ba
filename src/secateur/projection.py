"""From a pattern of open units to the nearest one within a budget, by exact counts.

Index conventions: ``U`` units of all groups in a row, ``G`` groups. Costs never fall when a unit opens, which is what
every search here relies on.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.costs import KINDS, CostModel, Kind
from secateur.errors import BudgetError

__all__ = ["flips", "project_onto"]

#: Units that a search sorts at first; more only where these do not suffice.
FIRST_LOOK = 1024


def flips(
    costs: CostModel, scores: Tensor, is_open: Tensor, limits: Mapping[Kind, int], *, closing: bool
) -> NDArray[np.int64]:
    """Units that a shift of the threshold alone would flip to come to the limits.

    Closing: the fewest lowest-scored open units whose end brings every cost to its limit or under it (all that may go
    where that is not enough). Opening: as many of the highest-scored closed units as fit. The last open unit of a
    group stays, a group without one stays as it is, and units of infinite score or without a cost keep their state.

    Args:
        costs: what units cost.
        scores: ``(U,)``, larger stays longer.
        is_open: bool ``(U,)``.
        limits: largest allowed cost by kind.
        closing: whether to close units or to open some.

    Returns:
        int64 positions, in the order in which they flip.
    """
    scores = scores.detach()
    n_open = costs.n_open(is_open)
    segment = costs.segment_on(scores.device)
    movable = _movable(costs, scores, limits) & (is_open if closing else ~is_open)
    n_movable = int(movable.sum())
    ranking = scores.masked_fill(~movable, torch.inf if closing else -torch.inf)
    found = np.zeros(0, dtype=np.int64)
    look = FIRST_LOOK
    while n_movable:
        found = torch.topk(ranking, min(look, n_movable), largest=not closing).indices.cpu().numpy()
        groups = segment[torch.from_numpy(found).to(segment.device)].cpu().numpy()
        # Without the last open unit of each group, and without groups that are closed.
        floor = costs.floor[groups]
        allowed = _occurrence(groups) < n_open[groups] - floor if closing else n_open[groups] >= floor
        found, groups = found[allowed], groups[allowed]
        step = -1 if closing else 1

        def within(length: int, groups: NDArray[np.int64] = groups, step: int = step) -> bool:
            change = np.bincount(groups[:length], minlength=len(n_open))
            return fits(costs, n_open + step * change, limits)

        enough = within(len(found)) if closing else not within(len(found))
        if enough or look >= n_movable:
            length = _first(within, len(found)) if closing else _first(lambda k: not within(k), len(found)) - 1
            chosen: NDArray[np.int64] = found[: max(length, 0)]
            return chosen
        look *= 8
    return found


def project_onto(costs: CostModel, scores: Tensor, is_open: Tensor, limits: Mapping[Kind, int]) -> Tensor:
    """The pattern within the limits that flips few units, the least wanted ones.

    Over a limit, the lowest-scored open units close until the costs are within; of these, any that fit in what is left
    open again. Under all limits, the highest-scored closed units open while they fit. Then what is left is filled by
    the largest units that fit, so that no further single unit does. A group never loses its last unit; a group without
    an open unit counts as one unit, as a cut leaves it, and stays as it is.

    Args:
        costs: what units cost.
        scores: ``(U,)``, larger stays longer; units of infinite score, which have no gate, keep their state.
        is_open: bool ``(U,)``.
        limits: largest allowed cost by kind.

    Returns:
        bool ``(U,)`` on the CPU.

    Raises:
        BudgetError: a shape is wrong, a score is NaN, or the limits are below what units without gates cost.
    """
    scores, is_open = scores.detach().cpu(), is_open.detach().to("cpu", torch.bool)
    for name, vector in (("scores", scores), ("open", is_open)):
        if vector.shape != (costs.total,):
            raise BudgetError(f"project: {name} has shape {tuple(vector.shape)}, expected ({costs.total},)")
    if bool(scores.isnan().any()):
        raise BudgetError(f"project: {int(scores.isnan().sum())} of {costs.total} scores are NaN; training diverged")
    n_open = costs.n_open(is_open)
    closing = not fits(costs, n_open, limits)
    flipped = flips(costs, scores, is_open, limits, closing=closing)
    result = is_open.clone()
    result[torch.from_numpy(flipped)] = not closing
    if closing and not fits(costs, costs.n_open(result), limits):
        least = costs.exact(result)
        raise BudgetError(
            "project: the budget cannot be met by closing units that have gates: "
            + ", ".join(f"{kind} at most {limit}, least {getattr(least, kind)}" for kind, limit in limits.items())
            + "; raise the budget or gate more groups"
        )
    if closing:
        back = np.zeros(costs.total, dtype=bool)
        back[flipped] = True
        _refill(costs, scores, result, limits, back, largest=False)
    _refill(costs, scores, result, limits, _movable(costs, scores, limits).numpy(), largest=True)
    return result


def fits(costs: CostModel, n_open: NDArray[np.int64], limits: Mapping[Kind, int]) -> bool:
    """Whether a model with so many units of each group, ``(G,)``, is within the limits."""
    cost = costs.cut(n_open)
    return all(getattr(cost, kind) <= limit for kind, limit in limits.items())


def _refill(
    costs: CostModel,
    scores: Tensor,
    is_open: Tensor,
    limits: Mapping[Kind, int],
    candidates: NDArray[np.bool_],
    *,
    largest: bool,
) -> None:
    """Open candidates that still fit, in place: highest scores first, or most expensive groups first.

    Opening a unit never makes another one cheaper, so a group whose next unit does not fit is done.
    """
    n_open = costs.n_open(is_open)
    closed = np.flatnonzero(candidates & ~is_open.numpy())
    segment = costs.segment.numpy()[closed]
    ends = np.searchsorted(segment, np.arange(len(n_open) + 1))
    by_group: dict[int, NDArray[np.int64]] = {}
    for group in np.unique(segment).tolist():
        own = closed[ends[group] : ends[group + 1]]
        if n_open[group] >= costs.floor[group]:
            by_group[group] = own[np.argsort(-scores.numpy()[own], kind="stable")]
    now = costs.cut(n_open)
    total = {kind: max(getattr(costs.dense, kind), 1) for kind in KINDS}

    def added(group: int, number: int) -> NDArray[np.int64]:
        more: NDArray[np.int64] = n_open.copy()
        more[group] += number
        return more

    def size(group: int) -> float:
        with_one = costs.cut(added(group, 1))
        return float(max((getattr(with_one, kind) - getattr(now, kind)) / total[kind] for kind in limits))

    def key(group: int, position: int) -> float:
        return -size(group) if largest else -float(scores[by_group[group][position]])

    queue = [(key(group, 0), group, 0) for group in by_group]
    heapq.heapify(queue)
    while queue:
        _, group, position = heapq.heappop(queue)
        left = len(by_group[group]) - position
        if largest:
            # Units of a group cost alike, so all that fit come at once.
            number = _first(lambda k, group=group: not fits(costs, added(group, k), limits), left) - 1  # type: ignore[misc]
        else:
            number = int(fits(costs, added(group, 1), limits))
        is_open[torch.from_numpy(by_group[group][position : position + number])] = True
        n_open[group] += number
        if not largest and number and left > 1:
            heapq.heappush(queue, (key(group, position + 1), group, position + 1))


def _movable(costs: CostModel, scores: Tensor, limits: Mapping[Kind, int]) -> Tensor:
    """Units that have a gate and whose number enters a limited cost, bool ``(U,)``."""
    priced = np.any([costs.priced[kind] for kind in limits], axis=0)
    if priced.all():
        return scores.isfinite()
    return scores.isfinite() & torch.from_numpy(priced).to(scores.device)[costs.segment_on(scores.device)]


def _first(holds: Callable[[int], bool], last: int) -> int:
    """The first length in [0, last] at which a monotone property holds, by doubling and halving; else last + 1."""
    if holds(0):
        return 0
    low, high = 0, 1
    while high < last and not holds(high):
        low, high = high, 2 * high
    high = min(high, last)
    if high <= low or not holds(high):
        return last + 1
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def _occurrence(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each value has come before: ``[a, b, a, a]`` gives ``[0, 0, 1, 2]``."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    lengths = np.diff(np.append(starts, len(ordered)))
    result = np.empty(len(values), dtype=np.int64)
    result[order] = np.arange(len(ordered)) - np.repeat(starts, lengths)
    return result
