"""The end of pruning: from a gated model to a plain small one, and a report of what was done and how it was proved.

Index conventions: ``Z`` gates of the model in a row, ``U`` counted units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from secateur.budgets.budget import NANOSECONDS
from secateur.compaction.compact import PLAN, compact, cut_of
from secateur.compaction.distance import distance
from secateur.compaction.proof import TOLERANCE, Proof, check_same, prove
from secateur.errors import CompactionError, GateError
from secateur.pruning.draws import first_rows, gates_of
from secateur.pruning.loading import refuse_dense_keys
from secateur.pruning.outputs import Multiplier, fold_, multipliers, multiply_
from secateur.pruning.placement import gated_sites, strip
from secateur.pruning.probe import evaluating
from secateur.pruning.shrink import Removal
from secateur.pruning.units import Units
from secateur.structure.copies import deep_copy
from secateur.structure.example import Example, summary
from secateur.structure.groups import Cost
from secateur.structure.nested import tensors_in
from secateur.structure.outside import nothing_left

__all__ = ["Report", "as_now", "baked", "cut_to", "differences", "pin", "proved", "runnable", "with_multipliers_"]


@dataclass(frozen=True, eq=False)
class Report:
    """What `Pruner.finalize` did.

    Args:
        dense: cost of the model before.
        gated: cost of the fixed gates before the projection onto the budget.
        compact: cost of the small model; its parameters are counted on the model itself, those that are not zero where
            single weights had gates. Latencies, of all three, are those that a latency model's structure gives.
        flipped: units that the projection opened or closed.
        difference_float32: largest absolute difference of any output between the gated model in evaluation mode and the
            small one, in the model's own precision; infinite where one of them has no finite number and the other does,
            NaN where there were no example inputs.
        difference_float64: the same for the gated model converted to float64 and what is cut from that; NaN where it
            does not run in it.
        proof: the comparison in float64 with re-drawn numbers, None without example inputs.
        keep: units of every structured group that the small model has, ascending positions: the open ones, one where a
            group lost them all, and those that ``round_to`` keeps as zeros.
        widths: by group, those of inputs and single weights included, how many units the small model has, and the dense
            one.
        as_zeros: by group of activations, how many of its closed units no unit of the small model went with, since what
            follows does not pass zeros on: they are zero there, and cost what they did.
        multiplied: modules of the small model whose output is still multiplied by gates.
    """

    dense: Cost
    gated: Cost
    compact: Cost
    flipped: int
    difference_float32: float
    difference_float64: float
    proof: Proof | None
    keep: Mapping[str, Tensor]
    widths: Mapping[str, tuple[int, int]]
    as_zeros: Mapping[str, int] = field(default_factory=dict)
    multiplied: tuple[str, ...] = ()

    def __str__(self) -> str:
        timed = self.dense.latency > 0
        rows = [["", "parameters", "share", "MACs", "share", *(["ms (predicted)", "share"] if timed else [])]]
        for name, cost in (("dense", self.dense), ("gated", self.gated), ("compact", self.compact)):
            params, macs = cost.params / max(self.dense.params, 1), cost.macs / max(self.dense.macs, 1)
            rows.append([name, f"{cost.params:,}", f"{params:.2%}", f"{cost.macs:,}", f"{macs:.2%}"])
            if timed:
                rows[-1] += [f"{cost.latency / NANOSECONDS:.4g}", f"{cost.latency / self.dense.latency:.2%}"]
        wide = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, wide, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines.append(f"units that the projection flipped: {self.flipped}")
        if self.flipped and (apart := self._apart) > _FAR:
            lines.append(
                f"the gates were {100 * apart:.0f} points of the dense cost away from the budget: nothing was trained"
                " without what the projection closed. Larger gate rates or more steps bring them there; magnitude"
                " pruning goes by its own final_closed and steps"
            )
        lines.append(
            "largest difference, gated and compact: "
            f"{_number(self.difference_float32)} as they are, {_number(self.difference_float64)} in float64"
        )
        if self.as_zeros:
            named = ", ".join(f"{name} {closed}" for name, closed in self.as_zeros.items())
            lines.append(f"closed activations that stay as zeros: {named}")
        if self.multiplied:
            lines.append(f"outputs that are still multiplied: {', '.join(self.multiplied)}")
        lines.append("units kept: " + ", ".join(f"{name} {n}/{size}" for name, (n, size) in self.widths.items()))
        return "\n".join(lines)

    @property
    def _apart(self) -> float:
        """How far the cost of the gates was from that of the small model, the largest share of the dense one."""
        pairs = [(self.gated.params, self.compact.params, self.dense.params)]
        pairs.append((self.gated.macs, self.compact.macs, self.dense.macs))
        return max(abs(gated - small) / max(dense, 1) for gated, small, dense in pairs)


#: From how large a share of the dense cost on a report says that the gates had not come to the budget.
_FAR = 0.05


def _number(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{value:.2g}"


def pin(model: nn.Module, fixed: Tensor) -> None:
    """Let evaluation use these gates ``(Z,)`` from now on, multiplied in the precision that they have now.

    Converting the model to another precision then rounds nothing anew: it still computes what is cut from it now.
    """
    gates = gates_of(model)
    gates.pinned = fixed
    for site in gated_sites(model):
        site.gate.exact_in = (fixed.dtype, site.chain.original.dtype)


def baked(model: nn.Module, removal: Removal | None = None) -> nn.Module:
    """A plain copy of a gated model, in which every weight is multiplied by its evaluation gates.

    A tied weight is multiplied once, and stays tied. What shrinking took away is there again, as zeros. Gates at
    outputs go into the layer's own parameters where these can take them up; others are left to `with_multipliers_`.
    """
    plain = _copy(model)
    folded: dict[int, tuple[Tensor, Tensor]] = {}
    with evaluating(plain):
        for site in gated_sites(plain):
            original = site.chain.original
            if id(original) not in folded:
                folded[id(original)] = original, site.gate(original)
    strip(plain)
    refuse_dense_keys(plain)
    with torch.no_grad():
        for original, product in folded.values():
            original.copy_(product)
    if removal is not None:
        removal.grow_(plain)
    fold_(plain, model)
    return plain


def with_multipliers_(
    small: nn.Module, left: Mapping[str, Multiplier], units: Units, is_open: Tensor, round_to: int = 1
) -> nn.Module:
    """A cut model, in place, that also multiplies the outputs of which no weight took up the gates.

    Args:
        small: cut from what `baked` made of a gated model.
        left: the `multipliers` of that.
        units: of the gated model.
        is_open: bool ``(U,)``, as in the cut.
        round_to: as in the cut.
    """
    scales = multiply_(small, left, units.keep(units.stays(is_open, round_to))) if left else {}
    if scales:
        plan = cut_of(small)
        assert plan is not None
        setattr(small, PLAN, replace(plan, scales={**plan.scales, **scales}))
    return small


def _copy(model: nn.Module) -> nn.Module:
    with evaluating(model):
        for module in model.modules():
            # These keep computed weights in a list, and tensors that carry a graph cannot be copied.
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
    return deep_copy(model)


def cut_to(plain: nn.Module, units: Units, is_open: Tensor, *, in_place: bool = False, round_to: int = 1) -> nn.Module:
    """Cut a plain model to its open units, bool ``(U,)``, structured ones and single inputs in one step.

    A layer that lost every input keeps one, whose weights are zero; so do closed units that widths are rounded up by.
    Single weights that do not count become 0.0, in ``plain`` too.
    """
    units.zero_closed_(plain, is_open)
    return compact(plain, units.cuttable, units.keep(is_open), in_place=in_place, round_to=round_to)


def proved(
    plain: nn.Module, small: nn.Module, units: Units, is_open: Tensor, examples: Sequence[Example], *, round_to: int = 1
) -> Proof | None:
    """Prove that what `cut_to` made of a plain model computes what that computes with its closed units at zero."""
    if not examples:
        return None
    return prove(plain, small, units.cuttable, units.keep(is_open), list(examples), round_to=round_to)


def runnable(model: nn.Module, noted: Example) -> Example:
    """Of the inputs of a training forward the first rows, where the model runs on them, else all that there are.

    Raises:
        GateError: it runs on neither.
    """
    rows = first_rows(noted)
    if _problem(model, rows) is None:
        return rows
    if (problem := _problem(model, noted)) is None:
        return noted
    raise GateError(
        "finalize: the model was attached without examples=, and does not run in evaluation mode on what was noted of"
        f" its first training forward, {summary(noted)}: {type(problem).__name__}: {problem}. Pass inputs for the"
        " proof, as in pruner.finalize(examples=(x[:2],))"
    ) from problem


def as_now(model: nn.Module, example: Example) -> Example:
    """Inputs of `attach` for a model that has been converted or moved since; as they are where it runs on them.

    Raises:
        GateError: it does not run on them in its own type and on its own device either.
    """
    tensors = [one for one in tree_leaves((example.args, dict(example.kwargs))) if isinstance(one, Tensor)]
    own = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    dtypes, devices = {one.dtype for one in own}, {one.device for one in own}
    as_before = all(one.dtype in dtypes or not one.is_floating_point() for one in tensors)
    if not own or (as_before and all(one.device in devices for one in tensors)) or _problem(model, example) is None:
        return example

    def convert(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        return one.to(own[0].device, own[0].dtype if one.is_floating_point() else one.dtype)

    converted = Example(*tree_map(convert, (example.args, dict(example.kwargs))))
    if (problem := _problem(model, converted)) is None:
        return converted
    raise GateError(
        f"finalize: the model does not run on the examples of attach any more, {summary(example)}, and its parameters"
        f" are {', '.join(sorted(map(str, dtypes)))} now: {type(problem).__name__}: {problem}. Pass inputs for the"
        " proof, as in pruner.finalize(examples=(x[:2],))"
    ) from problem


def _problem(model: nn.Module, example: Example) -> Exception | None:
    """What a model raises in evaluation mode."""
    try:
        with evaluating(model):
            model(*example.args, **example.kwargs)
    except Exception as error:  # noqa: BLE001 - whatever a user's model raises
        return error
    return None


def differences(
    gated: nn.Module,
    small: nn.Module,
    units: Units,
    is_open: Tensor,
    examples: Sequence[Example],
    removal: Removal | None = None,
    *,
    round_to: int = 1,
) -> tuple[float, float]:
    """Largest absolute difference of the outputs in evaluation mode: as the models are, and in float64.

    For the latter the gated model is converted and then cut, so that what a cut computes (the rescaled weights of an
    RMSNorm) is computed in float64 too.

    Raises:
        CompactionError: an output differs, whatever rounds in between. `proved` knows of no gates: what these become in
            the small model, factors of weights or of outputs, is held against them here.
    """
    if not examples:
        return math.nan, math.nan
    with nothing_left(gated):
        return _differences(gated, small, units, is_open, examples, removal, round_to)


def _differences(
    gated: nn.Module,
    small: nn.Module,
    units: Units,
    is_open: Tensor,
    examples: Sequence[Example],
    removal: Removal | None,
    round_to: int,
) -> tuple[float, float]:
    as_is, _ = _difference(gated, small, examples)

    def cut(raised: nn.Module) -> nn.Module:
        made = cut_to(baked(raised, removal), units, is_open, in_place=True, round_to=round_to)
        return with_multipliers_(made, multipliers(raised), units, is_open, round_to)

    def pair(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
        raised = _copy(gated)
        raised = raised.double() if dtype is torch.float64 else raised.float()
        for site in gated_sites(raised):
            site.gate.exact_in = None  # rounding is what is not to be seen
        return raised, cut(raised)

    doubled = _copy(gated).double()
    calls = [Example(*tree_map(_double, (example.args, dict(example.kwargs)))) for example in examples]
    try:
        in_float64, relative = _difference(doubled, cut(doubled), calls)
    except CompactionError:
        raise
    except RuntimeError:  # a model that computes in a precision of its own
        in_float64, relative = math.nan, math.inf
    if relative > TOLERANCE:  # such a model rounds inside, too
        try:
            check_same(pair, list(examples))
        except CompactionError as error:
            raise CompactionError(f"the gated model and what was cut from it are not the same: {error}") from error
    return as_is, in_float64


def _double(leaf: object) -> object:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _difference(first: nn.Module, second: nn.Module, examples: Sequence[Example]) -> tuple[float, float]:
    """The largest difference of any output, and the largest relative to the largest value of its output."""
    absolute = relative = 0.0
    for example in examples:
        outputs = []
        for model in (first, second):
            with evaluating(model):
                torch.manual_seed(0)
                output = model(*example.args, **example.kwargs)
            outputs.append(tensors_in(output))
        for a, b in zip(*outputs, strict=True):
            if a.numel() and not torch.equal(a, b):
                wide = torch.promote_types(a.dtype, torch.float64)
                found, scale = distance(a.to(wide), b.to(wide))
                absolute, relative = max(absolute, found), max(relative, found / scale)
    return absolute, relative
