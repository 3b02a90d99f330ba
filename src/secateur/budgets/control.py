"""Settings of a budget's controller."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields

from secateur.budgets.order import SMALLEST
from secateur.errors import BudgetError

__all__ = ["Control"]


@dataclass(frozen=True)
class Control:
    """How fast multipliers move; the defaults serve every gate method, optimizer rates and loss scales alike.

    Args:
        price_step: ascent of the price for each optimizer step and unit of ``log(expected / reference)``, >= 0; 0
            switches the price off.
        proportional: share of the violation itself that is added to the price (PI control), >= 0.
        restart: whether the price falls to 0 as soon as the expected cost is at the reference or under it.
        price_limit: largest price, > 0. At 1, halving the cost is worth as much as halving the loss.
        push_growth: largest relative growth of the push in one step, in [0, 1); half of it while the reference falls.
            0 switches the push off, and what is left is the Lagrangian of the expected cost.
        push_decay: largest relative decay of the push in one step, in [0, 1).
        push_gain: how many times larger than its multiplier the push can be while the cost is far off, >= 1.
        tolerance: relative deviation of the fixed gates' cost at which the push neither grows nor decays, > 0.
        lag: optimizer steps by which that cost may trail the falling reference as well, >= 0.
        hold: how hard units stay closed once they are, as a share of the push, >= 0, while the reference falls; 1 then.
        leak: share of the push that reaches all other units when units must open, >= 0: methods whose closed units
            get no gradient can only open them through the others.

    Raises:
        BudgetError: a setting is outside its range.

    Example:
        >>> Control(push_growth=0.0, restart=False).price_step  # the textbook Lagrangian
        0.1
    """

    price_step: float = 0.1
    proportional: float = 0.0
    restart: bool = True
    price_limit: float = 3.0
    push_growth: float = 0.1
    push_decay: float = 0.025
    push_gain: float = 5.0
    tolerance: float = 0.02
    lag: float = 15.0
    hold: float = 0.3
    leak: float = 0.1

    def __post_init__(self) -> None:
        least = {"push_gain": 1.0, "price_limit": SMALLEST, "tolerance": SMALLEST}
        most = {"push_growth": 1.0 - SMALLEST, "push_decay": 1.0 - SMALLEST}
        wrong = []
        for setting in fields(self):
            value, low, high = getattr(self, setting.name), least.get(setting.name, 0.0), most.get(setting.name)
            if setting.name != "restart" and not low <= value <= (sys.float_info.max if high is None else high):
                wrong.append(
                    f"{setting.name}={value!r}, expected {low:g} or more" + (f", under {high:g}" if high else "")
                )
        if wrong:
            raise BudgetError("Control: " + "; ".join(wrong))
