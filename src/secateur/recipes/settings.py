"""What one run of a recipe is made of: names, budget, length, seed. All of it plain values, checked at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from secateur.budgets.budget import Budget
from secateur.errors import SecateurError
from secateur.gates import METHODS
from secateur.recipes.data import DATA_SETS
from secateur.recipes.networks import NETWORKS
from secateur.recipes.train import Phase

__all__ = ["DEFAULT_NETS", "SCHEDULES", "Schedule", "Settings"]

#: The network that a data set gets where none is named.
DEFAULT_NETS: Mapping[str, str] = {"digits": "resnet-7", "mnist": "lenet-5", "cifar10": "resnet-20"}


#: How often in a gated phase units that have stayed closed are removed.
CHECKS = 50


@dataclass(frozen=True)
class Schedule:
    """How a network is trained, dense or gated.

    Args:
        epochs: passes over the training images in all, at least 2; a gated network spends its share of them after the
            cut, so that dense, gated and scratch see as many examples.
        tuned: share of the epochs that come after the cut, in [0, 1).
        batch: intended examples in a batch.
        lr: Adam's rate for the weights at the start of a phase.
        gate_lr: Adam's rate for the gates.
        tune_lr: Adam's rate at the start of the phase after the cut.
        weight_decay: of the weights in all phases, decoupled.
    """

    epochs: int
    tuned: float
    batch: int
    lr: float
    gate_lr: float
    tune_lr: float
    weight_decay: float = 0.0

    @property
    def epochs_after_cut(self) -> int:
        """Epochs of fine-tuning; at least one epoch is left for the gates."""
        return min(self.epochs - 1, round(self.tuned * self.epochs))

    def whole(self, name: str, seed: int) -> Phase:
        """All epochs in one phase, as for a network without gates."""
        return Phase(name, self.epochs, self.batch, self.lr, weight_decay=self.weight_decay, seed=seed)

    def gated(self, name: str, seed: int) -> Phase:
        """The epochs with gates."""
        epochs = self.epochs - self.epochs_after_cut
        return Phase(name, epochs, self.batch, self.lr, self.gate_lr, self.weight_decay, seed, checks=CHECKS)

    def after_cut(self, name: str, seed: int) -> Phase:
        """The epochs after the cut."""
        # Another seed: the order of the gated phase's first epochs is not repeated.
        epochs, decay = self.epochs_after_cut, self.weight_decay
        return Phase(name, epochs, self.batch, self.tune_lr, weight_decay=decay, seed=seed + 1)


#: How each network is trained unless told otherwise.
SCHEDULES: Mapping[str, Schedule] = {
    "resnet-7": Schedule(40, tuned=0.5, batch=32, lr=3e-3, gate_lr=0.05, tune_lr=5e-3, weight_decay=1.0),
    "lenet-300-100": Schedule(20, tuned=0.3, batch=128, lr=1e-3, gate_lr=0.02, tune_lr=5e-4),
    "lenet-5": Schedule(20, tuned=0.3, batch=128, lr=1e-3, gate_lr=0.02, tune_lr=5e-4),
    "resnet-20": Schedule(60, tuned=0.6, batch=128, lr=3e-3, gate_lr=0.02, tune_lr=3e-3),
    "wrn-16-4": Schedule(60, tuned=0.6, batch=128, lr=3e-3, gate_lr=0.02, tune_lr=3e-3),
    "wrn-28-10": Schedule(60, tuned=0.6, batch=128, lr=3e-3, gate_lr=0.02, tune_lr=3e-3),
}


@dataclass(frozen=True)
class Settings:
    """One run of ``secateur train``.

    Args:
        data: a name in ``DATA_SETS``.
        net: a name in ``NETWORKS``; "" for the data set's own.
        method: a name in ``secateur.gates.METHODS``.
        keep_params: share of the dense parameters to keep, in (0, 1], or None.
        keep_macs: share of the dense multiply-accumulates to keep, in (0, 1], or None; at least one share is given.
        epochs: passes over the training images, at least 2; 0 for the network's own number.
        seed: of the initial weights, the order of the examples and the gates' draws, at least 0.
        device: torch's name of the device to train on.
        conditional: whether steps leave out units whose gates they draw as 0, where that was measured to pay. A run
            then repeats up to rounding only, for times decide.

    Raises:
        SecateurError: names every setting that is unknown, out of range, or does not fit another one.
        BudgetError: a share is outside (0, 1].

    Example:
        >>> Settings(keep_params=0.1).net
        'resnet-7'
    """

    data: str = "digits"
    net: str = ""
    method: str = "hard-concrete"
    keep_params: float | None = None
    keep_macs: float | None = None
    epochs: int = 0
    seed: int = 0
    device: str = "cpu"
    conditional: bool = False

    def __post_init__(self) -> None:
        tables = {
            "data set": (self.data, DATA_SETS),
            "network": (self.net, NETWORKS),
            "method": (self.method, METHODS),
        }
        problems = [
            f"unknown {kind} {name!r}; there are: {', '.join(table)}"
            for kind, (name, table) in tables.items()
            if name not in table and (name or kind != "network")
        ]
        if self.data in DATA_SETS:
            if not self.net:
                object.__setattr__(self, "net", DEFAULT_NETS[self.data])
            if self.net in NETWORKS and NETWORKS[self.net].shape != DATA_SETS[self.data].shape:
                fitting = [name for name, row in NETWORKS.items() if row.shape == DATA_SETS[self.data].shape]
                problems.append(
                    f"network {self.net!r} reads images of {NETWORKS[self.net].shape}, those of {self.data!r} have "
                    f"{DATA_SETS[self.data].shape}; these networks fit it: {', '.join(fitting)}"
                )
        if self.epochs != 0 and self.epochs < 2:
            problems.append(f"epochs={self.epochs}; expected at least 2, one before the cut and one after")
        if self.seed < 0:
            problems.append(f"seed={self.seed}; expected at least 0")
        if problem := _device_problem(self.device):
            problems.append(problem)
        if problems:
            raise SecateurError("; ".join(problems))
        self.budget()

    def budget(self, steps: int | None = None) -> Budget:
        """The budget that the gated network is trained to, over so many optimizer steps."""
        return Budget(keep_params=self.keep_params, keep_macs=self.keep_macs, steps=steps)

    def schedule(self) -> Schedule:
        """How the network is trained, with the number of epochs that was asked for."""
        own = SCHEDULES[self.net]
        return own if self.epochs == 0 else Schedule(**{**vars(own), "epochs": self.epochs})

    @property
    def title(self) -> str:
        """Short enough for a file name: data set, network, method, budget, seed."""
        shares = {"params": self.keep_params, "macs": self.keep_macs}
        budget = "-".join(f"{kind}{share:g}" for kind, share in shares.items() if share is not None)
        return f"{self.data}-{self.net}-{self.method}-{budget}-seed{self.seed}"


def _device_problem(name: str) -> str:
    """What is wrong with a device, or "": a tensor is put there, which is the only sure test."""
    try:
        torch.empty(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return f"device {name!r} cannot be used ({str(error).splitlines()[0]}); --device cpu always can"
    return ""
