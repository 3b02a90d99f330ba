"""What one experiment is made of: a typed value, so that two runs of the same recipe did the same."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import secateur as sc
from secateur.errors import SecateurError
from secateur.recipes.checkpoint import beyond_defaults
from secateur.recipes.train import Phase

__all__ = ["Distillation", "Job", "Point", "Recipe", "opened"]

#: Difference between the logit of a hard concrete gate's open chance and its log alpha: 2/3 ln 11.
OPEN_SHIFT = 2 / 3 * math.log(11)
#: Fields of a recipe that may depend on the size: the dense network, which all sizes share, knows nothing of them.
OF_A_SIZE = frozenset({"noise", "distillation", "hold", "ramp", "per"})
#: The name, among a method's settings, of what is not the gates' but the weights'.
DECAY = "weight_decay"


def opened(drop_rate: float) -> float:
    """The open chance of a hard concrete gate that the papers give by the drop rate of its log alpha.

    Args:
        drop_rate: p, in (0, 1), with ``log alpha = logit(1 - p)``.

    Example:
        >>> round(opened(0.5), 3), round(opened(0.2), 3), round(opened(0.3), 3)
        (0.832, 0.952, 0.92)
    """
    return 1 / (1 + math.exp(-OPEN_SHIFT) * drop_rate / (1 - drop_rate))


@dataclass(frozen=True)
class Point:
    """How small a network is to become: a share of its cost, or the papers' weights of the L0 norm.

    Args:
        keep_params: share of the dense parameters to end at, in (0, 1], or None.
        keep_macs: share of the dense multiply-accumulates, alike.
        lambdas: weight of each gated layer's L0 norm, or one for all, before the division by the number of training
            images.

    Raises:
        SecateurError: not exactly one of the three is given, or a number is outside its range.

    Example:
        >>> Point(keep_params=0.1).name, Point(lambdas=(0.1, 0.3)).name
        ('params0.1', 'lambda0.1-0.3')
    """

    keep_params: float | None = None
    keep_macs: float | None = None
    lambdas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        shares = {"keep_params": self.keep_params, "keep_macs": self.keep_macs}
        given = [name for name, share in shares.items() if share is not None] + ["lambdas"] * bool(self.lambdas)
        problems = [] if len(given) == 1 else [f"got {' and '.join(given) or 'nothing'}, expected one of the three"]
        problems += [
            f"{name}={share}, expected a share in (0, 1]"
            for name, share in shares.items()
            if share is not None and not 0 < share <= 1
        ]
        if any(not 0 <= weight < math.inf for weight in self.lambdas):
            problems.append(f"lambdas={self.lambdas}, expected finite numbers of at least 0")
        if problems:
            raise SecateurError("a point of an experiment: " + "; ".join(problems))

    @property
    def name(self) -> str:
        """Short enough for a file name."""
        if self.lambdas:
            return "lambda" + "-".join(f"{weight:g}" for weight in self.lambdas)
        return f"params{self.keep_params:g}" if self.keep_params is not None else f"macs{self.keep_macs:g}"

    @property
    def share(self) -> float | None:
        """How much of the dense cost is to stay, in (0, 1]; None where lambdas say it."""
        return self.keep_macs if self.keep_params is None else self.keep_params

    @classmethod
    def named(cls, name: str) -> Point:
        """The point that has this name.

        Raises:
            SecateurError: no point has it.

        Example:
            >>> Point.named("lambda0.1-1e-05")
            Point(keep_params=None, keep_macs=None, lambdas=(0.1, 1e-05))
        """
        kind = next((kind for kind in ("params", "macs", "lambda") if name.startswith(kind)), "")
        try:
            # Not at the minus of an exponent.
            values = [float(number) for number in re.split(r"(?<!e)-", name.removeprefix(kind))]
        except ValueError:
            values = []
        if kind == "lambda" and values:
            return cls(lambdas=tuple(values))
        if kind and len(values) == 1:
            return cls(keep_params=values[0]) if kind == "params" else cls(keep_macs=values[0])
        raise SecateurError(f"{name!r} names no point; expected such as params0.1, macs0.5 or lambda0.1-0.3")


@dataclass(frozen=True)
class Distillation:
    r"""The loss of a network that learns from another's outputs as well as from the labels.

    :math:`(1 - s)\,\mathrm{CE}(y, p) + s\,T^2\,\mathrm{KL}(q_T \| p_T)`, with p the network's and q the teacher's
    distribution, and the index T for logits divided by T.

    Args:
        temperature: T, > 0.
        share: s, in [0, 1].

    Source: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015.
    """

    temperature: float
    share: float


@dataclass(frozen=True)
class Recipe:
    """One experiment: what is trained on what, how, and to which sizes.

    Args:
        experiment: the name that it is asked for by.
        name: ``"paper"``, what was published, or ``"ours"``.
        version: grows whenever anything here changes that methods share; records of other versions are never mixed.
            What a method is made with stands in its records, and is compared besides.
        data: a name in ``DATA_SETS``.
        net: a name in ``NETWORKS``.
        methods: what each method is made with, by its name in ``secateur.gates.METHODS``; their order is that of runs.
            A mapping among the settings is of the groups that its key is a pattern for, ``"inputs"`` for single inputs,
            and holds what differs there. ``"weight_decay"`` is that of the weights while these gates train, instead of
            the phase's: one method asks for it where others do without.
        points: the sizes.
        dense: how the network without gates is trained, which also teaches where there is distillation.
        gated: how the network with gates is trained.
        tuned: how the compact network is trained on; None where the paper ends with the gates.
        units: pattern of the groups that get gates.
        pixels: ``"unit"``, in [0, 1], or ``"standardised"``.
        augmented: whether images are shifted by up to 4 pixels and mirrored, as the papers do for CIFAR.
        dropout: rate at the inputs of a layer while the dense network trains, by the layer's name.
        noise: the same for the gated, tuned and scratch networks.
        distillation: what the gated, tuned and scratch networks learn from the dense one; None for nothing.
        label_smoothing: share of the label that is spread over all classes in these, in [0, 1).
        hold: share of the gated steps before the budget's target falls.
        ramp: share of them in which it falls.
        per: sizes of single parts besides, as in `secateur.Budget`, where the gates follow a budget.
        weight_decay: L2 of the gated layers' weights, each unit's weighted by its open chance; the papers' penalty.
        half: whether forward passes run in bfloat16 where torch thinks it safe.
        smaller: by the share of the dense cost, fields that are others where this or less is to stay; see `at`.

    Raises:
        SecateurError: what sizes have in common is another one where less is to stay.
    """

    experiment: str
    name: Literal["paper", "ours"]
    version: int
    data: str
    net: str
    methods: Mapping[str, Mapping[str, Any]]
    points: tuple[Point, ...]
    dense: Phase
    gated: Phase
    tuned: Phase | None = None
    units: str = "*"
    pixels: Literal["unit", "standardised"] = "unit"
    augmented: bool = False
    dropout: Mapping[str, float] = field(default_factory=dict)
    noise: Mapping[str, float] = field(default_factory=dict)
    distillation: Distillation | None = None
    label_smoothing: float = 0.0
    hold: float = 0.1
    ramp: float = 0.5
    per: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    weight_decay: float = 0.0
    half: bool = False
    smaller: Mapping[float, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if problems := {name for own in self.smaller.values() for name in own} - OF_A_SIZE:
            raise SecateurError(
                f"{self.experiment}, recipe {self.name!r}: {', '.join(sorted(problems))} must be the same for all"
                f" sizes; what may differ: {', '.join(sorted(OF_A_SIZE))}"
            )

    def at(self, point: Point) -> Recipe:
        """The recipe as it is for one size: with the fields of the least share in ``smaller`` that is no less."""
        share = math.inf if point.share is None else point.share
        own = next((own for limit, own in sorted(self.smaller.items()) if share <= limit), {})
        return dataclasses.replace(self, **own)

    @property
    def epochs(self) -> int:
        """Passes over the data until the compact network is done."""
        return self.gated.epochs + (0 if self.tuned is None else self.tuned.epochs)

    def made_with(self, method: str) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
        """Settings of a method, and what differs from them by groups.

        Example:
            >>> from secateur.recipes.papers.mnist_mlp import PAPER
            >>> {group: sorted(own) for group, own in PAPER.made_with("arm")[1].items()}
            {'inputs': ['init_open']}
        """
        given = self.methods[method]
        own = {group: settings for group, settings in given.items() if isinstance(settings, Mapping)}
        return {name: value for name, value in given.items() if name not in own and name != DECAY}, own

    def settings(self) -> dict[str, Any]:
        """What is not at its default, as values that JSON can hold, without the choice of methods and points."""
        content = beyond_defaults(dataclasses.replace(self, smaller={}))
        del content["points"], content["methods"]
        plain: dict[str, Any] = json.loads(json.dumps(content))
        return plain

    def shortened(self, epochs: int) -> Recipe:
        """The same with so many epochs in each phase, for trying out; records of it say so by their version 0."""
        phases = {
            name: None if phase is None else dataclasses.replace(phase, epochs=epochs, milestones=phase.milestones[:1])
            for name, phase in (("dense", self.dense), ("gated", self.gated), ("tuned", self.tuned))
        }
        return dataclasses.replace(self, version=0, **phases)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Job:
    """One run: a recipe with one method, at one point, from one seed.

    Args:
        recipe: the experiment; of what differs by size, this job has that of its own.
        method: a name in the recipe's ``methods``.
        point: the size.
        seed: of initial weights, order of examples, gates and all else that is drawn.
        validated: whether the network is judged on a part of the training images that it does not see, and the test
            images stay untouched.

    Raises:
        SecateurError: the method or the point is none of the recipe.
    """

    recipe: Recipe
    method: str
    point: Point
    seed: int
    validated: bool = False

    def __post_init__(self) -> None:
        recipe = self.recipe.at(self.point)
        object.__setattr__(self, "recipe", recipe)
        where = f"{recipe.experiment}, recipe {recipe.name!r}"
        problems = []
        if self.method not in recipe.methods:
            advice = "; what was not published has no paper recipe: use --recipe ours" if recipe.name == "paper" else ""
            problems.append(f"{where}: no method {self.method!r}; there are {', '.join(recipe.methods)}{advice}")
        if bool(self.point.lambdas) != (recipe.name == "paper"):
            problems.append(
                f"{where}: takes {'lambdas' if recipe.name == 'paper' else 'a budget'}, not {self.point.name}"
            )
        n = len(recipe.points[0].lambdas)
        if n and len(self.point.lambdas) not in {0, 1, n}:
            problems.append(
                f"{where}: {len(self.point.lambdas)} lambdas, expected one, or {n}, one for each gated layer"
            )
        if self.seed < 0:
            problems.append(f"seed={self.seed}; expected at least 0")
        if problems:
            raise SecateurError("; ".join(problems))

    @property
    def title(self) -> str:
        """The name of its record, without its suffix."""
        recipe = self.recipe
        words = [recipe.experiment, recipe.name, self.method, self.point.name, f"seed{self.seed}"]
        return "-".join(words + ["validated"] * self.validated)

    @property
    def dense_title(self) -> str:
        """The name of what all methods of a recipe share for a seed."""
        recipe = self.recipe
        words = [recipe.experiment, recipe.name, "dense", f"v{recipe.version}", f"seed{self.seed}"]
        return "-".join(words + ["validated"] * self.validated)

    def phase(self, name: str) -> Phase:
        """One of the recipe's phases with this run's seed; another order of examples for each."""
        recipe = self.recipe
        found = {"dense": recipe.dense, "gated": recipe.gated, "tuned": recipe.tuned}
        if name == "scratch":
            like = recipe.tuned or recipe.gated
            return dataclasses.replace(like, name=name, epochs=recipe.epochs, gate_lr=0.0, seed=self.seed)
        phase = found[name]
        assert phase is not None
        if name == "gated":
            phase = dataclasses.replace(phase, weight_decay=recipe.methods[self.method].get(DECAY, phase.weight_decay))
        # Another order of examples after the cut.
        return dataclasses.replace(phase, name=name, seed=self.seed + (name == "tuned"))

    def budget(self, steps: int) -> sc.Budget | None:
        """What the gates are steered to over so many optimizer steps; None where lambdas say it."""
        point, recipe = self.point, self.recipe
        if point.lambdas:
            return None
        return sc.Budget(
            keep_params=point.keep_params,
            keep_macs=point.keep_macs,
            steps=steps,
            hold=recipe.hold,
            ramp=recipe.ramp,
            # Magnitude pruning closes the same share of every group; nothing steers it to a part's size.
            per={} if self.method == "magnitude" else recipe.per,
        )
