"""Magnitude pruning on a schedule: the baseline that learns no gate at all.

Index conventions: ``G`` groups, ``U`` units of all groups together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur.gates.gate import Estimator, Method, Params
from secateur.gates.layout import Layout
from secateur.gates.settings import Checks

__all__ = ["Magnitude"]

#: Exponent of the ramp in the reference.
CUBIC = 3
#: What one step adds to the counter. Averages of a model average its buffers too, and cut whole numbers to whole
#: numbers: counted by ones, the average of 0 and 1 would be 0 for ever. A counter of floating point would not do
#: either: in a model that is converted to bfloat16 it ends at 256.
STEP = 2**20


@dataclass(frozen=True)
class Magnitude(Method):
    """Closes the units of smallest norm, a share of them that grows with the steps; nothing is trained.

    Share of closed units after step t: ``final_closed (1 - (1 - clip((t - start) / steps, 0, 1))^3)``. Closed units
    return when their norm outgrows another's; no unit is closed before ``start``. Each group keeps its largest unit.

    The open "chance" is the gate itself and carries no gradient: a penalty or a multiplier cannot steer this method,
    its schedule does.

    Args:
        final_closed: share of the units that are closed at the end, in [0, 1).
        start: optimizer steps before the first unit is closed, >= 0.
        steps: optimizer steps from there until the final share is reached, >= 1.
        scope: ``"group"`` closes the same share of every group, ``"global"`` compares the norms of all groups as
            they are given.

    Raises:
        GateError: a setting is outside its range, or norms are missing.

    Example:
        >>> from secateur.gates import Layout
        >>> method, layout = Magnitude(final_closed=0.5, steps=1), Layout((4,))
        >>> params, norms = method.init(layout), torch.tensor([3.0, 1.0, 2.0, 4.0])
        >>> method.fixed(params, layout, norms).tolist()
        [1.0, 1.0, 1.0, 1.0]
        >>> method.constrain_(params, layout)
        >>> method.fixed(params, layout, norms).tolist()
        [1.0, 0.0, 0.0, 1.0]

    Reference:
        Zhu, Gupta, To prune, or not to prune: exploring the efficacy of pruning for model compression, 2017.
    """

    final_closed: float = 0.5
    start: int = 0
    steps: int = 1000
    scope: Literal["group", "global"] = "group"

    def __post_init__(self) -> None:
        checks = Checks("Magnitude")
        if self.final_closed != 0:
            checks.between("final_closed", self.final_closed, 0.0, 1.0, advice="or exactly 0")
        checks.count("start", self.start, 0)
        checks.count("steps", self.steps, 1)
        checks.one_of("scope", self.scope, ("group", "global"))
        checks.done()

    @property
    def name(self) -> str:
        """``"magnitude"``."""
        return "magnitude"

    @property
    def estimator(self) -> Estimator:
        """Pathwise, with nothing to train."""
        return "pathwise"

    @property
    def binary(self) -> bool:
        """True."""
        return True

    @property
    def uses_norms(self) -> bool:
        """True."""
        return True

    @property
    def calibrated(self) -> bool:
        """True: what is open is open."""
        return True

    @property
    def keeps_one(self) -> bool:
        """True: the largest."""
        return True

    @property
    def hears_closed(self) -> bool:
        """False: nothing is trained."""
        return False

    def init(
        self,
        layout: Layout,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        norms: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The step counter, at 0, in parts of a step."""
        return {"step": torch.zeros((), dtype=torch.int64, device=generator.device if generator is not None else "cpu")}

    def noise(
        self,
        layout: Layout,
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        draws: tuple[int, ...] = (),
    ) -> None:
        """None: gates are deterministic."""
        return

    def sample(self, params: Params, layout: Layout, noise: Tensor | None, norms: Tensor | None = None) -> Tensor:
        """1 for units that the schedule leaves open, else 0."""
        norms = self._required(norms, layout).detach()
        share = self.share_closed(params)
        rank = layout.rank(norms)
        if self.scope == "group":
            return (rank >= layout.spread(_whole(share * layout.counts))).to(norms.dtype)
        largest = rank == layout.spread(layout.counts) - 1
        ordered = torch.empty_like(rank)
        order = norms.masked_fill(largest, torch.inf).argsort(stable=True)
        ordered[order] = torch.arange(layout.total, device=norms.device)
        return (largest | (ordered >= _whole(share * layout.total))).to(norms.dtype)

    def share_closed(self, params: Params) -> Tensor:
        """Share of units that are closed now, a scalar in [0, final_closed]."""
        step = (params["step"].double() / STEP).round()
        progress = ((step - self.start) / self.steps).clamp(0.0, 1.0)
        return self.final_closed * (1.0 - (1.0 - progress) ** CUBIC)

    def drawn(self, params: Params, layout: Layout, noise: Tensor | None, norms: Tensor | None = None) -> None:
        """None: gates are found by sorting."""
        return

    def prob_open(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """The gates; no gradient."""
        return self.sample(params, layout, None, norms)

    def fixed(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """The gates."""
        return self.sample(params, layout, None, norms)

    def opened(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """1."""
        return torch.ones_like(self._required(norms, layout))

    def score(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """Norms (global scope), or their rank in the group as a fraction, so that groups shrink alike."""
        norms = self._required(norms, layout).detach()
        if self.scope == "global":
            return norms
        return (layout.rank(norms) + 1).to(norms.dtype) / layout.spread(layout.counts)

    def constrain_(self, params: Params, layout: Layout) -> None:
        """One step on."""
        params["step"].add_(STEP)


def _whole(count: Tensor) -> Tensor:
    """The floor, where rounding does not lose a unit of a product that is a whole number."""
    return (count + 1e-9).long()
