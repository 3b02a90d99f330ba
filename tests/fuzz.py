"""Random networks from families of operators, for hypothesis: whatever is built, masked must equal cut.

A network is a list of steps. A step knows the layout of what it reads, ``rows`` (B, T, C) or an ``image`` (B, C, H, W),
and says the layout of what it makes. It takes sizes from the tensors themselves or has them written into it, as code
that people write does either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

ROWS, IMAGE = "rows", "image"
BATCH = 2
MOST_CHANNELS = 24

Draw = Callable[..., Any]
Run = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Layout:
    """Shape of a tensor between two steps: ``c`` channels, and ``t`` rows or ``t x t`` pixels."""

    kind: str
    c: int
    t: int

    def shape(self) -> tuple[int, ...]:
        return (BATCH, self.t, self.c) if self.kind == ROWS else (BATCH, self.c, self.t, self.t)


class Step(nn.Module):
    """One step: a function of this module and a tensor.

    Args:
        name: what it does, with the numbers that were drawn.
        run: ``run(step, x)``.
        after: the layout of its result.
        parts: modules and parameters, as attributes.
    """

    def __init__(self, name: str, run: Run, after: Layout, **parts: Any) -> None:
        super().__init__()
        self.name, self.run, self.after = name, run, after
        for key, part in parts.items():
            setattr(self, key, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


Builder = Callable[[Draw, Layout], "Step | None"]
_BUILDERS: dict[str, list[Builder]] = {ROWS: [], IMAGE: []}


def builds(*kinds: str) -> Callable[[Builder], Builder]:
    """Register a builder of steps for some layouts; it gives None where its step does not fit."""

    def register(function: Builder) -> Builder:
        for kind in kinds:
            _BUILDERS[kind].append(function)
        return function

    return register


def pick(draw: Draw, *values: Any) -> Any:
    """One of some values."""
    return draw(st.sampled_from(values))


def width(draw: Draw) -> int:
    """A number of channels."""
    return int(pick(draw, 2, 3, 4, 6, 8, 12))


def divisor(draw: Draw, c: int) -> int | None:
    """A proper divisor of a number of channels."""
    found = [k for k in (2, 3, 4) if c % k == 0 and c > k]
    return pick(draw, *found) if found else None


class Chain(nn.Sequential):
    """Some steps, one after another."""

    def note(self) -> str:
        return " > ".join(step.name for step in self)


def _steps(draw: Draw, s: Layout, count: int, depth: int) -> list[Step]:
    steps: list[Step] = []
    while len(steps) < count:
        composed = depth > 0 and draw(st.integers(0, 3)) == 0
        made = branch(draw, s, depth) if composed else pick(draw, *_BUILDERS[s.kind])(draw, s)
        if made is None or made.after.c > 4 * MOST_CHANNELS:
            made = Step("relu", lambda m, x: x.relu(), s)
        steps.append(made)
        s = made.after
    return steps


def _fit(before: Layout, c: int) -> Step:
    """A step to a given number of channels."""
    layer = nn.Linear(before.c, c) if before.kind == ROWS else nn.Conv2d(before.c, c, 1)
    return Step(f"fit {c}", lambda m, x: m.layer(x), replace(before, c=c), layer=layer)


def branch(draw: Draw, s: Layout, depth: int) -> Step | None:
    """Two ways that meet again: sums, products and concatenations, and modules that are shared."""
    chain = Chain(*_steps(draw, s, draw(st.integers(1, 2)), depth - 1))
    after = chain[-1].after
    if (after.kind, after.t) != (s.kind, s.t):
        return None
    how = pick(draw, "add", "cat", "mul", "max", "shared", "both")
    if how == "cat":
        dim = -1 if s.kind == ROWS else 1
        made = replace(s, c=s.c + after.c)
        return Step(f"cat({chain.note()})", lambda m, x: torch.cat([x, m.chain(x)], dim), made, chain=chain)
    if after.c != s.c:
        chain.append(_fit(after, s.c))
    if how == "shared":
        return Step(f"shared({chain.note()})", lambda m, x: x + m.chain(m.chain(x)), s, chain=chain)
    if how == "both":
        other = _fit(s, s.c)
        return Step(f"both({chain.note()})", lambda m, x: m.chain(x) - m.other(x).tanh(), s, chain=chain, other=other)
    combine = {"add": torch.add, "mul": torch.mul, "max": torch.maximum}[how]
    return Step(f"{how}({chain.note()})", lambda m, x: combine(x, m.chain(x)), s, chain=chain)


class Network(nn.Module):
    """A stem, some steps, and a head.

    Args:
        first: layout of the input.
        steps: what lies between.
        head: whether a last layer reads the units; else they are the output.
    """

    def __init__(self, first: Layout, steps: list[Step], head: bool) -> None:
        super().__init__()
        self.first, self.steps = first, Chain(*steps)
        self.head: nn.Module = _fit(steps[-1].after, 3) if head else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.steps(x))
        return made

    def inputs(self) -> Tensor:
        return torch.randn(self.first.shape(), generator=torch.Generator().manual_seed(1))

    def __repr__(self) -> str:
        return f"{self.first}: {self.steps.note()}{'' if isinstance(self.head, Step) else ', no head'}"


@st.composite
def networks(draw: Draw, most: int = 6) -> Network:
    """Networks of up to ``most`` steps after a stem."""
    import tests.fuzz_steps  # noqa: F401 - registers the steps

    torch.manual_seed(0)
    first = Layout(pick(draw, ROWS, IMAGE), 3, 4)
    stem = _fit(first, width(draw))
    steps = [stem, *_steps(draw, stem.after, draw(st.integers(1, most)), 2)]
    return Network(first, steps, pick(draw, True, True, True, False))
