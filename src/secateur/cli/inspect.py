"""``secateur inspect``: which units of a network can go, what is coupled to what, and why the rest is frozen."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from secateur.cli.refusals import plain_endings

if TYPE_CHECKING:
    from secateur.structure.groups import Structure

__all__ = ["inspect"]


@plain_endings
def inspect(
    net: Annotated[str, typer.Option(help="A network of the recipes.")] = "resnet-7",
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Show the groups of a network that can lose units, and what is frozen and why."""
    import torch

    import secateur as sc
    from secateur.recipes.networks import network
    from secateur.recipes.task import fresh

    row = network(net)
    structure = sc.trace(fresh(net, seed=0), examples=(torch.zeros(1, *row.shape),))
    if as_json:
        typer.echo(json.dumps({"net": net, **described(structure)}, indent=2))
    else:
        Console(highlight=False, soft_wrap=True).print(Text(str(structure)))


def described(structure: Structure) -> dict[str, Any]:
    """A structure as plain values: dense cost, groups with their members, frozen dimensions with their reasons."""
    return {
        "cost": dataclasses.asdict(structure.cost()),
        "groups": [
            {
                "name": group.name,
                "size": group.size,
                "kind": group.kind,
                "members": [
                    {
                        "tensor": member.tensor,
                        "dim": member.dim,
                        "positions_per_unit": member.index.shape[1],
                        "consumer": member.consumer,
                    }
                    for member in group.members
                ],
            }
            for group in structure.groups
        ],
        "frozen": [dataclasses.asdict(frozen) for frozen in structure.frozen],
    }
