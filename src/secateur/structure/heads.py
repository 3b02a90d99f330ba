"""Which groups are attention heads: units that number the products of one activation with another.

Attention multiplies queries with keys, and scores with values, head by head: there a head is a step along a batch
dimension of the product, while along the rows and columns of every weight it owns a whole slice. So the units of a
group are heads if

- each has at least two positions in every one of the group's members, and
- they lie along a batch dimension of a matrix product, or an attention, of which no side is a weight.

Channels that a GroupNorm, a convolution with groups or a gated linear unit ties together own several positions as well,
but number no products. Where a key and value head serves several query heads, all of these are one unit. Heads of size
1 cannot be told from single features by this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secateur.structure.groups import Axis, Group

__all__ = ["HEADS", "with_heads"]

#: The kind of these groups.
HEADS = "heads"


def with_heads(groups: Sequence[Group], batches: Sequence[Axis]) -> tuple[Group, ...]:
    """The groups, those of attention heads marked by their kind.

    Args:
        groups: that a trace found.
        batches: the batch dimensions of products of two activations.
    """
    numbering = {group for axis in batches for group, _ in axis.per_group}
    return tuple(
        replace(group, kind=HEADS) if number in numbering and _owns_slices(group) else group
        for number, group in enumerate(groups)
    )


def _owns_slices(group: Group) -> bool:
    return all(member.index.shape[1] > 1 for member in group.members)
