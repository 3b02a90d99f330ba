"""Differentiable Sparsification, a reading: gates that a trainable threshold sets to exactly zero, without noise.

Index conventions: ``G`` groups, ``U`` units of all groups together, ``n`` units of one group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.gates.gate import Estimator, Method, Params
from secateur.gates.layout import Layout
from secateur.gates.noise import jitter
from secateur.gates.settings import Checks

__all__ = ["DifferentiableSparsification"]

#: The threshold stays this fraction under the largest share, so that a group never closes whole and the
#: normalisation never divides by less than this.
HEADROOM = 0.1
#: Under this gate the slope of z^p, infinite at 0, is held at its value here.
STEEPEST = 1e-2
#: Bound on beta in the independent form: thresholds between 1e-4 and 1 - 1e-4.
BETA_BOUND = 9.2
#: Least divisor of a norm.
SMALLEST = 1e-6


@dataclass(frozen=True)
class DifferentiableSparsification(Method):
    """Deterministic gates with exact zeros under plain SGD: a reading from recollection, not the papers' text.

    Competitive form, for a group of n units with free ``alpha`` (one per unit) and one threshold ``beta``:

    - ``q = softmax(alpha)``, ``a_i = relu(q_i - sigma(beta)) / sum_j relu(q_j - sigma(beta))``, gate ``z_i = n a_i``.
      The gates of a group sum to n, so survivors grow as others close, up to n for a last one, and the effective steps
      of their weights with them. A group of one unit cannot close.
    - Renormalised, the same with ``z_i = a_i / sum_j a_j^2``: k equal survivors have gates of 1 whatever k is. The
      mean gate, weighted by the shares, is 1.
    - Surrogate of L0: the p-norm of a with p < 1. With p = 1/2 it is ``(sum sqrt a_i)^2``: n for a uniform vector,
      1 for a one-hot one; `prob_open` is each unit's part, ``a_i^p (sum_j a_j^p)^(p / (1 - p))``. **Parts can exceed
      1; only their sums over a group are counts.** For other p the sum is the p-norm's power that still counts from
      1 to n; `p_norm` is the norm itself.

    Independent form, no competition, from the norm of the weights v that a unit removes and one ``beta`` per group:
    ``w = v relu(||v|| - sigma(beta)) / ||v||``, so the gate is ``relu(||v|| - sigma(beta)) / ||v||``, for a single
    weight ``relu(|v| - sigma(beta)) / |v|``; surrogate of L0: ``z^p``, in [0, 1). Norms carry gradients to the
    weights if the caller leaves them on. sigma(beta) < 1: norms over 1 close only after they have shrunk.

    Backward, in both forms: in the gates the relu's derivative is elu's, ``exp`` of the (negative) margin, so that
    closed units return when the loss asks; in the surrogate of L0 it is the exact one, so that the penalty leaves
    closed units alone. In the competitive form margins are measured in uniform shares 1/n. The infinite slope of
    ``a^p`` at 0 is held from z = 0.01 down.

    The scale of gate times weight is free, so that a unit whose weights have gone to 0 can keep a large share of the
    competitive form: give the weights (not the gates) some weight decay.

    Guards: the threshold counts at most as 90% of the largest share of its group, so that the largest unit always
    stays and nothing is divided by 0; beta is brought back there after each step. The start is jittered, for the
    penalty's gradient is exactly 0 at uniform alpha.

    Args:
        form: ``"competitive"`` (default) or ``"independent"``.
        init_open: in (0, 1), how far units start over the threshold: ``sigma(beta) = (1 - init_open) / n``, or, in
            the independent form, the first gate of a unit whose norm is its group's mean norm (1 where the norms
            are not known at the start): ``sigma(beta) = (1 - init_open) ||v||``.
        p: exponent of the surrogate, in (0, 1).
        jitter: deviation of alpha at the start, > 0.
        renormalised: whether survivors of the competitive form keep their scale as others close.

    Raises:
        GateError: a setting is outside its range, or norms are missing where the form needs them.

    Example:
        >>> from secateur.gates import Layout
        >>> method, layout = DifferentiableSparsification(), Layout((4,))
        >>> params = {"alpha": torch.tensor([2.0, 2.0, 0.0, 0.0]), "beta": torch.tensor([-2.0])}
        >>> method.fixed(params, layout).tolist(), round(method.prob_open(params, layout).sum().item(), 3)
        ([2.0, 2.0, 0.0, 0.0], 2.0)

    Reference:
        Lee, Differentiable Sparsification for Deep Neural Networks, 2019 (arXiv 1910.03201); independent form: Lee,
        Embedding Differentiable Sparsity into Deep Neural Network, 2020 (arXiv 2006.13716). Only the abstracts were
        at hand.
    """

    form: Literal["competitive", "independent"] = "competitive"
    init_open: float = 0.9
    p: float = 0.5
    jitter: float = 0.01
    renormalised: bool = False

    def __post_init__(self) -> None:
        checks = Checks("DifferentiableSparsification")
        checks.one_of("form", self.form, ("competitive", "independent"))
        checks.between("init_open", self.init_open, 0.0, 1.0)
        checks.between("p", self.p, 0.0, 1.0, advice="from p = 1 on the p-norm does not favour zeros")
        checks.between("jitter", self.jitter, 0.0, None, advice="without it the penalty's gradient starts at exactly 0")
        checks.one_of("renormalised", self.renormalised, (True, False))
        checks.holds(
            not (self.renormalised is True and self.form == "independent"),
            "renormalised is for the competitive form; independent gates do not grow",
        )
        checks.done()

    @property
    def name(self) -> str:
        """``"diff-sparse"``."""
        return "diff-sparse"

    @property
    def estimator(self) -> Estimator:
        """Pathwise: gates carry the gradient."""
        return "pathwise"

    @property
    def binary(self) -> bool:
        """False."""
        return False

    @property
    def uses_norms(self) -> bool:
        """Only the independent form looks at weights."""
        return self.form == "independent"

    @property
    def calibrated(self) -> bool:
        """False: there is no chance, only a surrogate count."""
        return False

    @property
    def keeps_one(self) -> bool:
        """In the competitive form."""
        return self.form == "competitive"

    @property
    def hears_closed(self) -> bool:
        """True: closed units have elu's derivative."""
        return True

    def init(
        self,
        layout: Layout,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        norms: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``alpha ~ N(0, jitter^2)`` (competitive) and the beta that ``init_open`` means."""
        device = generator.device if generator is not None else torch.device("cpu")
        counts = layout.counts.to(device, torch.float64)
        if self.form == "competitive":
            threshold = (1.0 - self.init_open) / counts
            alpha = self.jitter * jitter(layout.to(device), generator, dtype)
            return {"alpha": alpha, "beta": torch.logit(threshold).to(dtype)}
        typical = torch.ones_like(counts)
        if norms is not None:
            typical = layout.to(device).sum(self._required(norms, layout).detach().to(device, torch.float64)) / counts
        threshold = (1.0 - self.init_open) * typical
        return {"beta": torch.logit(threshold, eps=1e-6).clamp(-BETA_BOUND, BETA_BOUND).to(dtype)}

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
        """The gates, with elu's derivative at closed units."""
        return self._scaled(self._gates(params, layout, norms), layout)

    def drawn(self, params: Params, layout: Layout, noise: Tensor | None, norms: Tensor | None = None) -> None:
        """None: the gates of a group, or weights, depend on each other."""
        return

    def prob_open(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """Each unit's part of the surrogate count; in the competitive form it can exceed 1."""
        powers = _power(self._gates(params, layout, norms), self.p)
        if self.form == "independent":
            return powers
        mean = layout.sum(powers) / layout.counts
        return powers * layout.spread(mean ** (self.p / (1.0 - self.p)))

    def p_norm(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """The regulariser to the letter, ``(sum_i a_i^p)^(1/p)`` of each group with ``a = z / n``: ``(G,)``."""
        powers = _power(self._gates(params, layout, norms), self.p)
        return layout.sum(powers) ** (1.0 / self.p) / layout.counts

    def fixed(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """The gates."""
        return self.sample(params, layout, None, norms)

    def opened(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """The smallest open gate of the group, next to which it would have opened, or 1."""
        if self.form == "independent":
            return torch.ones_like(self._required(norms, layout))
        gates = self.fixed(params, layout, norms).detach()
        return -layout.spread(layout.amax(-torch.where(gates > 0, gates, torch.inf)))

    def score(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """Positive where open: ``log(1 + z)``, or, in the independent form, the logarithm of norm over threshold.

        Closed units of the competitive form have the logarithm of share over threshold. Open ones are not measured
        against their threshold, which groups without competition lower without end, and so would never be chosen.
        """
        if self.form == "independent":
            norms = self._required(norms, layout)
            return norms.clamp(min=SMALLEST).log() - layout.spread(F.logsigmoid(params["beta"]))
        alpha = params["alpha"]
        relative = alpha - layout.spread(layout.amax(alpha))  # the logarithm of the share itself would underflow
        _, threshold = self._shares(params, layout)
        cut = threshold * layout.sum(relative.exp()) / layout.counts
        under = relative - layout.spread(cut.clamp(min=torch.finfo(alpha.dtype).tiny).log())
        gates = self.fixed(params, layout, norms)
        return torch.where(gates > 0, gates.log1p(), under.clamp(max=0.0))

    def constrain_(self, params: Params, layout: Layout) -> None:
        """Bring beta to where the largest unit of its group stays open."""
        beta = params["beta"]
        if self.form == "independent":
            beta.clamp_(-BETA_BOUND, BETA_BOUND)
            return
        alpha = params["alpha"]
        largest = 1.0 / layout.sum((alpha - layout.spread(layout.amax(alpha))).exp())
        beta.copy_(torch.minimum(beta, torch.logit((1.0 - HEADROOM) * largest)))

    def _gates(self, params: Params, layout: Layout, norms: Tensor | None) -> Tensor:
        if self.form == "independent":
            norms = self._required(norms, layout)
            threshold = layout.spread(torch.sigmoid(params["beta"]))
            # Where open, the larger one is the norm; where closed, the threshold keeps the slope finite.
            return _rectified(norms - threshold) / torch.maximum(norms, threshold).clamp(min=SMALLEST)
        shares, threshold = self._shares(params, layout)
        over = _rectified(shares - layout.spread(threshold))
        return over * layout.spread(layout.counts / layout.sum(over))

    def _scaled(self, gates: Tensor, layout: Layout) -> Tensor:
        """Gates that sum to n, or those that do not grow."""
        if not self.renormalised:
            return gates
        return gates * layout.spread(layout.counts / layout.sum(gates.square()))

    def _shares(self, params: Params, layout: Layout) -> tuple[Tensor, Tensor]:
        """Softmax ``(U,)`` and thresholds ``(G,)``, both in units of the uniform share 1/n."""
        alpha = params["alpha"]
        powers = (alpha - layout.spread(layout.amax(alpha))).exp()
        largest = layout.counts / layout.sum(powers)
        threshold = layout.counts * torch.sigmoid(params["beta"])
        return powers * layout.spread(largest), torch.minimum(threshold, (1.0 - HEADROOM) * largest.detach())


def _rectified(margin: Tensor) -> Tensor:
    """The relu with elu's derivative: 1 above zero, ``exp(margin)`` below."""
    smooth = F.elu(margin)
    return F.relu(margin.detach()) + (smooth - smooth.detach())


def _power(gates: Tensor, p: float) -> Tensor:
    """``z^p`` over the support, with no slope above that at ``STEEPEST``; closed units are only ever asked to open."""
    powers: Tensor = _Power.apply(gates, p)  # type: ignore[no-untyped-call]
    return powers


class _Power(torch.autograd.Function):
    """The power's slope at 0 is infinite and would hold every closed unit down, so a penalty stops at the support.

    A gradient that asks for more open units does reach closed ones: without it no budget could open them again.
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(gates)
        ctx.p = p
        return torch.where(gates > 0, gates**p, 0.0)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        (gates,) = ctx.saved_tensors
        slope = ctx.p * gates.clamp(min=STEEPEST) ** (ctx.p - 1.0)
        return slope * torch.where(gates > 0, outer[0], outer[0].clamp(max=0.0)), None
