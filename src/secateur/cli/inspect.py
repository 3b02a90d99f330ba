"""``secateur inspect``: which units of a network can go, what is coupled to what, and why the rest is frozen.

``docs/inspect.md`` describes the JSON.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from secateur.cli.numbers import numbers
from secateur.cli.refusals import plain_endings
from secateur.errors import SecateurError, TraceError

if TYPE_CHECKING:
    from secateur.cli.targets import Target
    from secateur.structure.example import Example
    from secateur.structure.groups import Cost, Group
    from secateur.structure.structure import Structure

__all__ = ["FORMAT", "described", "inspect"]

#: Version of the JSON; it grows when a reader of an older one would misread it.
FORMAT = 1
DEFAULT = "resnet-7"


@plain_endings
def inspect(
    target: Annotated[
        str, typer.Argument(help="A network of the recipes, a transformers config.json, or module:factory.")
    ] = "",
    net: Annotated[str, typer.Option(help=f"A network of the recipes; {DEFAULT} where nothing is named.")] = "",
    why: Annotated[
        list[str] | None, typer.Option(help="Say only why this module or tensor is frozen; can be repeated.")
    ] = None,
    shape: Annotated[str, typer.Option(help="Shape of the one float input of a factory's model: 1,3,224,224.")] = "",
    device: Annotated[str, typer.Option(help="Where a config.json's model is built; meta takes no memory.")] = "meta",
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Show the groups of a network that can lose units, and what is frozen and why."""
    if target and net:
        raise SecateurError(f"got {target!r} and --net {net}; name one of them")
    if net:
        from secateur.recipes.networks import network

        network(net)
    from secateur.cli.targets import resolve

    found = resolve(target or net or DEFAULT, _shape(shape), device)
    structure = _traced(found)
    reasons = {name: structure.why_frozen(name) for name in why or ()}
    if as_json:
        content = described(structure, found)
        typer.echo(json.dumps(content | ({"why": reasons} if reasons else {}), indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    for reason in reasons.values():
        console.print(Text(reason))
    if not reasons:
        console.print(Text(f"{found.name}: {type(found.model).__name__}, called with {_inputs(found.examples)}"))
        console.print(Text(str(structure)))


def described(structure: Structure, target: Target) -> dict[str, Any]:
    """A structure as plain values: costs, groups with their members, frozen dimensions with their reasons."""
    import torch

    smallest = {group.name: torch.arange(group.least) for group in structure.groups}
    return {
        "format": FORMAT,
        "target": target.name,
        "model": type(target.model).__name__,
        "inputs": [_shapes(example) for example in target.examples],
        "cost": _counts(structure.cost()),
        "least": _counts(structure.cost(smallest)),
        "groups": [_group(structure, group) for group in structure.groups],
        "frozen": [dataclasses.asdict(frozen) for frozen in structure.frozen],
        "notes": list(structure.notes),
    }


def _counts(cost: Cost) -> dict[str, int]:
    return {"params": cost.params, "macs": cost.macs}


def _group(structure: Structure, group: Group) -> dict[str, Any]:
    import torch

    dense, fewer = structure.cost(), structure.cost({group.name: torch.arange(group.size - 1)})
    gated = group.gated
    return {
        "name": group.name,
        "size": group.size,
        "kind": group.kind,
        "params_per_unit": dense.params - fewer.params,
        "macs_per_unit": dense.macs - fewer.macs,
        "members": [
            {
                "tensor": member.tensor,
                "dim": member.dim,
                "positions_per_unit": member.index.shape[1],
                "consumer": member.consumer,
                "gated": any(member is one for one in gated),
            }
            for member in group.members
        ],
    }


def _traced(target: Target) -> Structure:
    from secateur.structure.trace import trace

    try:
        return trace(target.model, list(target.examples))
    except TraceError as error:
        on_meta = any(tensor.is_meta for tensor in target.model.parameters())
        raise SecateurError(f"{error}{' Try --device cpu.' if on_meta else ''}") from error


def _shape(text: str) -> tuple[int, ...] | None:
    if not text:
        return None
    sizes = numbers(text, "--shape", int)
    if min(sizes) < 1:
        raise SecateurError(f"--shape {text!r}: expected sizes of at least 1, such as 1,3,224,224")
    return sizes


def _shapes(example: Example) -> dict[str, Any]:
    """Shapes of an example's tensors, by name or position; other inputs as text."""
    named = {**{str(place): value for place, value in enumerate(example.args)}, **example.kwargs}
    return {name: list(value.shape) if hasattr(value, "shape") else str(value) for name, value in named.items()}


def _inputs(examples: Sequence[Example]) -> str:
    parts = [
        ", ".join(f"{name} {tuple(s) if isinstance(s, list) else s}" for name, s in _shapes(one).items())
        for one in examples
    ]
    return "; ".join(parts)
