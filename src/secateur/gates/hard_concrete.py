"""Hard concrete gates: a stretched, clipped binary concrete variable with mass at exactly 0 and exactly 1.

Index conventions: ``U`` units of all groups together; leading dimensions ``...`` are draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur.gates.gate import Estimator, Method, Params, Pull
from secateur.gates.layout import Layout
from secateur.gates.noise import Logistic, jitter
from secateur.gates.settings import Checks
from secateur.gates.stretch import attached, check_stretch, closing_logit, draw, pulled, stretched

__all__ = ["HardConcrete"]

#: Bound on |log_alpha| in the authors' code: ln 100.
AUTHORS_CLAMP = math.log(100.0)
#: Deviation of log_alpha at the start in the authors' code.
JITTER = 0.01


@dataclass(frozen=True)
class HardConcrete(Method):
    """Hard concrete gates, one ``log_alpha`` per unit, with pathwise gradients.

    Draw: ``s = sigma((logit(u) + log_alpha) / beta)``, ``z = clip(s (zeta - gamma) + gamma, 0, 1)``, ``u ~ U(0, 1)``.
    Open chance: ``P(z != 0) = sigma(log_alpha - beta log(-gamma / zeta))``, exact.
    Evaluation: ``clip(sigma(log_alpha) (zeta - gamma) + gamma, 0, 1)`` (``"paper"``), or with
    ``sigma(log_alpha / beta)``, the median of the draw (``"median"``).

    Args:
        init_open: ``P(z != 0)`` at the start, in (0, 1). The paper's drop rate p is
            ``init_open = sigma(logit(1 - p) + 1.599)``: 0.832 for p = 0.5, 0.920 for 0.3, 0.989 for 0.05.
        beta: temperature, > 0; small values make draws nearly binary.
        gamma: lower end of the stretched interval, < 0.
        zeta: upper end of the stretched interval, > 1.
        evaluation: ``"paper"`` (default) closes a unit once ``log_alpha <= log(-gamma / zeta)``, where 31% of draws
            still open it; ``"median"`` closes it at ``P(z != 0) = 0.5``, so that fewer units survive.
        clamp: bound on ``|log_alpha|``, kept after each step, > 0; ln 100 in the authors' code, which leaves each
            unit an open chance of at least 0.047. None for no bound.

    Raises:
        GateError: a setting is outside its range, or ``init_open`` needs a ``log_alpha`` beyond the clamp.

    Example:
        >>> from secateur.gates import Layout
        >>> method, layout = HardConcrete(init_open=0.5, evaluation="median"), Layout((3,))
        >>> params = method.init(layout, torch.Generator().manual_seed(0))
        >>> method.sample(params, layout, torch.tensor([-3.0, 1.0, 9.0])).round(decimals=2).tolist()
        [0.0, 0.25, 1.0]

    Reference:
        Louizos, Welling, Kingma, Learning Sparse Neural Networks through L0 Regularization, ICLR 2018.
    """

    init_open: float = 0.9
    beta: float = 2.0 / 3.0
    gamma: float = -0.1
    zeta: float = 1.1
    evaluation: Literal["paper", "median"] = "paper"
    clamp: float | None = AUTHORS_CLAMP

    def __post_init__(self) -> None:
        checks = Checks("HardConcrete")
        checks.between("init_open", self.init_open, 0.0, 1.0, advice="it is the chance that a draw opens a unit")
        checks.between("beta", self.beta, 0.0, None)
        check_stretch(checks, self.gamma, self.zeta)
        checks.one_of("evaluation", self.evaluation, ("paper", "median"))
        if self.clamp is not None:
            checks.between("clamp", self.clamp, 0.0, None, advice="None for no bound")
        if not checks.problems and self.clamp is not None:
            checks.holds(
                abs(self._start) <= self.clamp,
                f"init_open={self.init_open} needs log_alpha={self._start:.3f}, expected at most clamp={self.clamp:.3f}"
                " in magnitude; move init_open towards 0.5 or widen the clamp",
            )
        checks.done()

    @property
    def name(self) -> str:
        """``"hard-concrete"``."""
        return "hard-concrete"

    @property
    def estimator(self) -> Estimator:
        """Pathwise: draws carry the gradient."""
        return "pathwise"

    @property
    def binary(self) -> bool:
        """False: draws take values between 0 and 1 too."""
        return False

    @property
    def uses_norms(self) -> bool:
        """False."""
        return False

    @property
    def calibrated(self) -> bool:
        """True: the open chance is exact."""
        return True

    @property
    def open_shift(self) -> float:
        """``-beta log(-gamma / zeta)``, 1.599 by default: ``logit P(z != 0) - log_alpha``."""
        return -self.beta * closing_logit(self.gamma, self.zeta)

    @property
    def _start(self) -> float:
        return math.log(self.init_open / (1.0 - self.init_open)) - self.open_shift

    @property
    def keeps_one(self) -> bool:
        """False."""
        return False

    @property
    def hears_closed(self) -> bool:
        """False: clipped draws carry no gradient."""
        return False

    def init(
        self,
        layout: Layout,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        norms: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``log_alpha ~ N(logit(init_open) - open_shift, 0.01^2)``."""
        params = {"log_alpha": self._start + JITTER * jitter(layout, generator, dtype)}
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
        """``logit(u)``, standard logistic; u clipped to [1e-6, 1 - 1e-6]."""
        return Logistic().draw(layout, generator, dtype=dtype, device=device, draws=draws)

    def sample(self, params: Params, layout: Layout, noise: Tensor | None, norms: Tensor | None = None) -> Tensor:
        """``clip(sigma((noise + log_alpha) / beta) (zeta - gamma) + gamma, 0, 1)``."""
        assert noise is not None
        return attached(noise, params["log_alpha"], self.beta, self.gamma, self.zeta)

    def drawn(
        self, params: Params, layout: Layout, noise: Tensor | None, norms: Tensor | None = None
    ) -> tuple[Tensor, Pull]:
        """The draw; where it is not clipped it grows as the sigmoid does."""
        assert noise is not None
        log_alpha = params["log_alpha"]
        z = draw(noise, log_alpha, self.beta, self.gamma, self.zeta)
        return z, lambda outer: {"log_alpha": pulled(outer, z, log_alpha, self.beta, self.gamma, self.zeta)}

    def prob_open(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """``P(z != 0) = sigma(log_alpha - beta log(-gamma / zeta))``."""
        return (params["log_alpha"] + self.open_shift).sigmoid_()

    def fixed(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """The evaluation rule that ``evaluation`` names."""
        log_alpha = params["log_alpha"]
        return self._stretched(log_alpha if self.evaluation == "paper" else log_alpha / self.beta)

    def opened(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """The median of the draws in which the unit was open: the draw at ``u = 1 - P(z != 0) / 2``."""
        log_odds = torch.log(2.0 / self.prob_open(params, layout, norms) - 1.0)
        return self._stretched((log_odds + params["log_alpha"]) / self.beta)

    def score(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """``logit P(z != 0)``."""
        return params["log_alpha"] + self.open_shift

    def constrain_(self, params: Params, layout: Layout) -> None:
        """``log_alpha`` into ``[-clamp, clamp]``."""
        if self.clamp is not None:
            params["log_alpha"].clamp_(-self.clamp, self.clamp)

    def _stretched(self, logits: Tensor) -> Tensor:
        return stretched(logits, self.gamma, self.zeta)
