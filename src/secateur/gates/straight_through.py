"""A Bernoulli gate with the straight-through estimator: the baseline for binary gates.

Index conventions: ``U`` units of all groups together; leading dimensions ``...`` are draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.gates.gate import Estimator, Method, Params, Pull
from secateur.gates.layout import Layout
from secateur.gates.noise import jitter, uniform
from secateur.gates.settings import Checks

__all__ = ["StraightThrough"]

#: Deviation of the logits at the start.
JITTER = 0.01


@dataclass(frozen=True)
class StraightThrough(Method):
    """``z = 1[u < sigma(logits)]`` with the gradient of ``sigma(logits)``: biased, one pass, exactly binary.

    Open chance: ``sigma(logits)``. Evaluation: 1 where that is at least 1/2, else 0.

    Args:
        init_open: ``P(z = 1)`` at the start, in (0, 1).
        clamp: bound on ``|logits|``, kept after each step, > 0; None for no bound.

    Raises:
        GateError: a setting is outside its range, or ``init_open`` needs logits beyond the clamp.

    Example:
        >>> from secateur.gates import Layout
        >>> params = {"logits": torch.zeros(2, requires_grad=True)}
        >>> z = StraightThrough().sample(params, Layout((2,)), torch.tensor([0.4, 0.6]))
        >>> z.sum().backward()
        >>> z.tolist(), params["logits"].grad.tolist()
        ([1.0, 0.0], [0.25, 0.25])

    Reference:
        Bengio, Leonard, Courville, Estimating or Propagating Gradients Through Stochastic Neurons, 2013.
    """

    init_open: float = 0.9
    clamp: float | None = math.log(100.0)

    def __post_init__(self) -> None:
        checks = Checks("StraightThrough")
        checks.between("init_open", self.init_open, 0.0, 1.0, advice="it is the chance that a draw opens a unit")
        if self.clamp is not None:
            checks.between("clamp", self.clamp, 0.0, None, advice="None for no bound")
        if not checks.problems and self.clamp is not None:
            checks.holds(
                abs(self._start) <= self.clamp,
                f"init_open={self.init_open} needs logits of {self._start:.3f}, expected at most"
                f" clamp={self.clamp:.3f} in magnitude; move init_open towards 0.5 or widen the clamp",
            )
        checks.done()

    @property
    def name(self) -> str:
        """``"straight-through"``."""
        return "straight-through"

    @property
    def estimator(self) -> Estimator:
        """Pathwise: draws carry a (biased) gradient."""
        return "pathwise"

    @property
    def binary(self) -> bool:
        """True."""
        return True

    @property
    def uses_norms(self) -> bool:
        """False."""
        return False

    @property
    def calibrated(self) -> bool:
        """True: the open chance is exact."""
        return True

    @property
    def _start(self) -> float:
        return math.log(self.init_open / (1.0 - self.init_open))

    @property
    def keeps_one(self) -> bool:
        """False."""
        return False

    @property
    def hears_closed(self) -> bool:
        """True: every draw has the gradient of its chance."""
        return True

    def init(
        self,
        layout: Layout,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        norms: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``logits ~ N(logit(init_open), 0.01^2)``."""
        params = {"logits": self._start + JITTER * jitter(layout, generator, dtype)}
        self.constrain_(params, layout)
        return params

    def noise(
        self,
        layout: Layout,
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        draws: tuple[int, ...] = (),
    ) -> Tensor:
        """``u ~ U[0, 1)``."""
        return uniform(layout, generator, dtype=dtype, device=device, draws=draws)

    def sample(self, params: Params, layout: Layout, noise: Tensor | None, norms: Tensor | None = None) -> Tensor:
        """``1[u < sigma(logits)]`` with the gradient of the chance."""
        assert noise is not None
        chance = self.prob_open(params, layout, norms)
        # The bracket is exactly 0, so draws are exactly 0 or 1.
        return (noise < chance.detach()).to(chance.dtype) + (chance - chance.detach())

    def drawn(
        self, params: Params, layout: Layout, noise: Tensor | None, norms: Tensor | None = None
    ) -> tuple[Tensor, Pull]:
        """The draw, with the gradient of the chance."""
        assert noise is not None
        chance = self.prob_open(params, layout, norms)
        size = chance.shape
        z = (noise < chance).to(chance.dtype)
        return z, lambda outer: {"logits": torch.ops.aten.sigmoid_backward(outer.sum_to_size(size), chance)}

    def prob_open(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """``sigma(logits)``."""
        return torch.sigmoid(params["logits"])

    def fixed(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """1 where the chance is at least 1/2, else 0."""
        return (params["logits"] >= 0).to(params["logits"].dtype)

    def opened(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """1."""
        return torch.ones_like(params["logits"])

    def score(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """The logits."""
        return params["logits"]

    def constrain_(self, params: Params, layout: Layout) -> None:
        """The logits into ``[-clamp, clamp]``."""
        if self.clamp is not None:
            params["logits"].clamp_(-self.clamp, self.clamp)
