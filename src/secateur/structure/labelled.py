"""Which label each tensor of a run has; tensors are held weakly."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Container

import torch

from secateur.structure.ids import Label

__all__ = ["Labelled"]

_Weak = weakref.ref[torch.Tensor]


class Labelled:
    """Labels of tensors, by identity.

    A tensor may die, and another take its address: each label is kept with a weak reference that tells.
    """

    def __init__(self) -> None:
        self._labels: dict[int, tuple[_Weak, Label]] = {}
        self._on_storage: dict[int, dict[int, _Weak]] = {}

    def get(self, tensor: torch.Tensor) -> Label | None:
        """The label of a tensor; None of one never seen."""
        known = self._labels.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def __setitem__(self, tensor: torch.Tensor, label: Label) -> None:
        weak = weakref.ref(tensor)
        self._labels[id(tensor)] = (weak, label)
        if tensor.layout == torch.strided:
            self._on_storage.setdefault(tensor.untyped_storage()._cdata, {})[id(tensor)] = weak

    def sharing(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The other labelled tensors that look at the same storage."""
        if tensor.layout != torch.strided:
            return []
        storage = tensor.untyped_storage()._cdata
        others = [weak() for weak in self._on_storage.get(storage, {}).values()]
        # One that has been given another storage meanwhile looks here no more.
        return [
            other
            for other in others
            if other is not None and other is not tensor and other.untyped_storage()._cdata == storage
        ]

    def left(self) -> list[torch.Tensor]:
        """All labelled tensors that still exist."""
        return [tensor for tensor in (weak() for weak, _ in self._labels.values()) if tensor is not None]

    def alive(self, besides: Container[int]) -> list[Label]:
        """Labels with units of all tensors that still exist, besides those of the given identities."""

        def left() -> list[Label]:
            return [
                label
                for address, (weak, label) in self._labels.items()
                if label.factors and address not in besides and weak() is not None
            ]

        if left():
            # Only reference cycles hold most of them; collecting is slow, so not without need.
            gc.collect()
        return left()
