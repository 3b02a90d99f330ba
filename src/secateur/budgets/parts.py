"""Parts of a model that a budget counts apart: what a module costs, or how many units a group keeps."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from secateur.errors import BudgetError
from secateur.structure.groups import Axis, Term
from secateur.structure.structure import Structure

__all__ = ["Part", "with_parts"]


@dataclass(frozen=True)
class Part:
    """One number about one part.

    Args:
        name: a module's or parameter's qualified name, or, for units, a group's.
        kind: ``"params"`` or ``"macs"`` of the module, all that lies in it included; ``"units"`` of the group.

    Example:
        >>> Part("layer3", "macs").label
        'macs of layer3'
    """

    name: str
    kind: Literal["params", "macs", "units"]

    @property
    def label(self) -> str:
        """What tells this number from the others."""
        return f"{self.kind} of {self.name}"


def with_parts(structure: Structure, parts: Sequence[Part]) -> tuple[tuple[Axis, ...], list[tuple[Term, ...]]]:
    """The axes of a structure with those that parts need, and the terms of each part.

    Raises:
        BudgetError: a name is none of the model's, or nothing is counted there.
    """
    axes, found, problems = list(structure.axes), [], []
    groups = [group.name for group in structure.groups]
    for part in parts:
        if part.kind == "units":
            terms: tuple[Term, ...] = ()
            if part.name in groups:
                axes.append(Axis(0, ((groups.index(part.name), 1),)))
                terms = (Term(1.0, (len(axes) - 1,), part.name),)
            names = groups
        else:
            pool = structure.terms[0] if part.kind == "params" else structure.terms[1]
            terms = tuple(term for term in pool if f"{term.label}.".startswith(f"{part.name}."))
            names = sorted({stem for term in pool for stem in _stems(term.label)})
        if not terms:
            near = difflib.get_close_matches(part.name, names, n=3) or names[:5]
            what = "group of units" if part.kind == "units" else f"module with {part.kind}"
            problems.append(f"there is no {what} named {part.name!r}; there are, for example: {', '.join(near)}")
        found.append(terms)
    if problems:
        raise BudgetError("Budget(per=...): " + "; ".join(problems))
    return tuple(axes), found


def _stems(label: str) -> list[str]:
    """The label and all modules that it lies in."""
    words = label.split(".")
    return [".".join(words[:length]) for length in range(1, len(words) + 1)]
