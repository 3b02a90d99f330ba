"""What a training loop leaves out that gates or their budget learn by: calls of the pruner, groups of an optimizer."""

from __future__ import annotations

import gc
import warnings

import torch
from torch import nn

from secateur.errors import GateError
from secateur.pruning.gateset import GateSet
from secateur.pruning.optimizers import Groups, check_groups, groups_in_use

__all__ = ["Loop"]


class Loop:
    """One training loop as far as it went; says once of each thing that it is missing.

    Args:
        steered: whether a budget or a penalty is to enter the loss.
    """

    def __init__(self, steered: bool) -> None:
        self._steered = steered
        self._losses = self._steps = 0
        self._checked = False
        self._said = set[str]()

    def lost(self, training: bool) -> None:
        """The pruner was asked for a loss or for its penalty, with gates that are drawn, or fixed as in evaluation."""
        self._losses += 1
        if not training and torch.is_grad_enabled():
            self._say(
                "the model is in evaluation mode: its gates are fixed, and nothing of the task's loss reaches them;"
                " call model.train(), and put only those layers into evaluation mode that are to stay as they are"
            )

    def check(self, groups: Groups, gates: GateSet) -> None:
        """Look at the groups of the optimizers in use; see `check_groups`."""
        check_groups(groups, gates.trained)
        self._checked = True

    def stepped(self, model: nn.Module, gates: GateSet) -> None:
        """An optimizer step was reported; the first one shows which optimizers there are, until they are as needed."""
        if not self._checked:
            if groups := groups_in_use(list(model.parameters())):  # others than torch's are not seen
                self._check_in_use(model, groups, gates)
            self._checked = True
        self._steps += 1
        if self._steered and not self._losses:
            self._say(
                "pruner.step() was called and no loss was asked for: the budget or penalty is not part of what is"
                " trained. Train what pruner.loss(closure) returns, or add pruner.penalty() to your loss"
            )

    def _check_in_use(self, model: nn.Module, groups: Groups, gates: GateSet) -> None:
        try:
            check_groups(groups, gates.trained)
        except GateError:
            # One that was given up may live on in a cycle, as with its scheduler.
            gc.collect()
            if groups := groups_in_use(list(model.parameters())):
                check_groups(groups, gates.trained)

    def ended(self) -> None:
        """The training is over."""
        if self._losses and not self._steps:
            self._say(
                "pruner.step() was never called: a budget's multipliers have not moved, and gates may have left their"
                " range. Call it after each optimizer.step()"
            )

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, stacklevel=4)  # where the pruner was called
