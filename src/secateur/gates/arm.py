"""L0-ARM and AR: exactly binary gates trained by score-function gradients of two passes or one.

Index conventions: ``U`` units of all groups together; leading dimensions ``...`` are draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from secateur.errors import GateError
from secateur.gates.gate import Params, Pull, ScoreFunction
from secateur.gates.layout import Layout
from secateur.gates.links import Link, link_from
from secateur.gates.noise import jitter, uniform
from secateur.gates.settings import Checks

__all__ = ["ARM"]

#: Deviation of k phi at the start in the authors' code.
JITTER = 0.01
#: Open chances that links which reach 0 and 1 are held in; at 0 or 1 neither the task nor a penalty moves them.
HELD_CHANCES = (0.02, 0.98)


@dataclass(frozen=True)
class ARM(ScoreFunction):
    """Bernoulli gates ``z = 1[u < g(phi)]``, one ``phi`` per unit, without any gradient through the draw.

    ``g`` is a link at ``k phi`` with ``g(-phi) = 1 - g(phi)``. With f the task loss as a function of the gates, the
    gradient of ``E[f(z)]`` with respect to the log-odds of g(phi) is, unit by unit and with one u for all of them,

    - ARM: ``E_u[(f(1[u > 1 - g]) - f(1[u < g])) (u - 1/2)]``, two passes;
    - AR: ``E_u[f(1[u < g]) (1 - 2 u)]``, one pass and more variance.

    Times ``g'(phi) / (g (1 - g))`` it is the gradient with respect to phi: exactly k for the sigmoid, 0 where g is
    0 or 1. The authors' code keeps the factor k for the hard sigmoid too, which is biased; here the mean is exact
    for every link. Evaluation: g(phi) where g(phi) >= 1/2, else exactly 0.

    Args:
        init_open: ``P(z = 1) = g(phi)`` at the start, in (0, 1); 0.5 (LeNet) and 0.99 (WRN) in the paper.
        estimator: ``"arm"`` or ``"ar"``.
        link: ``"sigmoid"``: ``sigma(k phi)``; ``"hard_sigmoid"``: ``clip(k phi / 7 + 1/2, 0, 1)``; or your own
            function of ``k phi``, checked numerically.
        k: sharpness of the link, > 0.
        evaluation: ``"paper"`` (default) keeps survivors at g(phi), ``"binary"`` rounds them to 1.
        limits: open chances that phi is held in after each step, two numbers in (0, 1). By default none for the
            sigmoid, as in the authors' code, and (0.02, 0.98) for links that may reach 0 and 1.
        rao_blackwell: replace u in the estimates by its mean given the two masks (given the one mask in AR): the
            same mean, never more variance, and units that both masks treat alike are left out (Dong, Mnih, Tucker,
            DisARM, 2020). Off by default; not part of the paper.
        control_variate: subtract a running mean of earlier losses in AR. It does not depend on this step's u, so the
            mean stays; without it the estimate is as large as the loss itself, and most of that is noise. ARM's
            difference of losses cancels it anyway. Off by default; not part of the paper.

    Raises:
        GateError: a setting is outside its range, the link breaks its promise, or ``init_open`` is beyond ``limits``.

    Example:
        >>> from secateur.gates import Layout
        >>> method, layout = ARM(init_open=0.5), Layout((2,))
        >>> params = {"phi": torch.zeros(2, requires_grad=True)}
        >>> u = torch.tensor([0.2, 0.9])
        >>> method.sample(params, layout, u).tolist(), method.antithetic(params, layout, u).tolist()
        ([1.0, 0.0], [0.0, 1.0])
        >>> method.surrogate(params, layout, u, torch.tensor(3.0), torch.tensor(1.0)).backward()
        >>> [round(value, 3) for value in params["phi"].grad.tolist()]  # 7 (1 - 3) (u - 1/2)
        [4.2, -5.6]

    Reference:
        Li, Ji, L0-ARM: Network Sparsification via Stochastic Binary Optimization, ECML 2019.
    """

    init_open: float = 0.9
    estimator: Literal["arm", "ar"] = "arm"
    link: str | Callable[[Tensor], Tensor] = "sigmoid"
    k: float = 7.0
    evaluation: Literal["paper", "binary"] = "paper"
    limits: tuple[float, float] | None = None
    rao_blackwell: bool = False
    control_variate: bool = False
    _g: Link = field(init=False, repr=False, compare=False)
    _bounds: tuple[float, float] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        checks = Checks("ARM")
        checks.between("init_open", self.init_open, 0.0, 1.0, advice="it is the chance that a draw opens a unit")
        checks.one_of("estimator", self.estimator, ("arm", "ar"))
        checks.between("k", self.k, 0.0, None)
        checks.one_of("evaluation", self.evaluation, ("paper", "binary"))
        if self.limits is not None:
            checks.pair("limits", self.limits, 0.0, 1.0)
        checks.holds(
            not (self.control_variate and self.estimator == "arm"),
            'control_variate=True is for estimator="ar": in ARM\'s difference of two losses it cancels; leave it out',
        )
        checks.done()
        link = link_from(self.link)
        limits = tuple(self.limits) if self.limits is not None else None
        held = limits or (HELD_CHANCES if link.saturates else None)
        if held is not None:
            checks.holds(
                held[0] <= self.init_open <= held[1],
                f"init_open is {self.init_open}, expected a chance in [{held[0]}, {held[1]}]; widen limits= or move it",
            )
        checks.done()
        object.__setattr__(self, "limits", limits)
        object.__setattr__(self, "_g", link)
        bounds = None if held is None else (link.inverse(held[0]) / self.k, link.inverse(held[1]) / self.k)
        object.__setattr__(self, "_bounds", bounds)

    @property
    def name(self) -> str:
        """``"arm"`` or ``"ar"``."""
        return self.estimator

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
    def keeps_one(self) -> bool:
        """False."""
        return False

    @property
    def hears_closed(self) -> bool:
        """False: draws carry no gradient."""
        return False

    def init(
        self,
        layout: Layout,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        norms: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``phi ~ N(g^-1(init_open), (0.01 / k)^2)``."""
        params = {"phi": (self._g.inverse(self.init_open) + JITTER * jitter(layout, generator, dtype)) / self.k}
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
        """``1[u < g(phi)]``, no gradient."""
        assert noise is not None
        phi = params["phi"].detach()
        return (noise < self._g.chance(self.k * phi)).to(phi.dtype)

    def drawn(
        self, params: Params, layout: Layout, noise: Tensor | None, norms: Tensor | None = None
    ) -> tuple[Tensor, Pull]:
        """The draw; it has no gradient."""
        return self.sample(params, layout, noise, norms), lambda outer: {"phi": torch.zeros_like(params["phi"])}

    def antithetic(self, params: Params, layout: Layout, noise: Tensor | None) -> Tensor:
        """``1[u > 1 - g(phi)]``, no gradient."""
        assert noise is not None
        phi = params["phi"].detach()
        return (noise > 1.0 - self._g.chance(self.k * phi)).to(phi.dtype)

    def surrogate(
        self,
        params: Params,
        layout: Layout,
        noise: Tensor | None,
        loss: Tensor,
        antithetic_loss: Tensor | None = None,
        *,
        baseline: Tensor | float = 0.0,
    ) -> Tensor:
        """The term of value 0 whose gradient with respect to phi is the estimate, averaged over draws."""
        assert noise is not None
        if (antithetic_loss is None) == (self.estimator == "arm"):
            needs = "the loss under both draws" if self.estimator == "arm" else "one loss; it makes no second pass"
            raise GateError(f"ARM(estimator={self.estimator!r}) takes {needs}")
        first = _per_unit(loss, noise)
        if antithetic_loss is not None:
            difference = _per_unit(antithetic_loss, noise) - first
        else:
            difference = (_per_unit(baseline, noise) if isinstance(baseline, Tensor) else baseline) - first
        phi = params["phi"]
        log_odds_gradient = difference * self._weight(params, layout, noise)
        estimate = log_odds_gradient.reshape(-1, noise.shape[-1]).mean(0) * self.slope(phi)
        return (estimate * (phi - phi.detach())).sum()

    def _weight(self, params: Params, layout: Layout, noise: Tensor) -> Tensor:
        """What the difference of losses is credited with, unit by unit: by u, or by its mean given the masks."""
        two_sided = 1.0 if self.estimator == "arm" else 2.0
        if not self.rao_blackwell:
            return two_sided * (noise - 0.5)
        chance = self.prob_open(params, layout).detach()
        first = self.sample(params, layout, noise)
        if self.estimator == "ar":
            return chance - first
        return (self.antithetic(params, layout, noise) - first) * torch.maximum(chance, 1.0 - chance) / 2.0

    def slope(self, phi: Tensor) -> Tensor:
        """``g'(phi) / (g (1 - g))``, from gradients by log-odds to gradients by phi; 0 where g is 0 or 1."""
        return self.k * self._g.slope(self.k * phi.detach())

    def prob_open(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """``P(z = 1) = g(phi)``."""
        return self._g.chance(self.k * params["phi"])

    def fixed(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """g(phi) (or 1) where g(phi) >= 1/2, else 0."""
        chance = self.prob_open(params, layout, norms)
        kept = chance if self.evaluation == "paper" else torch.ones_like(chance)
        return torch.where(chance >= 0.5, kept, 0.0)

    def opened(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """The least value of a survivor, 1/2; 1 where evaluation is binary."""
        chance = self.prob_open(params, layout, norms)
        return chance.clamp(min=0.5) if self.evaluation == "paper" else torch.ones_like(chance)

    def score(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """``k phi``: the log-odds for the sigmoid, and without ties where other links saturate."""
        return self.k * params["phi"]

    def constrain_(self, params: Params, layout: Layout) -> None:
        """Bring phi to where g(phi) is within ``limits``."""
        if self._bounds is not None:
            params["phi"].clamp_(*self._bounds)


def _per_unit(loss: Tensor, noise: Tensor) -> Tensor:
    """Losses of draws ``(*draws)`` as ``(*draws, 1)``; those of draws and units as they are."""
    loss = loss.detach().to(noise.dtype)
    if loss.shape == noise.shape:
        return loss
    if loss.shape == noise.shape[:-1]:
        return loss.unsqueeze(-1)
    raise GateError(
        f"ARM: losses have shape {tuple(loss.shape)}, expected {tuple(noise.shape[:-1])}, one for each draw, or"
        f" {tuple(noise.shape)}, one for each draw and unit; one mean loss for several draws would be wrong"
    )
