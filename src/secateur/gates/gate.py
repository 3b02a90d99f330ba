"""The contract of gate methods, and the module that owns a gate's parameters.

A method is a frozen value: settings and pure functions over a mapping of flat tensors. One `Gate` holds the
tensors of all groups of a rule, so that a draw is a handful of operators however many groups there are.

Index conventions: ``G`` groups, ``U`` units of all groups together; leading dimensions ``...`` are draws.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from secateur.errors import GateError
from secateur.gates.layout import Layout
from secateur.gates.settings import described

__all__ = ["Estimator", "Gate", "Layout", "Method", "Params", "Pull", "ScoreFunction"]

#: A method's tensors by name. Floating ones are trained; integer ones are state, such as a step counter.
Params = Mapping[str, Tensor]
#: How a task loss reaches the parameters: through the draw, or by a score-function term of two passes or one.
Estimator = Literal["pathwise", "arm", "ar"]
#: From the gradient of a draw ``(..., U)`` to those of the method's trained tensors; may be called any number of times.
Pull: TypeAlias = Callable[[Tensor], Mapping[str, Tensor]]
AnyMethod = TypeVar("AnyMethod", bound="Method")


class Method(ABC):
    """How gates are drawn while training and fixed in evaluation; subclasses are frozen dataclasses.

    Every function takes flat tensors over the units of all groups of a layout and is pure, `constrain_` excepted.
    A new method is one file that answers the questions below and one row of the table in its contract test.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Its name in ``METHODS``."""

    @property
    @abstractmethod
    def estimator(self) -> Estimator:
        """How gradients of the task reach the parameters."""

    @property
    @abstractmethod
    def binary(self) -> bool:
        """Whether draws are exactly 0 or 1."""

    @property
    @abstractmethod
    def uses_norms(self) -> bool:
        """Whether draws look at the norms of the weights that each unit removes."""

    @property
    @abstractmethod
    def calibrated(self) -> bool:
        """Whether `prob_open` is the chance that a draw opens the unit, and not a surrogate of it.

        Where it is not, a budget follows the cost of the fixed gates and takes only the gradient from here.
        """

    @property
    @abstractmethod
    def keeps_one(self) -> bool:
        """Whether a unit of each group always stays, so that one alone can never close."""

    @property
    @abstractmethod
    def hears_closed(self) -> bool:
        """Whether a gate that a draw puts at 0 gets a gradient through the draw.

        Where it does, its unit must be computed even while it is closed.
        """

    @abstractmethod
    def init(
        self,
        layout: Layout,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        norms: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Tensors at the start, by name, on the generator's device (the CPU without one).

        Args:
            layout: units of each group.
            generator: source of the jitter.
            dtype: of the trained tensors.
            norms: ``(U,)``, norms of the freshly initialised weights, for methods whose start depends on them.
        """

    @abstractmethod
    def noise(
        self,
        layout: Layout,
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        draws: tuple[int, ...] = (),
    ) -> Tensor | None:
        """All randomness of a draw as one tensor ``(*draws, U)`` without gradient, or None if there is none."""

    @abstractmethod
    def sample(self, params: Params, layout: Layout, noise: Tensor | None, norms: Tensor | None = None) -> Tensor:
        """One draw ``(..., U)``, closed units exactly 0.0; differentiable where the estimator is pathwise."""

    @abstractmethod
    def drawn(
        self, params: Params, layout: Layout, noise: Tensor | None, norms: Tensor | None = None
    ) -> tuple[Tensor, Pull] | None:
        """The same draw without a graph, and its gradient in closed form, in few passes over memory.

        None where only autograd says it. With an estimator that is not pathwise the gradient is never asked for.
        """

    @abstractmethod
    def prob_open(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """``P(z != 0)`` or the method's surrogate of it, ``(U,)``, differentiable."""

    @abstractmethod
    def fixed(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """Gates in evaluation, ``(U,)``: deterministic, exactly 0.0 where closed."""

    @abstractmethod
    def opened(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """What a unit that `fixed` closes is worth once a projection opens it: ``(U,)``, positive everywhere."""

    @abstractmethod
    def score(self, params: Params, layout: Layout, norms: Tensor | None = None) -> Tensor:
        """Order in which a projection closes units, ``(U,)``: larger stays longer. In each group every unit that
        `fixed` leaves open scores at least as much as any that it closes.
        """  # noqa: D205

    @abstractmethod
    def constrain_(self, params: Params, layout: Layout) -> None:
        """Bring the tensors back into their range, in place; called once after each optimizer step."""

    def settings(self) -> dict[str, Any]:
        """What a recipe records: values that JSON can hold, for ``method_from_name(name, **settings)``."""
        return described(self)  # type: ignore[arg-type]

    def with_init_open(self: AnyMethod, init_open: float) -> AnyMethod:
        """The same method with another open chance at the start.

        Raises:
            GateError: the method has no such setting, or the value is outside its range.
        """
        if "init_open" not in {item.name for item in fields(self)}:  # type: ignore[arg-type]
            raise GateError(
                f"{type(self).__name__} has no init_open: its units start as its own settings say; leave it out"
            )
        return replace(self, init_open=init_open)  # type: ignore[type-var]

    def _required(self, norms: Tensor | None, layout: Layout) -> Tensor:
        """``norms``, or an error where a method that looks at weights was given none."""
        if norms is None:
            raise GateError(
                f"{type(self).__name__} looks at weights, but norms is None; pass the norm of the weights that each"
                f" unit removes, shape ({layout.total},)"
            )
        if norms.shape != (layout.total,):
            raise GateError(
                f"{type(self).__name__}: norms has shape {tuple(norms.shape)}, expected ({layout.total},),"
                " one norm for each unit"
            )
        return norms


class ScoreFunction(Method):
    """A method whose draws carry no gradient; losses of draws do, through a surrogate term of the loss."""

    @property
    @abstractmethod
    def control_variate(self) -> bool:
        """Whether a running mean of earlier losses is to be subtracted: the ``baseline`` of `surrogate`."""

    @abstractmethod
    def antithetic(self, params: Params, layout: Layout, noise: Tensor | None) -> Tensor:
        """The second draw from the same noise, ``(..., U)``; equal to the first where a second pass is needless."""

    @abstractmethod
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
        """A scalar of value 0 whose gradient with respect to the parameters estimates that of the expected loss.

        Args:
            params: the method's tensors.
            layout: units of each group.
            noise: ``(*draws, U)``, what the draw was made from.
            loss: task loss under `sample`, one for each draw (``draws``) or one for each draw and unit
                (``(*draws, U)``, credit by group); its gradient is not used.
            antithetic_loss: the same under `antithetic`; needed where the estimator takes two passes.
            baseline: subtracted from the losses; any value that does not depend on this noise keeps the mean.

        Raises:
            GateError: the losses' shape fits neither reading, or the second loss is missing or superfluous.
        """


class Gate(nn.Module):
    """The gates of all groups of one rule: owns the flat tensors of a method and asks it the questions.

    Args:
        method: what draws and fixes the gates.
        layout: units of each group.
        generator: source of the jitter at the start.
        dtype: of the trained tensors; draws have it too.
        device: where they live.
        norms: ``(U,)``, norms of the freshly initialised weights, for methods whose start depends on them.

    Example:
        >>> from secateur.gates import Gate, HardConcrete, Layout
        >>> gate = Gate(HardConcrete(init_open=0.9), Layout((3, 2)), torch.Generator().manual_seed(0))
        >>> z = gate.sample(gate.draw_noise(torch.Generator().manual_seed(1)))
        >>> z.shape, round(gate.prob_open().mean().item(), 2)
        (torch.Size([5]), 0.9)
        >>> gate.force(torch.tensor([True, False, True, True, False]))
        >>> (gate.fixed() == 0).tolist()
        [False, True, False, False, True]
    """

    forced_open: Tensor | None
    forced_closed: Tensor | None

    def __init__(
        self,
        method: Method,
        layout: Layout,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        norms: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.method = method
        self._layout = layout
        tensors = method.init(layout, generator, dtype, norms)
        self._names = tuple(tensors)
        for name, tensor in tensors.items():
            value = tensor.to(device) if device is not None else tensor
            if value.is_floating_point():
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        # Absent until `force`: gates that were never forced cost nothing and save nothing.
        self.register_buffer("forced_open", None)
        self.register_buffer("forced_closed", None)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The method's tensors by name, as they are now."""
        own, state = self._parameters, self._buffers
        return {name: own[name] if name in own else state[name] for name in self._names}  # type: ignore[misc]

    @property
    def layout(self) -> Layout:
        """Units of each group, on the device of the tensors."""
        name = self._names[0]
        first = self._parameters.get(name)
        device = (self._buffers[name] if first is None else first).device  # type: ignore[union-attr]
        if self._layout.segment.device != device:
            self._layout = self._layout.to(device)
        return self._layout

    @property
    def dtype(self) -> torch.dtype | None:
        """Type of the trained tensors, None if there are none."""
        for name in self._names:
            value = self._parameters.get(name)
            if value is not None:
                return value.dtype
        return None

    def draw_noise(self, generator: torch.Generator | None = None, draws: tuple[int, ...] = ()) -> Tensor | None:
        """All randomness of one draw ``(*draws, U)``, or None if the method has none."""
        layout = self.layout
        dtype = self.dtype or torch.float32
        return self.method.noise(layout, generator, dtype=dtype, device=layout.segment.device, draws=draws)

    def sample(self, noise: Tensor | None, norms: Tensor | None = None) -> Tensor:
        """One draw ``(..., U)``; not affected by `force`."""
        return self._cast(self.method.sample(self.tensors, self.layout, noise, norms))

    def drawn(self, noise: Tensor | None) -> tuple[Tensor, Pull] | None:
        """`sample` without a graph, with its gradient in closed form; None where only autograd says it."""
        with torch.no_grad():
            return self.method.drawn(self.tensors, self.layout, noise)

    def prob_open(self, norms: Tensor | None = None) -> Tensor:
        """The open chance of each unit, ``(U,)``; not affected by `force`."""
        return self.method.prob_open(self.tensors, self.layout, norms)

    def fixed(self, norms: Tensor | None = None) -> Tensor:
        """Gates in evaluation ``(U,)``; obeys `force`."""
        tensors, layout = self.tensors, self.layout
        gates = self.method.fixed(tensors, layout, norms)
        if self.forced_open is not None and self.forced_closed is not None:
            opened = self.method.opened(tensors, layout, norms)
            gates = torch.where(self.forced_open & (gates == 0), opened, gates).masked_fill(self.forced_closed, 0.0)
        return self._cast(gates)

    def score(self, norms: Tensor | None = None) -> Tensor:
        """Order in which a projection closes units ``(U,)``: larger stays longer."""
        return self.method.score(self.tensors, self.layout, norms).detach()

    def antithetic(self, noise: Tensor | None) -> Tensor:
        """The second draw from the same noise, for score-function methods."""
        return self._cast(self._score_function().antithetic(self.tensors, self.layout, noise))

    def surrogate(
        self,
        noise: Tensor | None,
        loss: Tensor,
        antithetic_loss: Tensor | None = None,
        *,
        baseline: Tensor | float = 0.0,
    ) -> Tensor:
        """The loss term of value 0 that carries a score-function method's gradient."""
        method = self._score_function()
        return method.surrogate(self.tensors, self.layout, noise, loss, antithetic_loss, baseline=baseline)

    def constrain_(self) -> None:
        """Bring the tensors back into their range, in place; once after each optimizer step."""
        with torch.no_grad():
            self.method.constrain_(self.tensors, self.layout)

    def force(self, keep: Tensor | None, where: Tensor | None = None) -> None:
        """Pin the gates of evaluation open or closed, or release them all.

        Args:
            keep: bool ``(U,)``, True opens; None releases every unit.
            where: bool ``(U,)``, the units that are pinned; all by default.

        Raises:
            GateError: a tensor is not boolean or not of shape ``(U,)``.
        """
        if keep is None:
            self.forced_open = self.forced_closed = None
            return
        layout = self.layout
        for label, mask in (("keep", keep), ("where", where)):
            if mask is not None and (mask.dtype != torch.bool or mask.shape != (layout.total,)):
                raise GateError(
                    f"Gate.force: {label} is {mask.dtype} of shape {tuple(mask.shape)},"
                    f" expected torch.bool of shape ({layout.total},)"
                )
        keep = keep.to(layout.segment.device)
        pinned = torch.ones_like(keep) if where is None else where.to(keep.device)
        self.forced_open, self.forced_closed = keep & pinned, ~keep & pinned

    def extra_repr(self) -> str:
        """Method and sizes."""
        return f"{self.method}, groups={self._layout.n_groups}, units={self._layout.total}"

    def _cast(self, gates: Tensor) -> Tensor:
        dtype = self.dtype
        return gates if dtype is None else gates.to(dtype)

    def _score_function(self) -> ScoreFunction:
        if not isinstance(self.method, ScoreFunction):
            raise GateError(f"{type(self.method).__name__} is pathwise: its draws carry the gradient, no second draw")
        return self.method

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("forced_open", "forced_closed"):
            saved = state_dict.get(prefix + name)
            setattr(self, name, None if saved is None else torch.empty_like(saved, device=self.layout.segment.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
