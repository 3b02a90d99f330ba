"""The options for how much of a network is kept, where a command asks for one budget."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["KeepMacs", "KeepParams", "params_kept"]

#: Share of the parameters that is kept where no budget is given.
DEFAULT = 0.1

KeepParams = Annotated[
    float | None, typer.Option(help=f"Share of all parameters to keep, in (0, 1]; {DEFAULT} without a budget.")
]
KeepMacs = Annotated[float | None, typer.Option(help="Share of the multiply-accumulates to keep, in (0, 1].")]


def params_kept(keep_params: float | None, keep_macs: float | None) -> float | None:
    """The share of the parameters that was asked for; the default where neither share was.

    Example:
        >>> params_kept(None, None), params_kept(None, 0.5), params_kept(0.3, None)
        (0.1, None, 0.3)
    """
    return DEFAULT if keep_params is None and keep_macs is None else keep_params
