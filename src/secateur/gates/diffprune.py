"""DiffPrune, a reading: any random vector becomes approximately binary gates by one deterministic transformation.

Index conventions: ``U`` units of all groups together; leading dimensions ``...`` are draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.errors import GateError
from secateur.gates.gate import Estimator, Method, Params, Pull
from secateur.gates.layout import Layout
from secateur.gates.noise import Noise, jitter, noise_from
from secateur.gates.settings import Checks
from secateur.gates.stretch import check_stretch, closing_logit, pulled, stretched

__all__ = ["DiffPrune"]

#: Deviation of x at the start, in units of x.
JITTER = 0.01


@dataclass(frozen=True)
class DiffPrune(Method):
    """Approximately binary gates from ``X``, one ``x`` per unit: a reading of the abstract, not the paper's formula.

    With ``c = log(-zeta / gamma)`` (ln 11 by default) and ``X = x`` (deterministic) or ``X = x + scale eps``
    (stochastic, eps from any distribution, correlated ones included):

    - gate ``z = clip((zeta - gamma) sigma(X / tau) + gamma, 0, 1)``: exactly 0 for ``X <= -c tau``, exactly 1 for
      ``X >= tau log((1 - gamma) / (zeta - 1))``; as tau falls, ``z`` tends to ``1[X > 0]`` whatever X's joint
      distribution: for a density of at most M, ``P(0 < z < 1) <= 4.796 tau M`` with the default ends;
    - surrogate of L0: stochastic ``P(eps > (-c tau - x) / scale)``, exact; deterministic
      ``sigma((x + c tau) / surrogate_tau)``, which is 1/2 where the gate closes and still pushes gates that stand at 1.

    Evaluation drops the noise. tau is constant: a schedule is no part of the method. Standard logistic noise with
    scale 1 and tau = 2/3 is hard concrete with ``log_alpha = x``; tau to 0 then gives L0-ARM's gates with
    ``k phi = x``.

    How a closed gate returns: under noise, the draws that open it carry its gradient. In the deterministic mode a
    clipped gate would hear nothing from the task for ever, so by default (``backward="smooth"``) it is given the
    gradient of ``(zeta - gamma) sigma(x / surrogate_tau)``, which reaches far; the gate itself stays exactly 0 or 1.
    A gate at 1 is only told to fall: it cannot rise, and gates whose scale the loss would enlarge without end (those
    of the last layers) would otherwise stay open for that alone, at the expense of all the others.

    The deterministic mode is the default: it is what the title promises, training and evaluation see the same gates,
    and a step needs no randomness.

    Args:
        init_open: the surrogate of L0 at the start, in (0, 1): the true open chance in the stochastic mode. In the
            deterministic mode it sets ``x = surrogate_tau logit(init_open) - c tau`` and by it the first gate, which
            `start` states: exactly 1 with the defaults.
        mode: ``"deterministic"`` or ``"stochastic"``.
        distribution: of eps: a `Noise`, ``"normal"`` (default), ``"logistic"``, ``"correlated"``, or what its
            ``settings()`` gave; only used in the stochastic mode.
        scale: of the noise, in units of x, > 0.
        tau: temperature of the gate, in units of x, > 0; the gate is between 0 and 1 for about |X| < 2.4 tau.
        surrogate_tau: temperature of the deterministic surrogate, in units of x, > 0.
        gamma: lower end of the stretched interval, < 0.
        zeta: upper end of the stretched interval, > 1.
        backward: ``"smooth"`` or ``"exact"`` (no gradient where clipped); by default smooth in the deterministic
            mode and exact in the stochastic one.
        limits: values of the surrogate that x is held in after each step, two numbers in (0, 1).

    Raises:
        GateError: a setting is outside its range, or ``init_open`` is beyond ``limits``.

    Example:
        >>> from secateur.gates import Layout
        >>> method, layout = DiffPrune(tau=0.5), Layout((3,))
        >>> params = {"x": torch.tensor([-1.3, 0.0, 1.3])}
        >>> method.sample(params, layout, None).tolist()
        [0.0, 0.5, 1.0]
        >>> DiffPrune(mode="stochastic", distribution="correlated").settings()["distribution"]
        {'kind': 'correlated', 'rho': 0.5, 'marginal': 'normal'}

    Reference:
        Shulman, Neural Network Pruning with Deterministic Approximate Binary Gates and L0 Regularization, 2020
        (arXiv 2012.03653). Only the abstract was at hand.
    """

    init_open: float = 0.9
    mode: Literal["deterministic", "stochastic"] = "deterministic"
    distribution: Noise | str | Mapping[str, Any] = "normal"
    scale: float = 1.0
    tau: float = 0.25
    surrogate_tau: float = 1.0
    gamma: float = -0.1
    zeta: float = 1.1
    backward: Literal["smooth", "exact"] | None = None
    limits: tuple[float, float] = (0.01, 0.99)
    _bounds: tuple[float, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        checks = Checks("DiffPrune")
        checks.between("init_open", self.init_open, 0.0, 1.0)
        checks.one_of("mode", self.mode, ("deterministic", "stochastic"))
        for setting in ("scale", "tau", "surrogate_tau"):
            checks.between(setting, getattr(self, setting), 0.0, None)
        check_stretch(checks, self.gamma, self.zeta)
        checks.one_of("backward", self.backward, ("smooth", "exact", None))
        checks.pair("limits", self.limits, 0.0, 1.0)
        if not checks.problems:
            low, high = self.limits
            checks.holds(
                low <= self.init_open <= high,
                f"init_open is {self.init_open}, expected a chance in [{low}, {high}]; widen limits= or move it",
            )
        checks.done()
        object.__setattr__(self, "limits", tuple(self.limits))
        object.__setattr__(self, "distribution", noise_from(self.distribution))
        if self.backward is None:
            object.__setattr__(self, "backward", "smooth" if self.mode == "deterministic" else "exact")
        object.__setattr__(self, "_bounds", (self._x_of(self.limits[0]), self._x_of(self.limits[1])))

    @property
    def name(self) -> str:
        """``"diffprune"``."""
        return "diffprune"

    @property
    def estimator(self) -> Estimator:
        """Pathwise: draws carry the gradient."""
        return "pathwise"

    @property
    def binary(self) -> bool:
        """False: only nearly."""
        return False

    @property
    def uses_norms(self) -> bool:
        """False."""
        return False

    @property
    def calibrated(self) -> bool:
        """True under noise; the deterministic surrogate is no chance."""
        return self.mode == "stochastic"

    @property
    def closing(self) -> float:
        """``-c tau``: the X at which the gate becomes exactly 0."""
        return self.tau * closing_logit(self.gamma, self.zeta)

    @property
    def start(self) -> float:
        """The gate of evaluation at the start, without jitter, that ``init_open`` means."""
        return self._gate(torch.tensor(self._x_of(self.init_open), dtype=torch.float64)).item()

    @property
    def keeps_one(self) -> bool:
        """False."""
        return False

    @property
    def hears_closed(self) -> bool:
        """With the smooth backward."""
        return self.backward == "smooth"

    def init(
        self,
        layout: Layout,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        norms: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The x at which the surrogate is ``init_open``, plus N(0, 0.01^2)."""
        params = {"x": self._x_of(self.init_open) + JITTER * jitter(layout, generator, dtype)}
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
    ) -> Tensor | None:
        """The noise eps in the stochastic mode, None in the deterministic one."""
        if self.mode == "deterministic":
            return None
        noise = self._distribution.draw(layout, generator, dtype=dtype, device=device, draws=draws)
        if noise.shape != (*draws, layout.total):
            raise GateError(
                f"DiffPrune: {type(self.distribution).__name__}.draw gave shape {tuple(noise.shape)},"
                f" expected {(*draws, layout.total)}"
            )
        return noise

    def sample(self, params: Params, layout: Layout, noise: Tensor | None, norms: Tensor | None = None) -> Tensor:
        """The gate at ``x + scale eps``, or at x."""
        return self._gate(params["x"] if noise is None else params["x"] + self.scale * noise)

    def drawn(
        self, params: Params, layout: Layout, noise: Tensor | None, norms: Tensor | None = None
    ) -> tuple[Tensor, Pull]:
        """The gate; where it is clipped, and the backward pass smooth, its gradient is that of the wider sigmoid."""
        x = params["x"]
        at = x.clone() if noise is None else x + self.scale * noise
        gate = stretched(at / self.tau, self.gamma, self.zeta)

        def pull(outer: Tensor) -> dict[str, Tensor]:
            found = pulled(outer, gate, gate, self.tau, self.gamma, self.zeta)
            if self.backward == "smooth":
                found = torch.where((gate == 0) | (gate == 1), self._wide_slope(at).mul_(_below_1(outer, gate)), found)
            return {"x": found.sum_to_size(x.shape)}

        return gate, pull

    def prob_open(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """``P(x + scale eps > -c tau)``, or ``sigma((x + c tau) / surrogate_tau)``."""
        if self.mode == "stochastic":
            return self._distribution.prob_above((self.closing - params["x"]) / self.scale)
        return torch.sigmoid((params["x"] - self.closing) / self.surrogate_tau)

    def fixed(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """The gate at x: under noise, at the median of a symmetric distribution."""
        return self._gate(params["x"])

    def opened(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """At least the gate's value at x = 0, 1/2 by default."""
        return self.fixed(params, layout, norms).clamp(min=self._gate(torch.zeros(())).item())

    def score(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """Distance of x from where the gate closes, in units of the noise or of the surrogate."""
        return (params["x"] - self.closing) / (self.scale if self.mode == "stochastic" else self.surrogate_tau)

    def constrain_(self, params: Params, layout: Layout) -> None:
        """Bring x to where the surrogate is within ``limits``."""
        params["x"].clamp_(*self._bounds)

    @property
    def _distribution(self) -> Noise:
        assert isinstance(self.distribution, Noise)
        return self.distribution

    def _gate(self, x: Tensor) -> Tensor:
        gate = stretched(x / self.tau, self.gamma, self.zeta)
        if self.backward == "exact":
            return gate
        wide = torch.sigmoid(x / self.surrogate_tau) * (self.zeta - self.gamma)
        clipped = (gate == 0) | (gate == 1)
        # The bracket is exactly 0, so the gate's values stay exact.
        heard: Tensor = _Below1.apply(wide - wide.detach(), gate)  # type: ignore[no-untyped-call]
        return gate + heard * clipped

    def _wide_slope(self, x: Tensor) -> Tensor:
        """Derivative of the wider sigmoid."""
        wide = torch.sigmoid(x / self.surrogate_tau)
        return wide.mul_(1.0 - wide).mul_((self.zeta - self.gamma) / self.surrogate_tau)

    def _x_of(self, chance: float) -> float:
        """The x at which the surrogate is ``chance``."""
        if self.mode == "stochastic":
            above = self._distribution.upper_quantile(torch.tensor(chance, dtype=torch.float64)).item()
            return self.closing - self.scale * above
        return self.surrogate_tau * math.log(chance / (1.0 - chance)) + self.closing


class _Below1(torch.autograd.Function):
    """The same values; where the gate stands at 1 a gradient that would raise it is dropped."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(gate)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        (gate,) = ctx.saved_tensors
        return _below_1(outer[0], gate), None


def _below_1(outer: Tensor, gate: Tensor) -> Tensor:
    return torch.where(gate == 1, outer.clamp(min=0.0), outer)
