"""Random variables that gates are drawn from: normal, logistic, correlated, or a user's own.

Index conventions: ``U`` units of all groups together; leading dimensions ``...`` are draws.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from secateur.errors import GateError
from secateur.gates.layout import Layout
from secateur.gates.settings import CUSTOM, Checks, described

__all__ = ["NOISES", "Correlated", "Logistic", "Noise", "Normal", "jitter", "noise_from", "normal", "uniform"]

#: Uniform noise is kept this far from 0 and 1 where its logit is taken (Louizos et al., authors' code).
EPSILON = 1e-6
#: Halvings of a bracket of 2000 that reach the spacing of float64.
_HALVINGS = 70
#: Numbers of one draw from which on another generator, seeded by torch's, makes them.
MANY = 16384


def uniform(
    layout: Layout,
    generator: torch.Generator | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    draws: tuple[int, ...] = (),
) -> Tensor:
    """``u ~ U[0, 1)`` of shape ``(*draws, U)``, in at least float32, drawn on the generator's own device."""
    source = torch.device(generator.device if generator is not None else device)
    wide = torch.promote_types(dtype, torch.float32)  # half precision has too few values under 1
    shape = (*draws, layout.total)
    if source.type != "cpu" or math.prod(shape) < MANY:
        return torch.rand(shape, generator=generator, dtype=wide, device=source).to(device)
    # The seed is torch's, so runs repeat and resume by its state; the stream is of a generator that is twice as fast.
    seed = torch.empty((), dtype=torch.int64).random_(generator=generator).item()
    bits = np.random.SFC64(int(seed))
    if wide == torch.float64:
        return torch.from_numpy(np.random.Generator(bits).random(shape)).to(device)
    # What the generator gives in single precision, two numbers of 24 bits from each of its words, in half the time.
    count = math.prod(shape)
    words = bits.random_raw((count + 1) // 2).view(np.uint32)[:count]
    words >>= 8
    return torch.from_numpy(words.view(np.int32)).to(device, torch.float32).mul_(2.0**-24).view(shape)


def logit_(u: Tensor) -> Tensor:
    """The logit of u clipped to [1e-6, 1 - 1e-6], in place where it can be."""
    if u.device.type != "cpu" or u.numel() < MANY:
        return u.logit_(EPSILON)
    array = u.numpy()  # its logarithm is four times as fast
    np.clip(array, EPSILON, 1.0 - EPSILON, out=array)
    odds = np.subtract(1.0, array)
    np.divide(array, odds, out=array)
    np.log(array, out=array)
    return u


def normal(
    layout: Layout,
    generator: torch.Generator | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    draws: tuple[int, ...] = (),
) -> Tensor:
    """Standard normal noise of shape ``(*draws, U)``, in at least float32, drawn on the generator's own device."""
    source = generator.device if generator is not None else device
    wide = torch.promote_types(dtype, torch.float32)
    return torch.randn(*draws, layout.total, generator=generator, dtype=wide, device=source).to(device)


def jitter(layout: Layout, generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
    """Standard normal ``(U,)`` on the generator's device (the CPU without one): what keeps equal units from ties."""
    device = generator.device if generator is not None else "cpu"
    return normal(layout, generator, dtype=dtype, device=device).to(dtype)


class Noise(ABC):
    """A zero-median random vector over the units; units may depend on each other but share one marginal.

    A distribution of your own is a frozen dataclass with the two abstract methods.

    Example:
        >>> class Laplace(Noise):
        ...     def draw(self, layout, generator, *, dtype, device, draws):
        ...         centred = uniform(layout, generator, dtype=dtype, device=device, draws=draws) - 0.5
        ...         return -centred.sign() * torch.log1p(-2 * centred.abs())
        ...     def prob_above(self, threshold):
        ...         tail = 0.5 * torch.exp(-threshold.abs())
        ...         return torch.where(threshold > 0, tail, 1 - tail)
        >>> round(Laplace().upper_quantile(torch.tensor(0.25)).item(), 4)  # ln 2
        0.6931
    """

    @abstractmethod
    def draw(
        self,
        layout: Layout,
        generator: torch.Generator | None,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        draws: tuple[int, ...],
    ) -> Tensor:
        """Noise of shape ``(*draws, U)``; all its randomness comes from ``generator``."""

    @abstractmethod
    def prob_above(self, threshold: Tensor) -> Tensor:
        """``P(eps > threshold)`` of one unit, element by element and differentiable."""

    def upper_quantile(self, probability: Tensor) -> Tensor:
        """The threshold that ``eps`` exceeds with the given probability in (0, 1), by halving."""
        wanted = probability.detach().double()
        low, high = torch.full_like(wanted, -1e3), torch.full_like(wanted, 1e3)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            too_low = self.prob_above(middle) > wanted
            low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
        return ((low + high) / 2).to(probability.dtype)


@dataclass(frozen=True)
class Normal(Noise):
    """Independent standard normal noise: ``P(eps > t) = erfc(t / sqrt 2) / 2``."""

    def draw(
        self,
        layout: Layout,
        generator: torch.Generator | None,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        draws: tuple[int, ...],
    ) -> Tensor:
        """Standard normal, ``(*draws, U)``."""
        return normal(layout, generator, dtype=dtype, device=device, draws=draws)

    def prob_above(self, threshold: Tensor) -> Tensor:
        """``erfc(t / sqrt 2) / 2``."""
        return 0.5 * torch.erfc(threshold / math.sqrt(2.0))

    def settings(self) -> dict[str, Any]:
        """What a recipe records."""
        return {"kind": "normal"}


@dataclass(frozen=True)
class Logistic(Noise):
    """Independent standard logistic noise, ``eps = logit(u)``: ``P(eps > t) = sigma(-t)``."""

    def draw(
        self,
        layout: Layout,
        generator: torch.Generator | None,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        draws: tuple[int, ...],
    ) -> Tensor:
        """``logit(u)`` with u clipped to [1e-6, 1 - 1e-6], ``(*draws, U)``."""
        return logit_(uniform(layout, generator, dtype=dtype, device=device, draws=draws))

    def prob_above(self, threshold: Tensor) -> Tensor:
        """``sigma(-t)``."""
        return torch.sigmoid(-threshold)

    def settings(self) -> dict[str, Any]:
        """What a recipe records."""
        return {"kind": "logistic"}


@dataclass(frozen=True)
class Correlated(Noise):
    """Noise that the units of a group share in part: a Gaussian copula with equal correlations.

    ``v = sqrt(rho) c_group + sqrt(1 - rho) e`` with independent standard normal c (one per group) and e (one per
    unit); ``eps = v`` or, for the logistic marginal, ``eps = logit(Phi(v))``.

    Args:
        rho: correlation of the ``v`` of two units of one group, in (0, 1).
        marginal: what one unit alone looks like, ``"normal"`` or ``"logistic"``.

    Raises:
        GateError: a setting is outside its range.

    Example:
        >>> Correlated(rho=0.3).settings()
        {'kind': 'correlated', 'rho': 0.3, 'marginal': 'normal'}
    """

    rho: float = 0.5
    marginal: Literal["normal", "logistic"] = "normal"

    def __post_init__(self) -> None:
        checks = Checks("Correlated")
        checks.between("rho", self.rho, 0.0, 1.0, advice="for independent units use Normal() or Logistic()")
        checks.one_of("marginal", self.marginal, ("normal", "logistic"))
        checks.done()

    def draw(
        self,
        layout: Layout,
        generator: torch.Generator | None,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        draws: tuple[int, ...],
    ) -> Tensor:
        """The copula's draw, ``(*draws, U)``."""
        groups = Layout((layout.n_groups,), device)
        shared = layout.spread(normal(groups, generator, dtype=dtype, device=device, draws=draws))
        own = normal(layout, generator, dtype=dtype, device=device, draws=draws)
        mixed = math.sqrt(self.rho) * shared + math.sqrt(1.0 - self.rho) * own
        if self.marginal == "normal":
            return mixed
        # The logit of Phi(v) as a difference of logarithms: exact in both tails.
        logistic: Tensor = torch.special.log_ndtr(mixed) - torch.special.log_ndtr(-mixed)
        return logistic

    def prob_above(self, threshold: Tensor) -> Tensor:
        """That of the marginal."""
        return (Normal() if self.marginal == "normal" else Logistic()).prob_above(threshold)

    def settings(self) -> dict[str, Any]:
        """What a recipe records."""
        return {"kind": "correlated", **described(self)}


#: Noise by the name that settings use.
NOISES: Mapping[str, type[Noise]] = {"normal": Normal, "logistic": Logistic, "correlated": Correlated}


def noise_from(value: Noise | str | Mapping[str, Any]) -> Noise:
    """A noise object from itself, its name, or the settings that it was recorded with.

    Args:
        value: a `Noise`, a key of ``NOISES``, or ``{"kind": key, **settings}``.

    Raises:
        GateError: the name is unknown, or it names a user's own class, which a record cannot hold.

    Example:
        >>> noise_from("normal") == noise_from(Normal().settings())
        True
    """
    if isinstance(value, Noise):
        return value
    options = dict(value) if isinstance(value, Mapping) else {"kind": value}
    kind = options.pop("kind", None)
    if isinstance(kind, str) and kind in NOISES:
        try:
            return NOISES[kind](**options)
        except TypeError as error:
            raise GateError(f"noise {kind!r}: {error}") from error
    if isinstance(kind, str) and kind.startswith(CUSTOM):
        raise GateError(f"noise {kind!r} was a user's own class and cannot be read back; pass the object itself")
    raise GateError(f"noise is {value!r}, expected a Noise or one of {', '.join(map(repr, NOISES))}")
