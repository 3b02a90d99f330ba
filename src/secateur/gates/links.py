"""Links of ARM: increasing functions with ``g(-t) = 1 - g(t)`` that turn a parameter into an open chance."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import GateError
from secateur.gates.settings import CUSTOM

__all__ = ["LINKS", "HardSigmoid", "Link", "OwnLink", "Sigmoid", "link_from"]

#: Width of the hard sigmoid's linear zone: ``clip(t / 7 + 1/2, 0, 1)``, a constant of the authors' code.
HARD_WIDTH = 7.0
#: Largest |g(t) + g(-t) - 1| that counts as antisymmetric, and largest fall that counts as rounding, in float64.
_TOLERANCE = 1e-6
_ROUNDING = 1e-12
#: Where a user's link is looked at: [-20, 20] in 2001 steps.
_REACH = 20.0
_STEPS = 2001
#: Halvings that bring a bracket of up to 1e6 to the spacing of float64.
_HALVINGS = 80
_FARTHEST = 1e6


class Link(ABC):
    """An open chance ``g(t)`` with its inverse and the slope of its log-odds; ``t = k phi``."""

    @property
    @abstractmethod
    def saturates(self) -> bool:
        """Whether g may reach exactly 0 and 1, where no estimator can move it any more."""

    @abstractmethod
    def chance(self, t: Tensor) -> Tensor:
        """``g(t)`` in [0, 1], element by element and differentiable."""

    @abstractmethod
    def slope(self, t: Tensor) -> Tensor:
        """``g'(t) / (g(t) (1 - g(t)))``, exactly 0 where g is 0 or 1; without gradient."""

    @abstractmethod
    def inverse(self, chance: float) -> float:
        """The t at which g is ``chance``, in (0, 1)."""


@dataclass(frozen=True)
class Sigmoid(Link):
    """``sigma(t)``."""

    @property
    def saturates(self) -> bool:
        """False."""
        return False

    def chance(self, t: Tensor) -> Tensor:
        """``sigma(t)``."""
        return torch.sigmoid(t)

    def slope(self, t: Tensor) -> Tensor:
        """Exactly 1, written out: the quotient is 0/0 in float32 once sigma saturates."""
        return torch.ones_like(t)

    def inverse(self, chance: float) -> float:
        """The logit."""
        return math.log(chance / (1.0 - chance))


@dataclass(frozen=True)
class HardSigmoid(Link):
    """``clip(t / 7 + 1/2, 0, 1)``."""

    @property
    def saturates(self) -> bool:
        """True."""
        return True

    def chance(self, t: Tensor) -> Tensor:
        """``clip(t / 7 + 1/2, 0, 1)``."""
        return (t / HARD_WIDTH + 0.5).clamp(0.0, 1.0)

    def slope(self, t: Tensor) -> Tensor:
        """``1 / (7 g (1 - g))`` in the linear zone, else 0."""
        chance = self.chance(t)
        spread = chance * (1.0 - chance)
        return torch.where(spread > 0, 1.0 / (HARD_WIDTH * spread), 0.0)

    def inverse(self, chance: float) -> float:
        """``7 (chance - 1/2)``."""
        return HARD_WIDTH * (chance - 0.5)


