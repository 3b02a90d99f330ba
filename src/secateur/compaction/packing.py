"""Tensors that are mostly zeros in a file: one bit for each number, and the numbers that are not zero.

A number is left out only if all its bits are zero, so that -0.0 and NaN come back as they were, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

__all__ = ["packed", "unpacked"]

#: Ends of the names under which the two parts stand; a module's tensors have no names with an empty part.
MASK, VALUES = "..mask", "..values"
#: What the description of one more tensor takes in a file, about, in bytes.
ENTRY = 256


def packed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """The tensors of a file, those in two parts that are smaller so.

    Args:
        tensors: contiguous ones on the CPU, by name.

    Returns:
        What the file holds, and the shape of each tensor that it holds in parts: ``name..mask``, uint8, a bit for each
        number in the order of the flattened tensor, the first in the highest bit; ``name..values``, the numbers whose
        bit is set.

    Example:
        >>> parts, shapes = packed({"w": torch.eye(100)})
        >>> {name: tuple(part.shape) for name, part in parts.items()}, shapes
        ({'w..mask': (1250,), 'w..values': (100,)}, {'w': [100, 100]})
        >>> torch.equal(unpacked(parts, shapes)["w"], torch.eye(100))
        True
    """
    parts: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        n_bytes = tensor.element_size()
        # Looking at the bytes serves every type alike.
        is_set = (tensor.reshape(-1).view(torch.uint8).view(-1, n_bytes) != 0).any(dim=1)
        n_set = int(is_set.sum())
        if math.ceil(len(is_set) / 8) + n_set * n_bytes + ENTRY < len(is_set) * n_bytes:
            shapes[name] = list(tensor.shape)
            parts[name + MASK] = torch.from_numpy(np.packbits(is_set.numpy()))
            parts[name + VALUES] = tensor.reshape(-1)[is_set]
        else:
            parts[name] = tensor
    return parts, shapes


def unpacked(parts: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """The inverse of `packed`.

    Raises:
        KeyError: a part is missing.
        ValueError: parts and shape do not fit.
    """
    of_parts = {name + end for name in shapes for end in (MASK, VALUES)}
    tensors = {name: tensor for name, tensor in parts.items() if name not in of_parts}
    for name, shape in shapes.items():
        mask, values = parts[name + MASK], parts[name + VALUES]
        size = math.prod(shape)
        if mask.dtype != torch.uint8 or mask.dim() != 1 or len(mask) != math.ceil(size / 8):
            raise ValueError(f"{name}: a mask of shape {tuple(mask.shape)} and {mask.dtype} for {size} numbers")
        is_set = torch.from_numpy(np.unpackbits(mask.numpy(), count=size).astype(bool))
        if values.shape != (int(is_set.sum()),):
            raise ValueError(f"{name}: {tuple(values.shape)} numbers, and {int(is_set.sum())} bits are set")
        n_bytes = values.element_size()
        # As bytes, for not every type that a file can hold can be written by index.
        tensor = torch.zeros(size, n_bytes, dtype=torch.uint8)
        tensor[is_set] = values.view(torch.uint8).view(-1, n_bytes)
        tensors[name] = tensor.view(-1).view(values.dtype).view(shape)
    return tensors
