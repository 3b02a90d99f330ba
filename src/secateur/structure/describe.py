"""The integers by which the layers of ``torch.nn`` describe the shapes of their own tensors, after a cut.

===========================================  ==============================================================
layer                                        attributes, read from the new shapes
===========================================  ==============================================================
`nn.Linear`, `nn.Bilinear`                   ``in_features`` (``in1_features``, ``in2_features``), ``out_features``
convolutions, also transposed                ``in_channels``, ``out_channels``, ``groups`` (those that keep a row)
`nn.GroupNorm`                               ``num_channels``, ``num_groups`` (those that keep a channel)
batch and instance norms                     ``num_features``
`nn.LayerNorm`, `nn.RMSNorm`                 ``normalized_shape``
`nn.Embedding`, `nn.EmbeddingBag`            ``num_embeddings``, ``embedding_dim``, ``padding_idx``
`nn.PReLU`                                   ``num_parameters``
===========================================  ==============================================================

Any other integer that must change is named in `CutPlan.attributes`, because a trial showed that it must.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from secateur.errors import CompactionError

__all__ = ["described"]

Shapes = Mapping[str, torch.Size]
Cuts = Mapping[int, tuple[int, ...]]


def described(layer: nn.Module, shapes: Shapes, kept: Mapping[str, Cuts]) -> dict[str, object]:
    """New values of the attributes that describe the layer's tensors; empty for a layer that the table lacks.

    Args:
        layer: the layer, still dense.
        shapes: the shapes that its own parameters and buffers will have.
        kept: positions that stay of each cut dimension of each of them.

    Raises:
        CompactionError: a grouped layer would keep unequal numbers of channels in its groups.
    """
    for classes, describe, needed in _TABLE:
        if isinstance(layer, classes) and not needed.isdisjoint(shapes):
            return describe(layer, shapes, kept)
    return {}


def _linear(_: Any, shapes: Shapes, __: Mapping[str, Cuts]) -> dict[str, object]:
    return {"out_features": shapes["weight"][0], "in_features": shapes["weight"][1]}


def _bilinear(_: Any, shapes: Shapes, __: Mapping[str, Cuts]) -> dict[str, object]:
    out_features, in1_features, in2_features = shapes["weight"]
    return {"out_features": out_features, "in1_features": in1_features, "in2_features": in2_features}


def _convolution(layer: _ConvNd, shapes: Shapes, kept: Mapping[str, Cuts]) -> dict[str, object]:
    # The weight is (out, in / groups, ...), and transposed (in, out / groups, ...): its rows tell which groups survive.
    rows = layer.in_channels if layer.transposed else layer.out_channels
    groups = _surviving(layer, kept.get("weight", {}).get(0), rows, layer.groups)
    n_rows, n_columns = shapes["weight"][0], shapes["weight"][1] * groups
    n_in, n_out = (n_rows, n_columns) if layer.transposed else (n_columns, n_rows)
    return {"groups": groups, "in_channels": n_in, "out_channels": n_out}


def _group_norm(layer: nn.GroupNorm, shapes: Shapes, kept: Mapping[str, Cuts]) -> dict[str, object]:
    groups = _surviving(layer, kept.get("weight", {}).get(0), layer.num_channels, layer.num_groups)
    return {"num_groups": groups, "num_channels": shapes["weight"][0]}


def _surviving(layer: nn.Module, kept: tuple[int, ...] | None, size: int, groups: int) -> int:
    """How many of the groups that ``size`` positions fall into keep any; all of these must keep equally many."""
    if kept is None or groups == 1:
        return groups
    counts = Counter(position // (size // groups) for position in kept)
    if len(set(counts.values())) > 1:
        raise CompactionError(
            f"{layer} would keep unequal numbers of channels in its groups ({sorted(set(counts.values()))}); nothing "
            "was changed. Keep whole groups, or the same number from each."
        )
    return len(counts)


def _norm(_: Any, shapes: Shapes, __: Mapping[str, Cuts]) -> dict[str, object]:
    return {"num_features": shapes["weight" if "weight" in shapes else "running_mean"][0]}


def _layer_norm(_: Any, shapes: Shapes, __: Mapping[str, Cuts]) -> dict[str, object]:
    return {"normalized_shape": tuple(shapes["weight"])}


def _embedding(layer: Any, shapes: Shapes, kept: Mapping[str, Cuts]) -> dict[str, object]:
    rows = kept.get("weight", {}).get(0)
    new: dict[str, object] = {"num_embeddings": shapes["weight"][0], "embedding_dim": shapes["weight"][1]}
    if rows is not None and layer.padding_idx is not None:
        new["padding_idx"] = rows.index(layer.padding_idx) if layer.padding_idx in rows else None
    return new


def _prelu(_: Any, shapes: Shapes, __: Mapping[str, Cuts]) -> dict[str, object]:
    return {"num_parameters": shapes["weight"].numel()}


_Describe = Callable[[Any, Shapes, Mapping[str, Cuts]], dict[str, object]]
_WEIGHT = frozenset({"weight"})

#: Classes, the function that reads their attributes, and the tensors of which it needs one.
_TABLE: tuple[tuple[tuple[type[nn.Module], ...], _Describe, frozenset[str]], ...] = (
    ((nn.Linear,), _linear, _WEIGHT),
    ((nn.Bilinear,), _bilinear, _WEIGHT),
    ((_ConvNd,), _convolution, _WEIGHT),
    ((nn.GroupNorm,), _group_norm, _WEIGHT),
    ((_NormBase,), _norm, frozenset({"weight", "running_mean"})),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm, _WEIGHT),
    ((nn.Embedding, nn.EmbeddingBag), _embedding, _WEIGHT),
    ((nn.PReLU,), _prelu, _WEIGHT),
)