@dataclass(frozen=True)
class OwnLink(Link):
    """A user's function as a link: slope by autograd, inverse by halving."""

    function: Callable[[Tensor], Tensor]

    @property
    def saturates(self) -> bool:
        """True: unknown, so its chances are held away from 0 and 1."""
        return True

    def chance(self, t: Tensor) -> Tensor:
        """The function itself."""
        return self.function(t)

    def slope(self, t: Tensor) -> Tensor:
        """The quotient, with g' by autograd."""
        with torch.enable_grad():
            point = t.detach().clone().requires_grad_()
            chance = self.function(point)
            (derivative,) = torch.autograd.grad(chance.sum(), point)
        spread = (chance * (1.0 - chance)).detach()
        return torch.where(spread > 0, derivative / spread.clamp(min=torch.finfo(t.dtype).tiny), 0.0)

    @torch.no_grad()
    def inverse(self, chance: float) -> float:
        """By halving a bracket that is widened until it holds the solution.

        Raises:
            GateError: g does not come as near to 0 or 1 as ``chance``.
        """

        def at(t: float) -> float:
            return self.function(torch.tensor([t], dtype=torch.float64)).item()

        reach = _REACH
        while not at(-reach) <= chance <= at(reach):
            reach *= 2
            if reach > _FARTHEST:
                raise GateError(f"ARM: link never reaches the open chance {chance:g}; choose a steeper function")
        low, high = -reach, reach
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if at(middle) < chance else (low, middle)
        return (low + high) / 2


#: The links of the paper by name.
LINKS: Mapping[str, Link] = {"sigmoid": Sigmoid(), "hard_sigmoid": HardSigmoid()}


def link_from(value: str | Callable[[Tensor], Tensor]) -> Link:
    """The link of a name, or a user's own function once it has been checked numerically.

    Args:
        value: a key of ``LINKS``, or ``g`` itself: differentiable, element by element, into [0, 1], not decreasing,
            with ``g(-t) = 1 - g(t)``.

    Raises:
        GateError: the name is unknown, or the function breaks one of these promises; says at which t.

    Example:
        >>> round(link_from(torch.special.ndtr).inverse(0.975), 4)
        1.96
        >>> link_from(lambda t: torch.sigmoid(t - 1))
        Traceback (most recent call last):
            ...
        secateur.errors.GateError: ARM: link <lambda> is not antisymmetric: g(...) + g(...) = ..., expected 1; ...
    """
    if isinstance(value, str) and value in LINKS:
        return LINKS[value]
    if isinstance(value, str) and value.startswith(CUSTOM):
        raise GateError(f"ARM: link {value!r} was a user's own function; pass the function itself as link=")
    if not callable(value):
        raise GateError(f"ARM: link is {value!r}, expected {', '.join(map(repr, LINKS))} or a function")
    _check(value, f"ARM: link {getattr(value, '__name__', type(value).__name__)}")
    return OwnLink(value)


@torch.enable_grad()
def _check(function: Callable[[Tensor], Tensor], where: str) -> None:
    grid = torch.linspace(-_REACH, _REACH, _STEPS, dtype=torch.float64, requires_grad=True)
    returned: object = function(grid)
    if not isinstance(returned, Tensor) or returned.shape != grid.shape or returned.dtype != grid.dtype:
        raise GateError(f"{where} does not map a float64 tensor to one of the same shape and type")
    if returned.grad_fn is None:
        raise GateError(f"{where} is not differentiable by autograd; write it with torch operators")
    t, values = grid.detach(), returned.detach()
    if not bool(((values >= 0) & (values <= 1)).all()):  # so is what is not a number
        raise GateError(f"{where} leaves [0, 1]: from {values.min().item():.6g} to {values.max().item():.6g}")
    total = values + values.flip(0)
    worst = int((total - 1.0).abs().argmax())
    if abs(total[worst].item() - 1.0) > _TOLERANCE:
        at = t[worst].item()
        raise GateError(
            f"{where} is not antisymmetric: g({at:.4g}) + g({-at:.4g}) = {total[worst].item():.6g}, expected 1;"
            " the second draw is wrong without g(-t) = 1 - g(t)"
        )
    if bool((values.diff() < -_ROUNDING).any()):
        raise GateError(f"{where} decreases at t = {t[int(values.diff().argmin())].item():.4g}; expected to increase")
    part = slice(_STEPS // 3, _STEPS // 3 + 7)
    if not torch.allclose(function(t[part]), values[part]):
        raise GateError(f"{where} does not act element by element: a part of its input gives other values")
