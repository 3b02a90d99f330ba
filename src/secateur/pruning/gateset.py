"""The one module that holds every gate of a model, and the norms of weights that some methods look at.

Index conventions: ``U`` units of all gates of the model in a row, rule by rule; the *extended* vector ``(U + 1,)``
ends in a constant 1, which every position without a gate reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from secateur.gates.gate import Gate
from secateur.gates.layout import Layout
from secateur.pruning.index import Index
from secateur.structure.groups import FLAT, Group

__all__ = ["GateSet", "Norms", "extended"]


def extended(values: Tensor) -> Tensor:
    """``(..., U)`` with a 1 behind: what a position without a gate is multiplied by."""
    return torch.cat([values, values.new_ones(*values.shape[:-1], 1)], -1)


class Norms(nn.Module):
    r"""Norms of the weights that the gates of one rule multiply.

    .. math:: \|v_i\| = \Big(\sum_{\text{consumer slices of unit } i} v^2\Big)^{1/2}

    The slices are those a closed gate zeroes, so that ``v z(|v|)`` shrinks just what the norm measured. Carriers
    (a producer's rows, biases, affine parameters) do not count. A unit whose slices cross (a square recurrent weight)
    counts the crossing twice. The gradient at a norm of 0 is 0.

    Args:
        groups: of one rule, in the order of its layout.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        super().__init__()
        self.layout = Layout(tuple(group.size for group in groups))
        self._owners: tuple[ParametrizationList, ...] = ()
        entries = [
            (member.tensor, member.dim, member.index, start)
            for group, start in zip(groups, self.layout.offsets, strict=True)
            for member in group.gated
        ]
        self.tensors: tuple[str, ...] = tuple(tensor for tensor, *_ in entries)
        self.dims: tuple[int, ...] = tuple(dim for _, dim, *_ in entries)
        #: of each tensor the positions along its dimension, and the unit of each
        self._indices = tuple(
            (Index(index.reshape(-1).copy()), Index(np.repeat(np.arange(start, start + len(index)), index.shape[1])))
            for *_, index, start in entries
        )

    def bind(self, owners: Sequence[ParametrizationList]) -> None:
        """Say where the weights of ``tensors`` live from now on; referred to, not registered."""
        self._owners = tuple(owners)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The ungated weights, one for each of ``tensors``."""
        return tuple(owner.original for owner in self._owners)

    def forward(self, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Norms ``(U,)`` of the given weights, in the given precision."""
        total = torch.zeros(self.layout.total, dtype=dtype, device=weights[0].device)
        for weight, dim, (positions, units) in zip(weights, self.dims, self._indices, strict=True):
            others = [other for other in range(weight.dim()) if other != dim]
            squares = weight.to(dtype).square()
            if dim == FLAT:
                squares = squares.reshape(-1)
            elif others:
                squares = squares.sum(others)
            squares = squares.index_select(0, positions.on(squares.device))
            total = total.index_add(0, units.on(total.device), squares.to(total.device))
        positive = total > 0
        return torch.where(positive, torch.where(positive, total, 1.0).sqrt(), 0.0)


class GateSet(nn.Module):
    """All gates of one model, registered once in its tree, under one name.

    Called as a module it gives back its input, so that an `nn.Sequential` that holds it stays what it was.

    Args:
        gates: one for each rule.
        norms: for each rule the norms that its method looks at, or None.
        seed: of the draws that a copy of the model makes; the model's own come from its pruner.
        per_example: numbers of the rules of which each example has a draw of its own.
    """

    pinned: Tensor | None
    left: Tensor | None

    def __init__(
        self,
        gates: Sequence[Gate],
        norms: Sequence[Norms | None],
        seed: int = 0,
        per_example: Collection[int] = (),
    ) -> None:
        super().__init__()
        # Absent until the gates are pinned, and then what evaluation uses instead of asking the methods.
        self.register_buffer("pinned", None)
        # Absent until units are gone for good, and then 0 for these and 1 for all others; no bool, for averages of
        # models average their buffers.
        self.register_buffer("left", None)
        self.rules = nn.ModuleList(gates)
        self.norms = nn.ModuleDict({str(rule): norm for rule, norm in enumerate(norms) if norm is not None})
        self.seed = seed
        self.per_example = frozenset(per_example)
        # Loading by assignment puts new parameters in.
        self.register_load_state_dict_post_hook(_tag)  # type: ignore[no-untyped-call]
        _tag(self)

    def forward(self, *args: Any) -> Any:
        """What was passed in."""
        return args[0] if len(args) == 1 else args

    def __iter__(self) -> Iterator[tuple[Gate, Norms | None]]:
        """Each rule's gate and its norms."""
        # Asked several times in every step: past the look-up of submodules by name, and past generators.
        own: Any = self._modules
        norms = own["norms"]._modules
        return iter([(gate, norms.get(rule)) for rule, gate in own["rules"]._modules.items()])

    @property
    def total(self) -> int:
        """Units of all gates, ``U``."""
        return sum(gate.layout.total for gate, _ in self)

    @property
    def device(self) -> torch.device:
        """Where draws are made: the device of the first gate."""
        return next(iter(self))[0].layout.segment.device

    @property
    def estimators(self) -> frozenset[str]:
        """The estimators that the gates' methods need."""
        return frozenset(gate.method.estimator for gate, _ in self)

    @property
    def trained(self) -> tuple[nn.Parameter, ...]:
        """The gates' parameters that take a gradient."""
        return tuple(parameter for parameter in self.parameters() if parameter.requires_grad)

    def prob_open(self) -> Tensor:
        """Open chance of every unit ``(U,)``, differentiable."""
        return self._of_left(self._joined("prob_open"))

    def fixed(self) -> Tensor:
        """Evaluation gates ``(U,)``, without gradient: in evaluation gates are constants."""
        if self.pinned is not None:
            return self.pinned
        with torch.no_grad():
            return self._of_left(self._joined("fixed"))

    def close_for_good(self, gone: Tensor) -> None:
        """Count these units, bool ``(U,)``, as closed from now on: no weight reads their gates any more."""
        self.pinned = None
        self.left = (~gone).to(self.device, torch.float32)

    def score(self) -> Tensor:
        """Order in which a projection closes units ``(U,)``: larger stays longer; comparable within a rule."""
        with torch.no_grad():
            return self._joined("score")

    def fixed_with(self, keep: Tensor) -> Tensor:
        """What `fixed` would be with exactly these gates open, bool ``(U,)``."""
        start = 0
        try:
            for gate, _ in self:
                stop = start + gate.layout.total
                gate.force(keep[start:stop])
                start = stop
            with torch.no_grad():
                return self._of_left(self._joined("fixed"))
        finally:
            for gate, _ in self:
                gate.force(None)

    def constrain_(self) -> None:
        """Bring all gates' tensors back into their range, in place."""
        for gate, _ in self:
            gate.constrain_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _tag(self)  # copies of parameters come without their attributes

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        _tag(self)  # from and to the meta device, parameters are new ones
        return self

    def _of_left(self, values: Tensor) -> Tensor:
        return values if self.left is None else values * self.left.to(values.dtype)

    def _joined(self, question: str) -> Tensor:
        parts = []
        for gate, norms in self:
            dtype = gate.dtype or torch.float32
            parts.append(getattr(gate, question)(None if norms is None else norms(norms.weights, dtype)))
        return parts[0] if len(parts) == 1 else torch.cat([part.to(self.device) for part in parts])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Pinned gates are pinned no longer by a checkpoint of gates that were not.
        for name in ("pinned", "left"):
            saved = state_dict.get(prefix + name)
            setattr(self, name, None if saved is None else torch.empty_like(saved, device=self.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _tag(gates: nn.Module, *_: object) -> None:
    """Mark the parameters of gates, for what sorts parameters by kind."""
    for parameter in gates.parameters():
        parameter.secateur_gate = True  # type: ignore[attr-defined]
