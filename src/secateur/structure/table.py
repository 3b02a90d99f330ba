"""A structure as a table for people: groups, what is at stake in each, and what is frozen why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from secateur.structure.groups import Member

if TYPE_CHECKING:
    from secateur.structure.structure import Structure

__all__ = ["table"]


def table(structure: Structure) -> str:
    """The table that ``print(structure)`` shows: groups, what is at stake in each, and what is frozen."""
    dense = structure.cost()
    lines = [
        (
            f"{len(structure.groups)} groups, {sum(group.size for group in structure.groups)} units; "
            f"{dense.params:,} parameters, {dense.macs:,} MACs"
        ),
        f"{'group':<40} {'units':>6} {'params/unit':>12} {'MACs/unit':>14}  members",
    ]
    for group in structure.groups:
        fewer = structure.cost({group.name: torch.arange(group.size - 1)})
        gated = group.gated
        members = ", ".join(f"{_name(m)}{'*' if any(m is one for one in gated) else ''}" for m in group.members[:6])
        more = f", and {len(group.members) - 6} more" if len(group.members) > 6 else ""
        lines.append(
            f"{group.name:<40} {group.size:>6} {dense.params - fewer.params:>12,} {dense.macs - fewer.macs:>14,}  "
            f"{members}{more}"
        )
    lines.append("(* = where a gate acts; xN = positions that one unit has there)")
    lines.extend(f"note: {note}" for note in structure.notes)
    reasons: dict[str, list[str]] = {}
    for frozen in structure.frozen:
        reasons.setdefault(f"{frozen.reason}{frozen.place}", []).append(f"{frozen.tensor}[{frozen.dim}]")
    lines.append(f"frozen: {len(structure.frozen)} tensor dimensions")
    for reason, where in sorted(reasons.items(), key=lambda item: -len(item[1]))[:20]:
        shown = ", ".join(where[:4]) + (f", and {len(where) - 4} more" if len(where) > 4 else "")
        lines.append(f"  {reason}: {shown}")
    if len(reasons) > 20:
        lines.append(f"  and {len(reasons) - 20} more reasons: structure.frozen, structure.why_frozen(name)")
    return "\n".join(lines)


def _name(member: Member) -> str:
    times = member.index.shape[1]
    return f"{member.tensor}[{member.dim}]{f'x{times}' if times > 1 else ''}"
