"""Sites: where the ids of a model's parameters and buffers live.

A site is one dimension of one tensor; its ids are consecutive. Tied tensors are one tensor with
several names, and so one set of sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Factor, Label
from secateur.structure.tensors import distinct_tensors, first_names

__all__ = ["Sites"]


@dataclass(frozen=True)
class Sites:
    """The table of sites.

    Args:
        tensors: names of the sites' tensors, one entry a site.
        dims: their dimensions.
        starts: first id of each site, ascending; a last entry ends the last site.
        parameters: names of tensors that are parameters.
        shapes: dense shapes by tensor name.
        aliases: other names of tied tensors.
    """

    tensors: tuple[str, ...]
    dims: tuple[int, ...]
    starts: NDArray[np.int64]
    parameters: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module, coupling: Coupling) -> Sites:
        """Give every index of every dimension of every parameter and buffer an id of its own."""
        named = distinct_tensors(model)
        aliases = {name: known for name, known in first_names(model).items() if name != known}
        tensors: list[str] = []
        dims: list[int] = []
        starts: list[int] = []
        for name, tensor in named.items():
            for dim, size in enumerate(tensor.shape):
                tensors.append(name)
                dims.append(dim)
                starts.append(coupling.n_ids)
                coupling.new_ids(int(size))
        coupling.first_made = coupling.n_ids
        parameters = frozenset(name for name, tensor in named.items() if isinstance(tensor, nn.Parameter))
        return cls(
            tuple(tensors),
            tuple(dims),
            np.array([*starts, coupling.n_ids], dtype=np.int64),
            parameters,
            {name: tuple(int(size) for size in tensor.shape) for name, tensor in named.items()},
            aliases,
        )

    def __len__(self) -> int:
        return len(self.tensors)

    def ids(self, site: int) -> NDArray[np.int64]:
        """The ids of one site."""
        return np.arange(self.starts[site], self.starts[site + 1], dtype=np.int64)

    def of_id(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The site of each id."""
        return np.searchsorted(self.starts, ids, side="right") - 1

    def labels(self, kept: Mapping[str, Mapping[int, NDArray[np.int64]]] | None = None) -> dict[str, Label]:
        """The label of every tensor at the start; ``kept`` positions only, where a cut is given."""
        factors: dict[str, list[Factor]] = {name: [] for name in self.shapes}
        for site, (name, dim) in enumerate(zip(self.tensors, self.dims, strict=True)):
            ids = self.ids(site)
            if kept is not None and dim in kept.get(name, {}):
                ids = ids[kept[name][dim]]
            factors[name].append(Factor((dim,), ids))
        return {
            name: Label(
                tuple(len(f.ids) for f in listed),
                tuple(listed),
                weight=name in self.parameters,
                vanishes=name in self.parameters,
            )
            for name, listed in factors.items()
        }
